"""Blocks: block-CSR times gathered activations on tensor cores.

y[t, r] = sum over the blocks j of r's block row, over i < B: values[j, r mod B, i] x[t, perm_in[col[j] B + i]]

The blocks of a row are one long reduction of B times their number, cut into steps that may hold several blocks or part
of one. Many tokens: a program computes a whole block row for a tile of tokens, so each value is read once a tile.
Few tokens: the same kernel with 16 rows of a block a program and the tokens padded to 16, so that there are enough
programs to keep the memory busy without splitting any sum; every value is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .common import Config, differentiable, empty_output, epilogue, permuted, write

FEW = 16
"""Tokens up to which the weight is read by 16 rows a program; the least side of a tensor-core tile."""


def config(tokens: int, size: int, dtype: torch.dtype) -> Config:
    """How the kernel is cut for blocks of `size` and activations of `dtype`; untuned defaults."""
    if tokens <= FEW:
        return Config(TILE=16, ROWS=16, STEP=64, num_warps=1, num_stages=3)
    if dtype is torch.float32:
        return Config(TILE=64, ROWS=size, STEP=16, num_warps=8, num_stages=2)
    if tokens <= 64:
        return Config(TILE=64, ROWS=size, STEP=64, num_warps=4, num_stages=3)
    return Config(TILE=128, ROWS=size, STEP=64, num_warps=8, num_stages=3)


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in full, or as TensorFloat-32 where torch's own switch for products allows it."""
    if dtype is torch.float32 and torch.version.hip is None and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


@triton.jit
def block_kernel(  # type: ignore[no-untyped-def]
    x, values, row_offsets, col_indices, perm_in, store, bias, y, tokens, out_features, in_features,
    SIZE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PERM_IN: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile; programs of one tile of tokens are neighbours, so that its inputs stay in the cache."""
    parts = tl.cdiv(out_features, ROWS)
    part = tl.program_id(0) % parts
    token = (tl.program_id(0) // parts).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = part * ROWS + tl.arange(0, ROWS)
    block_row = part * ROWS // SIZE
    begin = tl.load(row_offsets + block_row) * SIZE
    end = tl.load(row_offsets + block_row + 1) * SIZE
    total = tl.zeros((TILE, ROWS), dtype=tl.float32)
    for start in range(begin, end, STEP):
        entry = start + tl.arange(0, STEP)
        block = entry // SIZE
        stored = entry < end
        column = tl.load(col_indices + block, mask=stored, other=0) * SIZE + entry % SIZE
        live = stored & (column < in_features)
        source = permuted(column, live, perm_in, PERM_IN)
        inputs = tl.load(
            x + token[:, None] * in_features + source[None, :], mask=(token < tokens)[:, None] & live[None, :], other=0
        )
        first = block.to(tl.int64) * (SIZE * SIZE) + entry % SIZE
        weight = tl.load(values + first[:, None] + (row % SIZE)[None, :] * SIZE, mask=stored[:, None], other=0)
        total = tl.dot(inputs, weight.to(inputs.dtype), total, input_precision=PRECISION)
    write(total, token, row, bias, store, y, tokens, out_features, BIAS, STORE)


@triton_op("padst::triton_block", mutates_args=())
def block_linear(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    row_offsets: Tensor,
    col_indices: Tensor,
    perm_in: Tensor | None,
    store: Tensor | None,
    out_features: int,
) -> Tensor:
    """x `[..., in]` -> `[..., out_features]`; values `[count, B, B]`, bias in the dtype of x, `store` see common.py."""
    y, size = empty_output(x, out_features), values.shape[-1]
    tokens = x.numel() // x.shape[-1]
    if tokens == 0:
        return y
    cut = config(tokens, size, x.dtype)
    grid = (triton.cdiv(out_features, cut.ROWS) * triton.cdiv(tokens, cut.TILE),)
    x = x.contiguous()
    wrap_triton(block_kernel)[grid](
        x=x, values=values, row_offsets=row_offsets, col_indices=col_indices, y=y,
        tokens=tokens, out_features=out_features, in_features=x.shape[-1],
        SIZE=size, PRECISION=precision(x.dtype), **epilogue(bias, perm_in, store, x), **cut.keywords(),
    )  # fmt: skip
    return y


@block_linear.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    row_offsets: Tensor,
    col_indices: Tensor,
    perm_in: Tensor | None,
    store: Tensor | None,
    out_features: int,
) -> Tensor:
    del bias, values, row_offsets, col_indices, perm_in, store
    return empty_output(x, out_features)


differentiable(block_linear)
