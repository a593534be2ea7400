"""The LM head as a target, end to end: untied where it was tied, sparse in every form that padst writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from padst_cli.runtime.quantizer import packed_layers
from tests import models
from tests.cli.conftest import Padst

HEAD = ("--targets", "default", "--targets", "lm_head")
IDS = torch.arange(1, 20).view(1, -1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_plan_counts_the_untied_embedding(padst: Padst, gpt2: Path) -> None:
    arguments = ("plan", gpt2, "--structure", "diag", "--sparsity", 0.75)
    without, with_head = padst.json(*arguments), padst.json(*arguments, *HEAD)
    head = with_head["layers"][-1]
    assert (head["name"], head["untied"], head["sides"]) == ("lm_head", True, ["input", "output"])
    assert "untied" in head["note"]
    assert with_head["dense_bytes"] == without["dense_bytes"]
    # The embedding was there before; the head comes on top of it.
    assert with_head["packed_bytes"] == without["packed_bytes"] + head["packed_bytes"]
    assert without["whole_model_density"] < with_head["whole_model_density"]


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_tied_head_of_gpt2(
    padst: Padst, sparsified: Callable[..., Path], gpt2: Path, heldout_text: Path, tmp_path: Path, structure: str
) -> None:
    folder = sparsified(structure, *HEAD)
    dense_model, trained = AutoModelForCausalLM.from_pretrained(gpt2), AutoModelForCausalLM.from_pretrained(folder)
    assert trained.config.tie_word_embeddings is False
    assert "lm_head" in packed_layers(trained)
    assert trained.transformer.wte.weight.shape == dense_model.transformer.wte.weight.shape
    out, flat = tmp_path / "packed", tmp_path / "dense"
    packed = padst.json("export", folder, "--output", out)
    dense = padst.json("export", folder, "--output", flat, "--format", "dense")
    plan = padst.json("plan", gpt2, "--structure", structure, "--sparsity", 0.5, *HEAD)
    for report in (packed, dense):
        assert report["max_abs_logit_error"] <= 1e-4
        assert report["dense_bytes"] == plan["dense_bytes"]
    reference = logits(trained)
    for form in (out, flat):
        model = AutoModelForCausalLM.from_pretrained(form)
        assert model.config.tie_word_embeddings is False
        assert torch.allclose(logits(model), reference, atol=1e-4)
    assert (model.lm_head.weight == 0).float().mean() == pytest.approx(0.5, abs=0.07)
    assert not (model.transformer.wte.weight == 0).any()
    copy = tmp_path / "copy"
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(copy)
    assert (copy / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    said = padst.json("generate", out, "--prompt", "The cat", "--max-new-tokens", 4)
    assert said["new_tokens"] == 4
    seen = padst.json("inspect", out)
    assert [layer["name"] for layer in seen["layers"]][-1] == "lm_head"
    results = json.loads((folder / "results.json").read_text())
    measured = padst.json("eval", out, "--data", heldout_text)
    assert measured["value"] == pytest.approx(results["metric"]["final"], rel=1e-3)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_head_of_a_llama(
    padst: Padst, llamas: dict[str, Path], train_text: Path, heldout_text: Path, tmp_path: Path, name: str
) -> None:
    folder, out = tmp_path / "run", tmp_path / "packed"
    padst.json(
        *("sparsify", llamas[name], "--structure", "diag", "--sparsity", 0.5, "--output", folder, "--steps", 2),
        *("--data", train_text, "--eval-data", heldout_text, "--batch-size", 4, "--max-seq-length", 32, *HEAD),
    )
    assert padst.json("export", folder, "--output", out)["max_abs_logit_error"] <= 1e-4
    model = AutoModelForCausalLM.from_pretrained(out)
    assert "lm_head" in packed_layers(model)
    assert model.config.tie_word_embeddings is False
    results = json.loads((folder / "results.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(llamas[name])
    assert results["dense_bytes"] == 4 * sum(parameter.numel() for parameter in dense.parameters())


def test_the_base_model_opens_without_the_sparse_head(sparsified: Callable[..., Path]) -> None:
    folder = sparsified("diag", *HEAD)
    whole, base = AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.transformer(IDS).last_hidden_state)
    assert list(packed_layers(base)) == [name.removeprefix("transformer.") for name in packed_layers(whole)][:-1]


def test_tied_decoder_of_a_masked_model(
    padst: Padst, tokenizer: Any, train_text: Path, heldout_text: Path, tmp_path: Path
) -> None:
    base, folder, out = tmp_path / "bert", tmp_path / "run", tmp_path / "packed"
    masked = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, mask_token="[MASK]", pad_token="<|endoftext|>"
    )
    sizes = {"hidden_size": 64, "max_position_embeddings": 64, "vocab_size": len(masked)}
    models.blur(models.build("bert-mlm", **sizes), 0.02).save_pretrained(base)
    masked.save_pretrained(base)
    padst.json(
        *("sparsify", base, "--structure", "nm", "--sparsity", 0.5, "--output", folder, "--steps", 2),
        *("--data", train_text, "--eval-data", heldout_text, "--batch-size", 4, "--max-seq-length", 32),
        *("--targets", "default", "--targets", "predictions.decoder"),
    )
    report = padst.json("export", folder, "--output", out)
    assert report["max_abs_logit_error"] <= 1e-4
    dense = AutoModelForMaskedLM.from_pretrained(base)
    assert report["dense_bytes"] == 4 * sum(parameter.numel() for parameter in dense.parameters())
    model = AutoModelForMaskedLM.from_pretrained(out)
    assert model.config.tie_word_embeddings is False
    assert list(packed_layers(model))[-1] == "cls.predictions.decoder"
    assert model.get_input_embeddings().weight.shape == dense.get_input_embeddings().weight.shape
