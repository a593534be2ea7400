"""Learners of the permutation in turns: what is compared, and how it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.pipeline import learner_costs
from padst_cli.recipe import Recipe
from padst_cli.training.trainer import Trainer


def recipe_of(data: Path, **changes: object) -> Recipe:
    base = {
        "structure": "block",
        "sparsity": 0.5,
        "data": str(data),
        "eval_data": str(data),
        "support.method": "static",
    }
    sizes = {"training.steps": 10, "training.batch_size": 2, "training.max_seq_length": 16, "calibration.samples": 4}
    return Recipe().updated({**base, **sizes, **changes})


def test_all_learners_go_step_by_step_from_one_order(
    gpt2: Path,
    train_text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began, done = [], []

    class Watched(Trainer):
        def start(self, resume: bool) -> None:
            super().start(resume)
            perms = [perm for layer in self.layers.values() for _, perm in layer.permutations()]
            began.append([perm.start for perm in perms])
            self.learns = len(self.hardener.soft) + len(self.projection.permutations)

        def step(self, stop: object) -> tuple[dict[str, float], bool]:
            done.append(self.recipe.permutation.learner)
            return super().step(stop)  # type: ignore[arg-type]

        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            runs.append(self)

    runs: list[Watched] = []
    monkeypatch.setattr(learner_costs, "Trainer", Watched)
    found = learner_costs.learner_costs(str(gpt2), recipe_of(train_text), ["soft", "projected"], device="cpu")
    assert [each.learner for each in found] == ["refined", "soft", "projected"]
    assert (found[0].ratio, found[0].learning) == (1.0, 1.0)
    assert all(each.step_ms > 0 and each.ratio > 0 and each.learning > 0 for each in found)
    assert done == ["refined", "soft", "projected"] * 10
    assert [run.learns > 0 for run in runs] == [False, True, True]
    assert all(not run.hardener.soft and not run.projection.layers for run in runs), "the schedule of a whole run"
    for other in began[1:]:
        assert len(other) == len(began[0]) > 0
        assert all(torch.equal(one, two) for one, two in zip(began[0], other, strict=True))


def test_the_command(gpt2: Path, train_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_of(train_text).to_yaml(), encoding="utf-8")
    given = [str(gpt2), "--recipe", str(path), "--steps", "4", "--structure", "nm", "--device", "cpu"]
    assert learner_costs.main([*given, "--learners", "straight-through", "--json"]) == 0
    assert [each["learner"] for each in json.loads(capsys.readouterr().out)] == ["refined", "straight-through"]
    assert learner_costs.main([*given[:3], "--steps", "3", "--device", "cpu"]) == 2
    assert "training.steps 3 are too few" in capsys.readouterr().err


def test_a_table_is_for_reading(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    costs = [learner_costs.LearnerCost("refined", 400.4, 1.0, 1.0), learner_costs.LearnerCost("soft", 440.0, 1.1, 1.33)]
    monkeypatch.setattr(learner_costs, "learner_costs", lambda *_, **__: costs)
    assert learner_costs.main(["model", "--recipe", "quickstart"]) == 0
    assert "| soft | 440 ms | 1.100 | 1.33 |" in capsys.readouterr().out


def test_too_few_steps_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(PadstError, match="too few to compare"):
        learner_costs.learner_costs("nowhere", Recipe().updated({"training.steps": 3}))
