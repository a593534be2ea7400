"""How much outputs matter: against gradients taken by hand, on every family, and what it does to a start."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from padst_cli.errors import PadstError
from padst_cli.events import ignore
from padst_cli.initialise import initialise
from padst_cli.initialise.sensitivity import output_sensitivity
from padst_cli.plan import make_plan
from padst_cli.recipe import Recipe

FAMILIES = ["gpt2", "llama", "gpt-neox", "bert", "bert-mlm", "albert", "t5", "vit", "swin"]


class _Output:
    def __init__(self, **values: torch.Tensor) -> None:
        self.__dict__.update(values)


class _TwoLayers(nn.Module):
    """Logits of two linear layers, or with `headless` the second's output as hidden states."""

    def __init__(self, headless: bool) -> None:
        super().__init__()
        self.one, self.two, self.unused = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(2, 3)
        self.headless = headless

    def forward(self, features: torch.Tensor, attention_mask: torch.Tensor | None = None) -> _Output:
        del attention_mask
        value = self.two(torch.tanh(self.one(features)))
        return _Output(last_hidden_state=value) if self.headless else _Output(logits=value)


def _names(model: nn.Module) -> list[str]:
    return [layer.name for layer in make_plan(model, Recipe(structure="nm", sparsity=0.5)).layers]


def test_of_logits_it_is_the_expected_square_of_the_gradient() -> None:
    torch.manual_seed(0)
    model = _TwoLayers(headless=False)
    x = torch.randn(3, 40, 5)
    # The second layer's outputs are the logits: E[(p - onehot(y))^2] with y ~ p is p (1 - p).
    p = model(x).logits.softmax(-1)
    expected = (p * (1 - p)).mean(dim=(0, 1))
    found = output_sensitivity(model, ["two"], [{"features": x}] * 200, seed=0)["two"]
    torch.testing.assert_close(found, (expected / expected.mean()).detach(), rtol=0.03, atol=0.0)


def test_of_hidden_states_it_is_the_squared_jacobian() -> None:
    torch.manual_seed(0)
    model = _TwoLayers(headless=True)
    x = torch.randn(2, 30, 5)
    slope = 1 - torch.tanh(model.one(x)).square()
    expected = (slope.square() * model.two.weight.square().sum(0)).mean(dim=(0, 1))
    found = output_sensitivity(model, ["one"], [{"features": x}] * 200, seed=0)["one"]
    torch.testing.assert_close(found, (expected / expected.mean()).detach(), rtol=0.06, atol=0.0)


def test_outputs_that_the_model_changes_in_place_are_watched_all_the_same() -> None:
    class InPlace(_TwoLayers):
        def forward(self, features: torch.Tensor, attention_mask: torch.Tensor | None = None) -> _Output:
            del attention_mask
            value = self.one(features)
            value += 1.0
            return _Output(last_hidden_state=self.two(torch.tanh(value)))

    torch.manual_seed(0)
    model = InPlace(headless=True)
    batch = {"features": torch.randn(2, 30, 5)}
    found = output_sensitivity(model, ["one", "two"], [batch], seed=0)
    with torch.no_grad():
        model.one.bias += 1.0
    plain = _TwoLayers(headless=True)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(found, output_sensitivity(plain, ["one", "two"], [batch], seed=0))


def test_masked_tokens_do_not_count() -> None:
    torch.manual_seed(0)
    model = _TwoLayers(headless=False)
    x = torch.randn(2, 8, 5)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[:, 5:] = 0
    spoilt = x.clone()
    spoilt[:, 5:] = 100.0
    found = [
        output_sensitivity(model, ["one"], [{"features": each, "attention_mask": mask}], 0) for each in (x, spoilt)
    ]
    torch.testing.assert_close(found[0]["one"], found[1]["one"])


def test_a_layer_that_took_no_part_counts_alike_and_flags_come_back() -> None:
    model = _TwoLayers(headless=False)
    model.one.weight.requires_grad_(False)
    found = output_sensitivity(model, ["one", "unused"], [{"features": torch.randn(1, 3, 5)}], seed=0)
    assert torch.equal(found["unused"], torch.ones(1))
    assert not model.one.weight.requires_grad
    assert model.two.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_not_finite_is_an_error() -> None:
    x = torch.randn(1, 3, 5)
    model = _TwoLayers(headless=True)
    with torch.no_grad():
        model.two.weight[0, 0] = float("nan")
    with pytest.raises(PadstError, match="one: the gradient of the calibration loss is not finite"):
        output_sensitivity(model, ["one"], [{"features": x}], seed=0)
    with pytest.raises(PadstError, match="two: the outputs of this layer hold NaN"):
        output_sensitivity(model, ["one", "two"], [{"features": x}], seed=0)
    model.headless = False
    with pytest.raises(PadstError, match="the dense model's predictions on the calibration data hold NaN"):
        output_sensitivity(model, ["one"], [{"features": x}], seed=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_one_number_an_output(name: str, make_model, make_batches) -> None:
    model, batches = make_model(name), make_batches(name)
    names = _names(model)
    found = output_sensitivity(model, names, batches, seed=0)
    again = output_sensitivity(model, names, batches, seed=0)
    plan = {layer.name: layer for layer in make_plan(model, Recipe(structure="nm", sparsity=0.5)).layers}
    for key, value in found.items():
        assert value.shape == (plan[key].out_features,)
        assert bool((value >= 0).all())
        assert float(value.mean()) == pytest.approx(1.0, rel=1e-4)
        assert torch.equal(value, again[key])


def test_a_row_that_matters_gets_the_support() -> None:
    """Two layers alike but for one row that the head reads: its entries are kept where rows count by sensitivity."""
    torch.manual_seed(0)
    model = _TwoLayers(headless=True)
    with torch.no_grad():
        model.two.weight.zero_()
        model.two.weight[:, 3] = 1.0
    recipe = Recipe(structure="unstructured", sparsity=0.8, targets=("one",)).updated({"permutation.kind": "none"})
    kept = {}
    for power in (0.0, 1.0):
        own = recipe.updated({"calibration.sensitivity": power})
        plan = make_plan(model, own)
        batches = [{"features": torch.randn(4, 20, 5)}]
        start = initialise(model, copy.deepcopy(model), plan, batches, own, ignore)["one"]
        kept[power] = start.mask.sum(dim=1)
    assert int(kept[1.0][3]) == 5
    assert int(kept[0.0][3]) < 5
    assert float(F.normalize(kept[1.0].float(), dim=0)[3]) > 0.8
