"""`--allocation owl|error`: the plan that the data made is the one that is trained, kept and resumed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from padst_cli import pipeline
from padst_cli.errors import Interrupted
from padst_cli.events import Event
from padst_cli.recipe import Recipe
from tests.cli.conftest import Padst


@pytest.mark.parametrize("allocation", ["owl", "error"])
def test_densities_of_the_data_are_kept_and_resumed(
    padst: Padst, llamas: dict[str, Path], train_text: Path, heldout_text: Path, tmp_path: Path, allocation: str
) -> None:
    model = str(llamas["untied"])
    recipe = Recipe(
        structure="diag", sparsity=0.6, allocation=allocation, data=str(train_text), eval_data=str(heldout_text)
    ).updated({"training.steps": 4, "training.batch_size": 4, "training.max_seq_length": 32, "training.save_every": 2})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pipeline.sparsify(model, recipe, whole)
    seen = padst.json("inspect", whole)
    assert len({layer["density"] for layer in seen["layers"]}) > 1
    results = json.loads((whole / "results.json").read_text())
    assert seen["density"] == pytest.approx(1 - results["sparsity_achieved"])
    assert seen["density"] == pytest.approx(0.4, abs=0.03)

    def stop(event: Event) -> None:
        if type(event).__name__ == "Saved" and event.to_json()["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        pipeline.sparsify(model, recipe, broken, on_event=stop)
    assert json.loads((broken / "state" / "progress.json").read_text())["densities"]
    assert padst("sparsify", model, "--output", broken, "--resume").exit_code == 0
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_plan_says_that_the_data_decides(padst: Padst, llamas: dict[str, Path]) -> None:
    plan = padst.json("plan", llamas["untied"], "--allocation", "owl")
    assert plan["allocation"] == "owl"
    assert len({layer["density"] for layer in plan["layers"] if layer["in_features"] == 64}) == 1
    assert "until owl has seen data" in padst("plan", llamas["untied"], "--allocation", "owl").output
    assert "neither uniform, erk, owl, error nor a file" in padst.error(
        "plan", llamas["untied"], "--allocation", "owls"
    )
