"""Spelled-out activations become one operation each, and nothing else does."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from padst_cli.training.activations import in_one_operation
from tests.models import build


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_values_and_gradients_stay(name):
    model = nn.Sequential(ACT2FN[name])
    x = torch.linspace(-8, 8, 401, dtype=torch.float64, requires_grad=True)
    before = model(x)
    (slope,) = torch.autograd.grad(before.sum(), x)
    assert in_one_operation(model) == 1
    assert type(model[0]) is nn.GELU
    after = model(x)
    torch.testing.assert_close(after, before, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(after.sum(), x)[0], slope, atol=1e-7, rtol=1e-6)
    assert in_one_operation(model) == 0


def test_a_model_computes_the_same_with_what_it_holds():
    model = build("gpt2").eval()
    quick, ids = copy.deepcopy(model), torch.randint(40, (2, 9))
    assert in_one_operation(quick) == model.config.n_layer
    assert list(quick.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(quick(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "vit", "gpt-neox"])
def test_what_is_one_operation_stays(family):
    model = build(family)
    before = {name: id(module) for name, module in model.named_modules()}
    assert in_one_operation(model) == 0
    assert {name: id(module) for name, module in model.named_modules()} == before
