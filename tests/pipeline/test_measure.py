"""Two models beside each other on the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from padst_cli.errors import PadstError
from padst_cli.pipeline import evaluate, sparsify
from padst_cli.recipe import Recipe
from tests import models
from tests.data.conftest import byte_tokenizer


@pytest.fixture
def folder(tmp_path: Path):
    """`folder(family)`: a model with a tokenizer of bytes."""

    def make(family: str, seed: int = 0) -> str:
        path = tmp_path / f"{family}-{seed}"
        models.build(family, seed, vocab_size=300).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        return str(path)

    return make


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 8)
    return str(tmp_path / "text.txt")


@pytest.mark.parametrize(("family", "options"), [("bert", {}), ("gpt2", {"metric": "kl_to_dense"})])
def test_over_zero_there_is_no_ratio(folder: Any, text: str, family: str, options: dict[str, str]) -> None:
    result = evaluate(folder(family, 1), text, compare=folder(family), device="cpu", **options)
    assert result.figures.value > 0
    assert result.other is not None
    assert result.other.value == 0
    assert result.ratio is None
    assert result.to_json()["ratio"] is None


def test_encoders_are_held_against_the_dense_one_in_either_place(folder: Any, text: str, tmp_path: Path) -> None:
    dense, sparse = folder("bert"), str(tmp_path / "sparse")
    recipe = Recipe(structure="diag", sparsity=0.5, data=text, eval_data=text)
    small = {"training.steps": 0, "training.max_seq_length": 8, "calibration.samples": 4, "permutation.kind": "none"}
    sparsify(dense, recipe.updated(small), sparse, device="cpu")
    first = evaluate(dense, text, compare=sparse, device="cpu")
    assert first.figures.value == first.ratio == 0
    assert first.other is not None
    assert first.other.value > 0
    assert evaluate(sparse, text, compare=sparse, device="cpu").ratio == 1


def test_another_vocabulary_leaves_the_divergence_out(folder: Any, text: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    models.build("gpt2", vocab_size=310).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    result = evaluate(folder("gpt2"), text, compare=other, device="cpu")
    found = result.to_json()
    assert found["kl_to_dense"] is found["other"]["kl_to_dense"] is None
    assert found["ratio"] > 0
    assert found["same_inputs"] is False
    with pytest.raises(PadstError, match="differ in what they read or give"):
        evaluate(folder("gpt2"), text, compare=other, device="cpu", metric="kl_to_dense")


def test_another_task_is_refused(folder: Any, text: str) -> None:
    with pytest.raises(PadstError, match=r"task causal-lm and encoder; --compare takes one of the same"):
        evaluate(folder("gpt2"), text, compare=folder("bert"), device="cpu")
