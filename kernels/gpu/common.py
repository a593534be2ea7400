"""What the Triton kernels of all structures share: the permutation in the load, the epilogue, the operator around them.

Every kernel computes a tile `[tokens, rows of S]` of y = (S x[..., perm_in])[..., perm_out] + b and accumulates in
float32. The output side's permutation is applied where the tile is stored, through its inverse `store` int32 `[out]`:
row r of S belongs to output store[r].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import CustomOpDef


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: `TILE` tokens and `ROWS` rows of S a program, `STEP` stored values of a row at a time."""

    TILE: int
    ROWS: int
    STEP: int
    num_warps: int
    num_stages: int

    def keywords(self) -> dict[str, int]:
        """As the keywords of a launch."""
        return asdict(self)


@triton.jit
def permuted(column, live, perm_in, PERM_IN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inputs that columns of S read."""
    if PERM_IN:
        return tl.load(perm_in + column, mask=live, other=0)
    else:
        return column


@triton.jit
def write(  # type: ignore[no-untyped-def]
    total, token, row, bias, store, y, tokens, out_features, BIAS: tl.constexpr, STORE: tl.constexpr
):
    """The epilogue: `total` float32 `[TILE, ROWS]` plus the bias, to the outputs that the rows of S belong to."""
    inside = row < out_features
    output = row
    if STORE:
        output = tl.load(store + row, mask=inside, other=0)
    if BIAS:
        total += tl.load(bias + output, mask=inside, other=0).to(tl.float32)[None, :]
    place = y + token[:, None] * out_features + output[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & inside[None, :])


def epilogue(bias: Tensor | None, perm_in: Tensor | None, store: Tensor | None, stand_in: Tensor) -> dict[str, Any]:
    """The optional tensors of a launch with their switches; `stand_in` goes where there is none and is not read."""
    optional = {"bias": bias, "perm_in": perm_in, "store": store}
    pointers = {key: stand_in if tensor is None else tensor for key, tensor in optional.items()}
    return {**pointers, **{key.upper(): tensor is not None for key, tensor in optional.items()}}


def empty_output(x: Tensor, out_features: int) -> Tensor:
    """y for x `[..., in]`, uninitialised."""
    return x.new_empty((*x.shape[:-1], out_features))


def differentiable(operator: CustomOpDef) -> None:
    """Give `operator(x, bias, *packed)` gradients to x and the bias.

    dx = dy W through a dense W, which is what the operator itself makes of the identity.
    """

    def setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        del output
        x, _, *rest = inputs
        ctx.in_features = x.shape[-1]
        ctx.rest = [None if isinstance(value, Tensor) else value for value in rest]
        ctx.places = [place for place, value in enumerate(rest) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(rest[place] for place in ctx.places))

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rest = list(ctx.rest)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            rest[place] = tensor
        dx = db = None
        if ctx.needs_input_grad[0]:
            identity = torch.eye(ctx.in_features, dtype=dy.dtype, device=dy.device)
            dx = dy @ operator(identity, None, *rest).t()
        if ctx.needs_input_grad[1]:
            db = dy.reshape(-1, dy.shape[-1]).sum(dim=0)
        return dx, db, *(None for _ in rest)

    operator.register_autograd(backward, setup_context=setup)
