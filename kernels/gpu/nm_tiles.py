"""N:M as dense tiles on tensor cores, for many tokens: what leaves memory is packed, what is multiplied is not.

A tile W[r, c] is made of the N slots of the group of c: the value of the slot whose index is c mod M, 0 where none is.
No scatter is needed, every entry looks for itself. The arithmetic is that of the dense product, so this gains where
reading the weight costs more than multiplying; the same tiles serve S and S transposed.

The gradient is the dense one, tile by tile, of which every slot picks its own entry: it is never stored densely.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import MANY, Config, epilogue, launcher, limit_of, parts_of, permuted, precision, write


def space(tokens: int, dtype: torch.dtype, n: int) -> tuple[Config, ...]:
    """How a product may be cut for groups of `n` values, the default first.

    The larger the tile of tokens, the rarer a weight is unpacked; the more values in a group, the more registers that
    takes.
    """
    return _space(limit_of(tokens, 16, 64), dtype, limit_of(n, 4, 8))


@functools.cache
def _space(most: int, dtype: torch.dtype, values: int) -> tuple[Config, ...]:
    tiles: tuple[tuple[int, ...], ...]
    if dtype is torch.float32:
        tiles = ((32, 64, 16, 4, 2), (32, 32, 16, 4, 2))
    elif most == 16 and values != 4:
        tiles = ((16, 16, 64, 4, 2), (16, 16, 32, 4, 2))
    elif most == 16:
        tiles = ((16, 16, 128, 4, 2), (16, 32, 64, 8, 2), (16, 16, 64, 2, 2))
    elif values == MANY or (most == 64 and values != 4):
        tiles = ((64, 32, 32, 8, 2), (64, 16, 32, 4, 2))
    elif most == 64:
        tiles = ((64, 32, 64, 8, 2), (64, 64, 32, 8, 2), (32, 32, 32, 4, 2))
    elif values != 4:
        tiles = ((64, 64, 32, 8, 2), (128, 32, 32, 8, 2))
    else:  # every permuted input of a tile has an address of its own: larger ones would not fit the registers
        tiles = ((128, 64, 32, 8, 2), (64, 128, 32, 8, 2), (64, 64, 32, 8, 2))
    return tuple(
        Config(TILE=tile, ROWS=rows, STEP=step, num_warps=warps, num_stages=stages)
        for tile, rows, step, warps, stages in tiles
    )


def gradient_space(tokens: int, tiles: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """How the gradient may be cut, the default first, for `tiles` tiles of 64 x 64: tokens at a time, their parts."""
    return _gradient_space(parts_of(tokens, tiles), dtype)


@functools.cache
def _gradient_space(split: int, dtype: torch.dtype) -> tuple[Config, ...]:
    cuts = ((16, 8), (32, 8)) if dtype is torch.float32 else ((64, 8), (32, 8), (128, 8))
    return tuple(
        Config(TILE=tile, ROWS=64, STEP=64, SPLIT=each, num_warps=warps, num_stages=2)
        for each in dict.fromkeys((split, 2 * split))
        for tile, warps in cuts
    )


@triton.jit
def matches(  # type: ignore[no-untyped-def]
    indices, row, column, slot, live, index_bytes, M: tl.constexpr, BITS: tl.constexpr
):
    """Whether the index of a row's slot is that of a column in its group; all broadcast to a tile."""
    packed = tl.load(indices + row.to(tl.int64) * index_bytes + slot * BITS // 8, mask=live, other=0).to(tl.int32)
    return ((packed >> (slot * BITS % 8)) & ((1 << BITS) - 1)) == column % M


@triton.jit
def unpacked(  # type: ignore[no-untyped-def]
    values, indices, row, column, live, slots, index_bytes,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """W `SHAPE` for rows and columns that broadcast to it; slots that a short last group leaves unused hold 0."""
    weight = tl.zeros(SHAPE, dtype=values.dtype.element_ty)
    for turn in tl.static_range(N):
        slot = column // M * N + turn
        value = tl.load(values + row.to(tl.int64) * slots + slot, mask=live, other=0)
        weight += tl.where(matches(indices, row, column, slot, live, index_bytes, M, BITS), value, 0)
    return weight


@triton.jit
def tile_kernel(  # type: ignore[no-untyped-def]
    x, values, indices, perm_in, store, bias, y, tokens, out_features, in_features, slots, index_bytes,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PERM_IN: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y, `STEP` inputs at a time; with S transposed inputs are its rows, outputs its columns."""
    parts = tl.cdiv(out_features, ROWS)
    part = tl.program_id(0) % parts
    token = (tl.program_id(0) // parts).to(tl.int64) * TILE + tl.arange(0, TILE)
    output = part * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((TILE, ROWS), dtype=tl.float32)
    for start in range(0, in_features, STEP):
        feature = start + tl.arange(0, STEP)
        inside = feature < in_features
        source = permuted(feature, inside, perm_in, PERM_IN)
        inputs = tl.load(
            x + token[:, None] * in_features + source[None, :],
            mask=(token < tokens)[:, None] & inside[None, :],
            other=0,
        )
        live = inside[:, None] & (output < out_features)[None, :]
        if TRANSPOSED:
            row, column = feature[:, None], output[None, :]
        else:
            row, column = output[None, :], feature[:, None]
        weight = unpacked(values, indices, row, column, live, slots, index_bytes, N, M, BITS, (STEP, ROWS))
        total = tl.dot(inputs, weight.to(inputs.dtype), total, input_precision=PRECISION)
    write(total, token, output, bias, store, y, tokens, out_features, BIAS, STORE, ACTIVATION)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    x, dy, indices, found, tokens, out_features, in_features, slots, index_bytes,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows by `STEP` columns from one part of the tokens; found `[SPLIT, out, slots]`, zero where unused."""
    parts = tl.cdiv(in_features, STEP)
    tiles = parts * tl.cdiv(out_features, ROWS)
    split = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles // parts * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % parts * STEP + tl.arange(0, STEP)
    total = tl.zeros((ROWS, STEP), dtype=tl.float32)
    for start in range(split * TILE, tokens, SPLIT * TILE):
        token = start + tl.arange(0, TILE).to(tl.int64)
        here = (token < tokens)[:, None]
        outputs = tl.load(
            dy + token[:, None] * out_features + row[None, :], mask=here & (row < out_features)[None, :], other=0
        )
        inputs = tl.load(
            x + token[:, None] * in_features + column[None, :], mask=here & (column < in_features)[None, :], other=0
        )
        total = tl.dot(tl.trans(outputs), inputs, total, input_precision=PRECISION)
    first = split.to(tl.int64) * out_features * slots
    wide = column[None, :] + 0 * row[:, None]
    live = (row < out_features)[:, None] & (column < in_features)[None, :]
    for turn in tl.static_range(N):
        slot = wide // M * N + turn
        used = live & (turn < in_features - wide // M * M)
        mine = used & matches(indices, row[:, None], wide, slot, live, index_bytes, M, BITS)
        tl.store(found + first + row.to(tl.int64)[:, None] * slots + slot, total, mask=mine)


def launch(
    x: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, perm_in: Tensor | None, store: Tensor | None,
    y: Tensor, group: dict[str, int], transposed: bool, activation: str,
) -> None:  # fmt: skip
    """Write y; `group` has N, M and BITS."""
    in_features, out_features = x.shape[-1], y.shape[-1]
    tokens = x.numel() // in_features
    name = "nm tiles transposed" if transposed else "nm tiles"
    cut = tuning.tuned(name, space(tokens, x.dtype, group["N"]), tokens, x, values, out_features)
    launcher(tile_kernel, x)[(triton.cdiv(out_features, cut.ROWS) * triton.cdiv(tokens, cut.TILE),)](
        x=x, values=values, indices=indices, y=y, tokens=tokens, out_features=out_features, in_features=in_features,
        slots=values.shape[1] * values.shape[2], index_bytes=indices.shape[1], TRANSPOSED=transposed,
        PRECISION=precision(x.dtype), **group, **epilogue(bias, perm_in, store, x, activation), **cut.keywords(),
    )  # fmt: skip


def launch_gradient(x: Tensor, dy: Tensor, values: Tensor, indices: Tensor, group: dict[str, int]) -> Tensor:
    """The gradient of the values, float32 and in their shape."""
    in_features, out_features = x.shape[-1], dy.shape[-1]
    tokens = x.numel() // in_features
    cuts = gradient_space(tokens, triton.cdiv(out_features, 64) * triton.cdiv(in_features, 64), x.dtype)
    cut = tuning.tuned("nm gradient", cuts, tokens, x, values, out_features)
    tiles = triton.cdiv(out_features, cut.ROWS) * triton.cdiv(in_features, cut.STEP)
    found = torch.zeros((cut.SPLIT, *values.shape), dtype=torch.float32, device=x.device)
    launcher(gradient_kernel, x)[(tiles * cut.SPLIT,)](
        x=x, dy=dy, indices=indices, found=found, tokens=tokens, out_features=out_features, in_features=in_features,
        slots=values.shape[1] * values.shape[2], index_bytes=indices.shape[1],
        PRECISION=precision(x.dtype), **group, **cut.keywords(),
    )  # fmt: skip
    return found[0] if cut.SPLIT == 1 else found.sum(dim=0)
