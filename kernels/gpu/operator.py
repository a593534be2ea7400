"""The torch operators around the Triton kernels, one pair for each structure, with fakes and gradients.

`padst::triton_NAME(x, bias, values, index, perm_in, store, out_features, parameters, transposed, activation)` is
y = f((S x[..., perm_in])[..., inverse(store)] + b), or with S transposed. What takes dy to dx is the same operator with
S transposed and the permutations in each other's place.

`padst::triton_NAME_gradient(x, dy, values, index, perm_in, store, parameters)` is the gradient of the values, float32
and in their shape: that of S on its support alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.library import CustomOpDef, triton_op

from .common import direct
from .permute import inverse, kept_inverse, pays, permute


class Family(Protocol):
    """The kernels of one structure; tensors are contiguous, x `[..., in]` and y `[..., out]` hold a token or more."""

    NAME: str

    @staticmethod
    def launch(
        x: Tensor, bias: Tensor | None, values: Tensor, index: list[Tensor], perm_in: Tensor | None,
        store: Tensor | None, y: Tensor, parameters: list[int], transposed: bool, activation: str,
    ) -> None:  # fmt: skip
        """Write y; inputs may be permuted in a pass of their own first."""

    @staticmethod
    def launch_gradient(x: Tensor, dy: Tensor, values: Tensor, index: list[Tensor], parameters: list[int]) -> Tensor:
        """The gradient of the values, float32, for x and dy in the coordinates of S."""


def empty_output(x: Tensor, out_features: int) -> Tensor:
    """y for x `[..., in]`, uninitialised."""
    return x.new_empty((*x.shape[:-1], out_features))


class Operator:
    """An operator that is not gone through where nothing asks for it: with tensors at hand and no gradient to record.

    Torch's dispatch of an operator written in Python takes the CPU 30 to 50 microseconds a call, longer than a small
    layer takes the GPU.
    """

    def __init__(self, function: Callable[..., Tensor], operator: CustomOpDef) -> None:
        self._function, self.operator = function, operator

    def __call__(self, x: Tensor, second: Tensor | None, values: Tensor, *rest: Any) -> Tensor:
        """As the operator; `second` is the bias or dy."""
        if direct(x) and not (torch.is_grad_enabled() and any(map(_recorded, (x, second, values)))):
            return self._function(x, second, values, *rest)
        result: Tensor = self.operator(x, second, values, *rest)
        return result


def _recorded(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _check(others: Sequence[Tensor | None], x: Tensor) -> None:
    """Raise ValueError where a tensor is not where x is: a kernel would read memory that is not there."""
    device = x.device
    for tensor in others:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"x is on {device}, but the layer or what comes with x is on {tensor.device}")


def define(family: type[Family]) -> tuple[Operator, Operator]:
    """The operators (product, gradient) of a structure's kernels."""

    def gradient_of(
        x: Tensor,
        dy: Tensor,
        values: Tensor,
        index: list[Tensor],
        perm_in: Tensor | None,
        store: Tensor | None,
        parameters: list[int],
    ) -> Tensor:
        if x.numel() == 0:
            return torch.zeros_like(values, dtype=torch.float32)
        _check((dy, values), x)
        x, dy = x.contiguous(), dy.contiguous()
        x = x if perm_in is None else permute(x, perm_in)
        dy = dy if store is None else permute(dy, store)
        return family.launch_gradient(x, dy, values, index, parameters)

    gradient: Any = triton_op(f"padst::triton_{family.NAME}_gradient", gradient_of, mutates_args=())

    @gradient.register_fake
    def _(x: Tensor, dy: Tensor, values: Tensor, *rest: Any) -> Tensor:
        del x, dy, rest
        return torch.empty_like(values, dtype=torch.float32)

    def product_of(
        x: Tensor,
        bias: Tensor | None,
        values: Tensor,
        index: list[Tensor],
        perm_in: Tensor | None,
        store: Tensor | None,
        out_features: int,
        parameters: list[int],
        transposed: bool,
        activation: str,
    ) -> Tensor:
        _check((bias, values), x)
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"the bias is {list(bias.shape)}, the layer has {out_features} outputs")
        y = empty_output(x, out_features)
        tokens = x.numel() // x.shape[-1]
        if tokens == 0:
            return y
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        later: Tensor | None = None
        if store is not None and pays(tokens * out_features):
            bias = None if bias is None else bias.index_select(0, store)
            later, store = kept_inverse(store) if direct(x) else inverse(store), None
        family.launch(x, bias, values, index, perm_in, store, y, parameters, transposed, activation)
        return y if later is None else permute(y, later)

    product: Any = triton_op(f"padst::triton_{family.NAME}", product_of, mutates_args=())

    @product.register_fake
    def _(
        x: Tensor,
        bias: Tensor | None,
        values: Tensor,
        index: list[Tensor],
        perm_in: Tensor | None,
        store: Tensor | None,
        out_features: int,
        *rest: Any,
    ) -> Tensor:
        del bias, values, index, perm_in, store, rest
        return empty_output(x, out_features)

    _differentiable(product, gradient)
    return Operator(product_of, product), Operator(gradient_of, gradient)


def _differentiable(product: CustomOpDef, gradient: CustomOpDef) -> None:
    """Gradients to x, the bias and the values; what an activation's needs is computed again."""

    def setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        del output
        x, bias, values, index, perm_in, store, _, ctx.parameters, ctx.transposed, ctx.activation = inputs
        ctx.in_features = x.shape[-1]
        ctx.save_for_backward(x, bias, values, perm_in, store, *index)

    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, bias, values, perm_in, store, *index = ctx.saved_tensors
        rest = ctx.parameters, ctx.transposed
        if ctx.activation:
            z = product(x, bias, values, index, perm_in, store, dy.shape[-1], *rest, "")
            dy = _through(ctx.activation, dy, z)
        dx = db = dv = None
        if ctx.needs_input_grad[0]:
            dx = product(
                dy, None, values, index, store, perm_in, ctx.in_features, ctx.parameters, not ctx.transposed, ""
            )
        if ctx.needs_input_grad[1]:
            db = dy.reshape(-1, dy.shape[-1]).sum(dim=0)
        if ctx.needs_input_grad[2]:
            sides = (dy, x, values, index, store, perm_in) if ctx.transposed else (x, dy, values, index, perm_in, store)
            dv = gradient(*sides, ctx.parameters).to(values.dtype)
        return dx, db, dv, [None] * len(index), None, None, None, None, None, None

    product.register_autograd(backward, setup_context=setup)


def _through(activation: str, dy: Tensor, z: Tensor) -> Tensor:
    """dy times the derivative of an activation at z."""
    if activation == "silu" and torch.is_grad_enabled():  # for second derivatives, which torch's own lacks
        gate = torch.sigmoid(z.float())
        return (dy.float() * gate * (1.0 + z.float() * (1.0 - gate))).to(dy.dtype)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, z)
    return torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none")
