"""A packed layer where a tensor is more than its memory or somebody looks at what torch computes, against `linear`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, functionalize, grad, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from padst_cli.errors import PadstError
from tests.runtime.test_packed_linear import make

STRUCTURES = ["diag", "nm", "block"]


class Subclass(torch.Tensor):
    """A tensor that is something else as well."""


@pytest.fixture(params=STRUCTURES)
def case(request):
    """(a layer that was called, its weight, its bias, an input, what is right for it)."""
    layer, weight, bias = make(request.param)
    layer.requires_grad_(False)
    x = torch.randn(3, 80)
    layer(x)
    return layer, weight, bias, x, functional.linear(x, weight, bias)


def test_transforms_that_differentiate(case):
    layer, weight, bias, x, _ = case
    ones = torch.ones(3, 48)
    torch.testing.assert_close(grad(lambda u: layer(u).sum())(x), ones @ weight)
    torch.testing.assert_close(jacrev(layer)(x[0]), weight)
    torch.testing.assert_close(jacfwd(layer)(x[0]), weight)
    y, tangent = jvp(layer, (x,), (2 * x,))
    torch.testing.assert_close(y, functional.linear(x, weight, bias))
    torch.testing.assert_close(tangent, functional.linear(2 * x, weight))
    each = vmap(grad(lambda u: layer(u).square().sum()))(x)
    torch.testing.assert_close(each, 2 * functional.linear(x, weight, bias) @ weight, rtol=1e-4, atol=1e-4)

    def second(product):
        return grad(lambda u: grad(lambda v: product(v).pow(3).sum())(u).square().sum())(x[0])

    expected = second(lambda v: functional.linear(v, weight, bias))
    torch.testing.assert_close(second(layer), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_transforms_that_batch(case):
    layer, _, bias, x, expected = case
    torch.testing.assert_close(vmap(layer)(x), expected)
    torch.testing.assert_close(vmap(layer, in_dims=1)(x.T.contiguous()), expected)
    torch.testing.assert_close(vmap(layer, out_dims=1)(x.expand(4, 3, 80)), expected.expand(4, 3, 48).transpose(0, 1))
    biases = torch.randn(5, 48)

    def with_bias(b):
        return functional_call(layer, {"bias": b}, (x,))

    torch.testing.assert_close(vmap(with_bias)(biases), (expected - bias) + biases[:, None])
    graph = torch.compile(lambda u: vmap(layer)(u), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(graph(x), expected)


def test_graphs_and_stand_ins(case):
    layer, _, _, x, expected = case
    torch.testing.assert_close(functionalize(layer)(x), expected)
    graph = make_fx(layer)(x)
    assert "padst.sparse_linear" in graph.code
    torch.testing.assert_close(graph(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (3, 48)


def test_tensors_that_are_more_than_their_memory(case):
    layer, weight, bias, x, expected = case
    torch.testing.assert_close(layer(torch._neg_view(x)), functional.linear(-x, weight, bias))
    torch.testing.assert_close(layer(torch.complex(x, x).conj().imag), functional.linear(-x, weight, bias))
    torch.testing.assert_close(layer(torch._efficientzerotensor((3, 80))), bias.expand(3, 48))
    torch.testing.assert_close(layer(x.as_subclass(Subclass)).as_subclass(torch.Tensor), expected)
    torch.testing.assert_close(layer(nn.Parameter(x)), expected)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory"):
        layer(x)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_first_call_may_be_one_of_a_parameter(structure):
    layer, weight, bias = make(structure)
    x = nn.Parameter(torch.randn(3, 80))
    torch.testing.assert_close(layer(x), functional.linear(x, weight, bias))
    assert layer._native is not None


def test_dtypes_that_are_no_floating_point_are_refused(case):
    layer, *_ = case
    for dtype in (torch.int64, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match="the layer takes floating point"):
            layer(torch.ones(3, 80, dtype=dtype))


def test_a_traced_operator_refuses_another_width(case):
    layer, _, _, x, expected = case
    traced = torch.jit.trace(lambda u: layer(u), x, check_trace=False)
    torch.testing.assert_close(traced(x), expected)
    for width in (16, 96):
        with pytest.raises(RuntimeError, match=f"called from {width} features"):
            traced(torch.randn(3, width))


@pytest.mark.parametrize("sides", ["", "io"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_tensors_given_for_the_first_call_do_not_become_the_layer_s_own(structure, sides):
    layer, weight, bias = make(structure, sides=sides)
    x = torch.randn(3, 80)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    given = functional_call(layer, {"values": torch.zeros_like(layer.values)}, (x,))
    torch.testing.assert_close(given, bias.expand(3, 48))
    for _ in range(2):
        torch.testing.assert_close(layer(x), functional.linear(x, weight, bias))
    assert all(torch.equal(tensor, state[key]) for key, tensor in layer.state_dict().items())
    torch.testing.assert_close(layer(x), functional.linear(x, weight, bias))
    assert layer._native is not None
    assert layer._parameters["values"] is None


@pytest.mark.parametrize("structure", STRUCTURES)
def test_indices_that_lead_elsewhere_are_refused_before_a_kernel_follows_them(structure):
    layer, weight, bias = make(structure)
    x = torch.randn(3, 80)
    right = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    index = {"diag": "offsets", "nm": "indices", "block": "col_indices"}[structure]
    for key, wrong in ((index, torch.full_like(right[index], 125)), ("perm_in", right["perm_in"] * 1000)):
        for called in (False, True):
            if called:
                layer(x)
            layer.load_state_dict({**right, key: wrong})
            with pytest.raises(PadstError):
                layer(x)
            layer.load_state_dict(right)
    cast = {key: tensor.bfloat16() for key, tensor in right.items()}
    layer.load_state_dict(cast, assign=True)
    with pytest.raises(
        PadstError, match=f"is torch.bfloat16 .*, expected torch.{'uint8' if index == 'indices' else 'int32'}"
    ):
        layer(x)
    layer.load_state_dict(right, assign=True)
    torch.testing.assert_close(layer(x), functional.linear(x, weight, bias))


def test_gradients_are_those_of_the_weights_that_were_used(case):
    layer, weight, _, x, _ = case
    x.requires_grad_()
    y = layer(x)
    layer.load_state_dict(
        {key: tensor * 2 if key == "values" else tensor for key, tensor in layer.state_dict().items()}
    )
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 48) @ weight)


def test_values_that_ask_for_gradients_are_said_to_be_frozen(caplog):
    from padst_cli.runtime import packed_linear

    packed_linear._say_frozen.cache_clear()
    layer, _, _ = make("diag")
    layer.requires_grad_(True)
    layer(torch.randn(3, 80))
    assert "are frozen" in caplog.text
