"""The main job through the command line: plan, sparsify, eval, export, reload, generate, inspect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from padst_cli.recipe import LEARNING_RATES, load_recipe
from tests.cli.conftest import Padst

STRUCTURES = ("diag", "nm", "block")


def test_plan_names_every_layer_and_its_density(padst: Padst, gpt2: Path) -> None:
    plan = padst.json("plan", gpt2, "--structure", "diag", "--sparsity", 0.75)
    assert [layer["name"].rpartition("h.")[2] for layer in plan["layers"]][:2] == ["0.attn.c_attn", "0.attn.c_proj"]
    assert len(plan["layers"]) == 8
    assert plan["sparsity_achieved"] == pytest.approx(0.75)
    assert plan["packed_bytes"] < plan["dense_bytes"]
    assert [skip["name"] for skip in plan["skipped"]] == ["lm_head"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_export_computes_what_was_trained(
    padst: Padst, sparsified: Callable[..., Path], heldout_text: Path, tmp_path: Path, structure: str
) -> None:
    folder = sparsified(structure)
    out = tmp_path / "packed"
    exported = padst.json("export", folder, "--output", out)
    assert exported["max_abs_logit_error"] <= 1e-4
    assert exported["packed_bytes"] < exported["dense_bytes"]
    trained = padst.json("eval", folder, "--data", heldout_text)
    packed = padst.json("eval", out, "--data", heldout_text)
    assert packed["value"] == pytest.approx(trained["value"], rel=1e-4)
    results = json.loads((folder / "results.json").read_text())
    assert results["metric"]["final"] == pytest.approx(trained["value"], rel=1e-4)


def test_written_recipe_is_complete(
    sparsified: Callable[..., Path], gpt2: Path, train_text: Path, heldout_text: Path
) -> None:
    recipe = load_recipe(str(sparsified("diag") / "recipe.yaml"))
    assert [recipe.model, recipe.data, recipe.eval_data] == [str(gpt2), str(train_text), str(heldout_text)]
    assert recipe.training.learning_rate == LEARNING_RATES["causal-lm"]


def test_learning_rate_that_is_given_is_kept(sparsified: Callable[..., Path]) -> None:
    folder = sparsified("diag", "--learning-rate", 0.002)
    assert load_recipe(str(folder / "recipe.yaml")).training.learning_rate == 0.002


def test_dense_export_needs_no_padst(padst: Padst, sparsified: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = sparsified("block")
    out = tmp_path / "dense"
    exported = padst.json("export", folder, "--output", out, "--format", "dense")
    assert exported["max_abs_logit_error"] <= 1e-4
    dense = AutoModelForCausalLM.from_pretrained(out)
    sparse = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(1, 20).view(1, -1)
    with torch.no_grad():
        assert torch.allclose(dense(tokens).logits, sparse(tokens).logits, atol=1e-4)
    weight = dense.transformer.h[0].mlp.c_fc.weight
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.07)


def test_unstructured_is_trained_but_not_packed(padst: Padst, sparsified: Callable[..., Path], tmp_path: Path) -> None:
    folder = sparsified("unstructured")
    assert "unstructured" in padst.error("export", folder, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    padst.json("export", folder, "--output", tmp_path / "dense", "--format", "dense")


@pytest.mark.parametrize("value_dtype", ["bfloat16", "float16"])
def test_sixteen_bit_values_halve_the_file(
    padst: Padst, sparsified: Callable[..., Path], tmp_path: Path, value_dtype: str
) -> None:
    folder = sparsified("diag")
    wide = padst.json("export", folder, "--output", tmp_path / "wide")
    narrow = padst.json("export", folder, "--output", tmp_path / "narrow", "--value-dtype", value_dtype)
    assert narrow["packed_bytes"] < wide["packed_bytes"]
    assert narrow["max_abs_logit_error"] < 0.1


def test_export_is_deterministic_and_shards(padst: Padst, sparsified: Callable[..., Path], tmp_path: Path) -> None:
    folder = sparsified("nm")
    for name in ("one", "two"):
        padst.json("export", folder, "--output", tmp_path / name, "--max-shard-size", "60KB")
    one = sorted(file.name for file in (tmp_path / "one").glob("*.safetensors"))
    assert len(one) > 1
    for name in [*one, "config.json", "model.safetensors.index.json"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_generate_and_inspect(padst: Padst, sparsified: Callable[..., Path]) -> None:
    folder = sparsified("diag")
    said = padst.json("generate", folder, "--prompt", "The cat", "--max-new-tokens", 5)
    assert said["new_tokens"] == 5
    assert said["kernels"]
    seen = padst.json("inspect", folder)
    assert len(seen["layers"]) == 8
    assert set(seen["layers"][0]["kernels"]) == {"1", "512"}


def test_run_folder_is_complete(sparsified: Callable[..., Path]) -> None:
    folder = sparsified("diag")
    names = {file.name for file in folder.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "log.jsonl",
        "report.html",
        "README.md",
        "tokenizer.json",
    } <= names
    assert "state" not in names
    events = [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"CalibrationProgress", "Step", "Hardened", "Evaluated"} <= set(events)


def test_recipe_file_repeats_the_run(padst: Padst, sparsified: Callable[..., Path], gpt2: Path, tmp_path: Path) -> None:
    folder = sparsified("diag")
    again = tmp_path / "again"
    padst.json("sparsify", gpt2, "--recipe", folder / "recipe.yaml", "--output", again)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_one_shot(sparsified: Callable[..., Path]) -> None:
    folder = sparsified("block", "--steps", 0)
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 0
    assert results["metric"]["final"] == pytest.approx(results["metric"]["initial"], rel=1e-4)


def test_dense_control_is_measured(sparsified: Callable[..., Path]) -> None:
    folder = sparsified("block", "--dense-control")
    metric = json.loads((folder / "results.json").read_text())["metric"]
    assert metric["dense_finetuned"] is not None
    assert metric["dense_finetuned"] != metric["dense"]
