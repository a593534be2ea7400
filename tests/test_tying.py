"""Untying: every tied weight gets its own memory, the config says so, and a reload finds what was saved."""

import copy

import pytest
import torch

from padst_cli.tying import shared_parameters, tied_weights, untie
from tests import models

TIED = [("gpt2", {}), ("llama", {"tie_word_embeddings": True}), ("opt", {}), ("bert-mlm", {})]


@pytest.mark.parametrize(("family", "changes"), TIED)
def test_untied_model_computes_the_same_and_comes_back_from_disk(family, changes, tmp_path):
    model = models.blur(models.build(family, **changes), 0.1)
    before = copy.deepcopy(model)
    names = dict(tied_weights(model))
    assert names
    untie(model)
    assert not shared_parameters(model)
    assert not tied_weights(model)
    assert model.config.tie_word_embeddings is False
    assert before.config.tie_word_embeddings is True
    assert shared_parameters(before)
    ids = torch.arange(3, 11)[None]
    assert torch.equal(model(ids).logits, before(ids).logits)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).mul_(2.0)
    assert not torch.allclose(model(ids).logits, before(ids).logits)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not shared_parameters(again)


def test_nothing_tied_nothing_changed():
    model = models.build("llama")
    names = [id(parameter) for parameter in model.parameters()]
    untie(model)
    assert [id(parameter) for parameter in model.parameters()] == names
