"""The product of a layer in autograd and under the transforms of `torch.func`, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .layout import rows_of


class Linear(Protocol):
    """y = W x + b of plain tensors, and what takes dy to dx."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in] -> [..., out]`; both are plain (plain.py) and ask for no gradients."""

    def input_gradient(self, dy: Tensor) -> Tensor:
        """`[..., out] -> [..., in]`; dy may be wrapped by transforms, and the result is differentiable."""


def differentiable(linear: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """The product recorded for gradients, with x `[..., in]` and the bias plain or wrapped by transforms."""
    result: Tensor = _Product.apply(linear, x, bias)
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(linear: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        return linear.product(x.detach(), None if bias is None else bias.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.linear = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        (dy,) = grads
        dx = ctx.linear.input_gradient(dy) if ctx.needs_input_grad[1] else None
        db = rows_of(dy).sum(dim=0) if ctx.needs_input_grad[2] else None
        return None, dx, db

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return differentiable(ctx.linear, *tangents[1:])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], linear: Linear, x: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        return over_batch(info, in_dims[1:], x, bias, lambda u, b: differentiable(linear, u, b)), 0


def over_batch(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    bias: Tensor | None,
    product: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """A product vmapped over x and the bias, the batch first: x takes any dimensions, a bias that differs is added."""
    x_dim, bias_dim = in_dims
    x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
    if bias is None or bias_dim is None:
        return product(x, bias)
    y = product(x, None)
    return y + bias.movedim(bias_dim, 0).view(len(x), *[1] * (x.dim() - 2), -1).to(y.dtype)
