"""A tokenizer may know more tokens than its model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from padst_cli.pipeline.job import Job
from padst_cli.recipe import Recipe
from tests import models
from tests.data.conftest import byte_tokenizer


@pytest.mark.parametrize(("known", "drawn"), [(50, 50), (400, 260)])
def test_noise_is_drawn_from_what_both_know(known: int, drawn: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    source: Any = SimpleNamespace(config=models.config("bert-mlm", vocab_size=known), task="masked-lm", modality="text")
    unused: Any = None
    objective: Any = Job(Recipe(), source, tokenizer, unused, unused, unused, unused).objective(None)
    assert objective.vocabulary == drawn
