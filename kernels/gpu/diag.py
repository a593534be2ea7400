"""Diagonals on CUDA cores, for tokens so few that reading the weight is what costs.

out >= in: y[t, r] = sum over k with i = (r - o_k) mod out < in: values[k, i] x[t, perm_in[i]]
out < in: y[t, r] = sum over k: values[k, r] x[t, perm_in[(r + o_k) mod in]]

A program computes `ROWS` neighbouring rows for a tile of tokens: along a diagonal these are neighbouring values, so
every value is read once a tile, coalesced, and used for all its tokens. `STEP` diagonals are summed side by side and
added up at the end. Where out > in only some diagonals meet a range of rows; as offsets ascend these follow on each
other (from the last on to the first), and `spans` says where they begin and end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .common import Config, differentiable, empty_output, epilogue, permuted, write

ROWS = 64
"""Rows of a program, and so of a span."""


def config(tokens: int) -> Config:
    """How the kernel is cut; untuned defaults."""
    if tokens == 1:
        return Config(TILE=1, ROWS=ROWS, STEP=16, num_warps=4, num_stages=2)
    if tokens <= 4:
        return Config(TILE=4, ROWS=ROWS, STEP=16, num_warps=4, num_stages=2)
    return Config(TILE=16, ROWS=ROWS, STEP=4, num_warps=4, num_stages=2)


def spans_of(offsets: Tensor, out_features: int, in_features: int) -> Tensor:
    """Of every `ROWS` rows the number of the first diagonal that meets them and of that behind the last.

    Numbers go on past K where the diagonals start over. int32 `[ceil(out / ROWS), 2]`; offsets int32 `[K]` ascending.
    """
    count = len(offsets)
    first_row = torch.arange(0, out_features, ROWS, device=offsets.device)
    if out_features < in_features:
        return torch.stack([torch.zeros_like(first_row), torch.full_like(first_row, count)], dim=1).to(torch.int32)
    # Row r meets offset o where r - in < o <= r, counted modulo out; one turn more keeps that above zero.
    turns = torch.cat([offsets.long() + turn * out_features for turn in range(3)])
    begin = torch.searchsorted(turns, first_row + out_features - in_features, right=True)
    end = torch.searchsorted(turns, first_row + out_features + ROWS - 1, right=True)
    return torch.stack([begin, torch.minimum(end, begin + count)], dim=1).to(torch.int32)


@triton.jit
def diag_kernel(  # type: ignore[no-untyped-def]
    x, values, offsets, spans, perm_in, store, bias, y, tokens, out_features, in_features, diagonals,
    TALL: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PERM_IN: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One tile; programs of one tile of tokens are neighbours, so that its inputs stay in the cache."""
    parts = tl.cdiv(out_features, ROWS)
    part = tl.program_id(0) % parts
    token = (tl.program_id(0) // parts).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = part * ROWS + tl.arange(0, ROWS)
    begin = tl.load(spans + 2 * part)
    end = tl.load(spans + 2 * part + 1)
    partial = tl.zeros((TILE, STEP, ROWS), dtype=tl.float32)
    for start in range(begin, end, STEP):
        number = start + tl.arange(0, STEP)
        live = (number < end)[:, None] & (row < out_features)[None, :]
        number = number % diagonals
        offset = tl.load(offsets + number)
        if TALL:
            entry = row[None, :] - offset[:, None]
            entry = tl.where(entry < 0, entry + out_features, entry)
            live = live & (entry < in_features)
            column = entry
            place = number.to(tl.int64)[:, None] * in_features + entry
        else:
            column = row[None, :] + offset[:, None]
            column = tl.where(column >= in_features, column - in_features, column)
            place = number.to(tl.int64)[:, None] * out_features + row[None, :]
        weight = tl.load(values + place, mask=live, other=0).to(x.dtype.element_ty).to(tl.float32)
        source = permuted(column, live, perm_in, PERM_IN)
        inputs = tl.load(
            x + token[:, None, None] * in_features + source[None, :, :],
            mask=(token < tokens)[:, None, None] & live[None, :, :],
            other=0,
        )
        partial += inputs.to(tl.float32) * weight[None, :, :]
    write(tl.sum(partial, axis=1), token, row, bias, store, y, tokens, out_features, BIAS, STORE)


@triton_op("padst::triton_diag", mutates_args=())
def diag_linear(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    spans: Tensor,
    perm_in: Tensor | None,
    store: Tensor | None,
    out_features: int,
) -> Tensor:
    """x `[..., in]` -> `[..., out_features]`; values `[K, min(out, in)]`, spans from `spans_of`."""
    y, in_features = empty_output(x, out_features), x.shape[-1]
    tokens = x.numel() // in_features
    if tokens == 0:
        return y
    cut = config(tokens)
    grid = (triton.cdiv(out_features, cut.ROWS) * triton.cdiv(tokens, cut.TILE),)
    x = x.contiguous()
    wrap_triton(diag_kernel)[grid](
        x=x, values=values, offsets=offsets, spans=spans, y=y,
        tokens=tokens, out_features=out_features, in_features=in_features, diagonals=offsets.shape[0],
        TALL=out_features >= in_features, **epilogue(bias, perm_in, store, x), **cut.keywords(),
    )  # fmt: skip
    return y


@diag_linear.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    spans: Tensor,
    perm_in: Tensor | None,
    store: Tensor | None,
    out_features: int,
) -> Tensor:
    del bias, values, offsets, spans, perm_in, store
    return empty_output(x, out_features)


differentiable(diag_linear)
