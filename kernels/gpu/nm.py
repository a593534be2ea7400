"""N:M on CUDA cores, for tokens so few that reading the weight is what costs.

y[t, r] = sum over groups g and slots n: values[r, g, n] x[t, perm_in[g M + index[r, g, n]]]

A program computes a few rows for a tile of tokens. A row's values lie side by side, `STEP` of them are read at a time,
with their indices as packed (1, 2, 4 or 8 bits, little-endian within the byte), once a tile, and used for all its
tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .common import Config, differentiable, empty_output, epilogue, permuted, write


def config(tokens: int) -> Config:
    """How the kernel is cut; untuned defaults."""
    if tokens == 1:
        return Config(TILE=1, ROWS=8, STEP=128, num_warps=4, num_stages=2)
    if tokens <= 4:
        return Config(TILE=4, ROWS=4, STEP=128, num_warps=4, num_stages=2)
    return Config(TILE=16, ROWS=4, STEP=64, num_warps=4, num_stages=2)


def index_bits(m: int) -> int:
    """Bits of a packed index within groups of `m`: the least of 1, 2, 4 and 8 that holds m - 1."""
    return next(bits for bits in (1, 2, 4, 8) if m <= 2**bits)


@triton.jit
def nm_kernel(  # type: ignore[no-untyped-def]
    x, values, indices, perm_in, store, bias, y, tokens, out_features, in_features, slots, index_bytes,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PERM_IN: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One tile; programs of one tile of tokens are neighbours, so that its inputs stay in the cache."""
    parts = tl.cdiv(out_features, ROWS)
    part = tl.program_id(0) % parts
    token = (tl.program_id(0) // parts).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = part * ROWS + tl.arange(0, ROWS)
    values_of_row = row.to(tl.int64)[:, None] * slots
    indices_of_row = row.to(tl.int64)[:, None] * index_bytes
    partial = tl.zeros((TILE, ROWS, STEP), dtype=tl.float32)
    for start in range(0, slots, STEP):
        slot = start + tl.arange(0, STEP)
        live = (row < out_features)[:, None] & (slot < slots)[None, :]
        weight = tl.load(values + values_of_row + slot[None, :], mask=live, other=0)
        weight = weight.to(x.dtype.element_ty).to(tl.float32)
        packed = tl.load(indices + indices_of_row + (slot * BITS // 8)[None, :], mask=live, other=0).to(tl.int32)
        index = (packed >> (slot * BITS % 8)[None, :]) & ((1 << BITS) - 1)
        source = permuted((slot // N * M)[None, :] + index, live, perm_in, PERM_IN)
        inputs = tl.load(
            x + token[:, None, None] * in_features + source[None, :, :],
            mask=(token < tokens)[:, None, None] & live[None, :, :],
            other=0,
        )
        partial += inputs.to(tl.float32) * weight[None, :, :]
    write(tl.sum(partial, axis=2), token, row, bias, store, y, tokens, out_features, BIAS, STORE)


@triton_op("padst::triton_nm", mutates_args=())
def nm_linear(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    perm_in: Tensor | None,
    store: Tensor | None,
    out_features: int,
    m: int,
) -> Tensor:
    """x `[..., in]` -> `[..., out_features]`; values `[out, G, N]`, indices uint8 `[out, bytes]`."""
    y, in_features = empty_output(x, out_features), x.shape[-1]
    tokens = x.numel() // in_features
    if tokens == 0:
        return y
    cut = config(tokens)
    grid = (triton.cdiv(out_features, cut.ROWS) * triton.cdiv(tokens, cut.TILE),)
    x = x.contiguous()
    groups, n = values.shape[1:]
    wrap_triton(nm_kernel)[grid](
        x=x, values=values, indices=indices, y=y,
        tokens=tokens, out_features=out_features, in_features=in_features,
        slots=groups * n, index_bytes=indices.shape[1],
        N=n, M=m, BITS=index_bits(m), **epilogue(bias, perm_in, store, x), **cut.keywords(),
    )  # fmt: skip
    return y


@nm_linear.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    perm_in: Tensor | None,
    store: Tensor | None,
    out_features: int,
    m: int,
) -> Tensor:
    del bias, values, indices, perm_in, store, m
    return empty_output(x, out_features)


differentiable(nm_linear)
