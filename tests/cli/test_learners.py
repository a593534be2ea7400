"""The learners that compute with indices, end to end: the plan, the files of a run, export, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from padst_cli import pipeline
from padst_cli.commands.sparsify import _permutations
from padst_cli.recipe import Recipe, load_recipe
from tests.cli.conftest import Padst


def test_plan_counts_matrices_only_for_the_soft_learner(padst: Padst, gpt2: Path) -> None:
    soft, looked_up, projected = (
        padst.json("plan", gpt2, "--learner", learner)["run_bytes"]
        for learner in ("soft", "straight-through", "projected")
    )
    assert soft == looked_up > projected == padst.json("plan", gpt2, "--permutation", "assignment")["run_bytes"]


def test_what_a_learner_does_not_take_is_refused(padst: Padst, gpt2: Path) -> None:
    assert "both keep latent values" in padst.error("plan", gpt2, "--learner", "projected", "--dst", "dynadiag")
    assert "'refined', 'soft', 'projected' or 'straight-through'" in padst.error("plan", gpt2, "--learner", "harsh")


@pytest.mark.parametrize(("learner", "share"), [("projected", False), ("projected", True), ("straight-through", True)])
def test_end_to_end(
    padst: Padst,
    llamas: dict[str, Path],
    train_text: Path,
    heldout_text: Path,
    tmp_path: Path,
    learner: str,
    share: bool,
) -> None:
    model, folder, out = str(llamas["untied"]), tmp_path / "run", tmp_path / "packed"
    recipe = Recipe(model=model, structure="block", data=str(train_text), eval_data=str(heldout_text)).updated(
        {
            "sparsity": 0.5,
            "permutation.learner": learner,
            "permutation.learning_rate": 1.0,
            "permutation.deadline": 0.75,
            "permutation.margin": 0.0,
            "permutation.share": share,
            "support.every": 2,
            "training.steps": 8,
            "training.batch_size": 4,
            "training.max_seq_length": 32,
            "training.learning_rate": 1e-2,
        }
    )
    pipeline.sparsify(model, recipe, folder)
    assert load_recipe(str(folder / "recipe.yaml")) == recipe
    counts = json.loads((folder / "results.json").read_text())["permutations"]
    assert counts["learned"] == counts["hardened_at_deadline"] == (22 if share else 28)
    assert counts["moved_from_start"] > 0
    assert f"{counts['moved_from_start']:,} entries moved" in (folder / "README.md").read_text()
    assert "No permutation was soft during this run" in (folder / "report.html").read_text()
    assert padst.json("export", folder, "--output", out)["max_abs_logit_error"] <= 1e-4


def test_the_closing_table_says_what_was_learned_when() -> None:
    counts = {
        "learned": 18, "hardened_by_penalty": 3, "hardened_at_deadline": 15, "learned_before_training": 10,
        "moved_from_start": 1200, "moved_in_training": 0,
    }  # fmt: skip
    assert _permutations(counts) == (
        "10 learned before training, 3 hardened by penalty, 5 hardened at the deadline, "
        "1,200 entries moved from the assignment"
    )
    assert _permutations(dict.fromkeys(counts, 0)) == "none learned"
