"""`--share-permutations` end to end, with a tied head made sparse on the way; stopped, resumed, exported, loaded."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from padst_cli import pipeline
from padst_cli.errors import Interrupted
from padst_cli.events import Event
from padst_cli.recipe import Recipe, load_recipe
from padst_cli.runtime.quantizer import packed_layers
from tests.cli.conftest import Padst

GROUPS = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


def recipe(llama: Path, train_text: Path, heldout_text: Path, structure: str = "diag") -> Recipe:
    return Recipe(
        model=str(llama), structure=structure, sparsity=0.5, data=str(train_text), eval_data=str(heldout_text),
        targets=("default", "lm_head"),
    ).updated(
        {
            "permutation.share": True,
            "training.steps": 6,
            "training.batch_size": 4,
            "training.max_seq_length": 32,
            "training.save_every": 2,
        }
    )  # fmt: skip


def test_plan_says_who_shares(padst: Padst, llamas: dict[str, Path]) -> None:
    plan = padst.json("plan", llamas["tied"], "--share-permutations")
    found = {layer["name"].rpartition(".")[2]: layer for layer in plan["layers"]}
    assert [name.rpartition(".")[2] for name in found["k_proj"]["shared_with"]] == ["q_proj", "v_proj"]
    assert found["k_proj"]["sides"] == ["input", "output"]
    assert found["o_proj"]["shared_with"] == []
    shown = " ".join(padst("plan", llamas["tied"], "--share-permutations").output.split())
    assert "input and output (shared)" in shown
    one = padst.json("plan", llamas["tied"], "--share-permutations", "--side", "smaller")
    assert {tuple(layer["sides"]) for layer in one["layers"] if layer["shared_with"]} == {("input",)}
    assert not any(layer["shared_with"] for layer in padst.json("plan", llamas["tied"])["layers"])


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_shared_permutations_come_through_export(
    padst: Padst, llamas: dict[str, Path], train_text: Path, heldout_text: Path, tmp_path: Path, structure: str
) -> None:
    folder, out = tmp_path / "run", tmp_path / "packed"
    pipeline.sparsify(str(llamas["tied"]), recipe(llamas["tied"], train_text, heldout_text, structure), folder)
    assert padst.json("export", folder, "--output", out)["max_abs_logit_error"] <= 1e-4
    layers = packed_layers(AutoModelForCausalLM.from_pretrained(out))
    for block in ("model.layers.0", "model.layers.1"):
        for group in GROUPS:
            perms = [
                layer.permutations()[0]
                for name, layer in layers.items()
                if name.startswith(block) and name.endswith(group)
            ]
            assert len(perms) == len(group)
            assert all(torch.equal(perm, perms[0]) for perm in perms)
    assert load_recipe(str(folder / "recipe.yaml")).permutation.share
    counts = json.loads((folder / "results.json").read_text())["permutations"]
    assert (counts["sharing_layers"], counts["learned"]) == (10, 9 if structure == "nm" else 9 + 15)
    assert "10 layers share their input permutation" in (folder / "README.md").read_text()
    assert "as model.layers.0.self_attn.q_proj" in (folder / "report.html").read_text()


def test_stopped_and_resumed(
    padst: Padst, llamas: dict[str, Path], train_text: Path, heldout_text: Path, tmp_path: Path
) -> None:
    model, chosen = str(llamas["tied"]), recipe(llamas["tied"], train_text, heldout_text)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pipeline.sparsify(model, chosen, whole)

    def stop(event: Event) -> None:
        # Once: stopping saves again, and a second Ctrl-C would not wait for that.
        if type(event).__name__ == "Saved" and event.to_json()["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        pipeline.sparsify(model, chosen, broken, on_event=stop)
    assert not (broken / "config.json").exists()
    resumed = padst("sparsify", model, "--output", broken, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (broken / "config.json").read_bytes() == (whole / "config.json").read_bytes()
