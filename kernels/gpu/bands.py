"""Bands of neighbouring diagonals as dense tiles on tensor cores, for many tokens.

A band is a run of B diagonals whose first offset o is a multiple of B; B is 16, 32 or 64. In a tile of B rows it covers
a parallelogram: B neighbouring columns in every row, one further with each row, 2 B columns in all. Modulo B each row
has every column once, so the parallelogram folds into a full B x B tile with two triangles, one for each half of the
columns:

y[t, r] = sum over bands, over m < B: tile[r mod B, m] x[t, c + m + (0 or B)]

with c = r0 - o - B for out >= in and c = r0 + o for out < in, r0 being the first row of the tile; columns wrap around
at max(out, in). The tiles are made anew in each call: a copy of the values that costs two passes over them and is
freed after it, so that nothing is resident beside the packed tensors. Twice the multiply-adds of the values are
computed, and each input that is read is used for B of them, half of which count.

The gradient is the same backwards: the two products of a tile are folded, unsheared and stored.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rules, tuning
from .common import Config, epilogue, launcher, limit_of, parts_of, permuted, precision, write

ROWS_OF_SPAN = 64


def side(band: int, dtype: torch.dtype) -> int:
    """B for runs of `band` diagonals, 0 where they make no tiles; float32 in full has registers for 16 only."""
    size = rules.band_side(band)
    return min(size, rules.BAND_SIDES[-1]) if dtype is torch.float32 else size


def space(tokens: int, size: int, dtype: torch.dtype, roomy: bool) -> tuple[Config, ...]:
    """How a product may be cut for bands of `size`, the default first: the tile of tokens, how deep loads run ahead.

    `roomy`: registers need not hold operands (`tuning.shares_operands`).
    """
    return _space(limit_of(tokens, 64), size, dtype, roomy)


@functools.cache
def _space(most: int, size: int, dtype: torch.dtype, roomy: bool) -> tuple[Config, ...]:
    tiles: tuple[tuple[int, int, int], ...]
    if dtype is torch.float32:
        tiles = ((64, 4, 2), (32, 4, 2), (128, 8, 2)) if roomy else ((32, 4, 2), (16, 4, 2))
    elif size > 16 and not roomy:
        tiles = ((64, 8, 3), (64, 8, 2), (32, 4, 3))
    elif most == 64:
        tiles = ((64, 4, 3), (32, 4, 3), (16, 2, 4))
    elif size < 64:
        tiles = ((128, 4, 3), (128, 4, 2), *(((256, 8, 2),) if roomy else ()), (64, 4, 3))
    else:  # the sums of more would not fit the registers
        tiles = ((128, 8, 3), (128, 8, 2), (64, 4, 3))
    return tuple(Config(TILE=tile, ROWS=size, num_warps=warps, num_stages=stages) for tile, warps, stages in tiles)


def gradient_space(tokens: int, tiles: int, size: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """How the gradient may be cut, the default first: tokens at a time, parts that they are cut into."""
    return _gradient_space(parts_of(tokens, tiles), size, dtype)


@functools.cache
def _gradient_space(split: int, size: int, dtype: torch.dtype) -> tuple[Config, ...]:
    cuts = ((32, 4), (16, 4)) if dtype is torch.float32 else ((64, 4), (32, 4), (32, 8))
    splits = dict.fromkeys((split, 2 * split, max(split // 2, 1)))
    return tuple(
        Config(TILE=tile, ROWS=size, SPLIT=each, num_warps=warps, num_stages=2)
        for each in splits
        for tile, warps in cuts
    )


@triton.jit
def column_of(first, step, wrap, TALL: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns `first` + `step`, wrapped around; where sizes are multiples of 16, so are the places where they wrap."""
    column = first + step
    if TALL:
        column = tl.where(column < 0, column + wrap, column)
    else:
        column = tl.where(column >= wrap, column - wrap, column)
    if EVEN:
        column = tl.multiple_of(tl.max_contiguous(column, 16), 16)
    return column


@triton.jit
def stored(first_row, offset, out_features, in_features, TALL: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the values of a band's tile lie along its diagonals, and which there are; `[k, m]`.

    k is the diagonal within the band; m, modulo B, the column where out >= in, else the row.
    """
    k = tl.arange(0, SIZE)[:, None]
    m = tl.arange(0, SIZE)[None, :]
    if TALL:
        row = (m + k) % SIZE
        column = column_of(first_row - offset - SIZE, tl.where(m > row, m, m + SIZE), out_features, TALL, False)
        return column, (column < in_features) & (first_row + row < out_features)
    else:
        return first_row + m + 0 * k, (first_row + m + 0 * k) < out_features


@triton.jit
def tile_kernel(  # type: ignore[no-untyped-def]
    values, offsets, tiles, out_features, in_features, slots, TALL: tl.constexpr, SIZE: tl.constexpr
):
    """Fold one tile of one band; tiles `[bands, slots, B, B]`, the second of which along the memory of the values."""
    slot = tl.program_id(0) % slots
    band = tl.program_id(0) // slots
    offset = tl.load(offsets + band * SIZE)
    part = slot
    if TALL:
        part = (offset // SIZE + slot) % tl.cdiv(out_features, SIZE)
    place, live = stored(part * SIZE, offset, out_features, in_features, TALL, SIZE)
    k = tl.arange(0, SIZE)[:, None]
    m = tl.arange(0, SIZE)[None, :]
    length = min(out_features, in_features)
    diagonals = tl.load(values + (band * SIZE + k).to(tl.int64) * length + place, mask=live, other=0)
    folded = tl.gather(diagonals, (k - m + SIZE) % SIZE, 0)
    tl.store(tiles + tl.program_id(0).to(tl.int64) * (SIZE * SIZE) + k * SIZE + m, folded)


@triton.jit
def band_kernel(  # type: ignore[no-untyped-def]
    x, tiles, offsets, spans, perm_in, store, bias, y, tokens, out_features, in_features, bands, slots,
    TALL: tl.constexpr, EVEN: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    PERM_IN: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """B rows for a tile of tokens; programs of one tile of tokens are neighbours."""
    parts = tl.cdiv(out_features, ROWS)
    part = tl.program_id(0) % parts
    token = (tl.program_id(0) // parts).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = (token < tokens)[:, None]
    wrap = max(out_features, in_features)
    inner = tl.arange(0, ROWS)
    if TALL:
        first_half = inner[:, None] > inner[None, :]
        begin = tl.load(spans + part * ROWS // SPAN * 2) // ROWS
        end = min(tl.cdiv(tl.load(spans + part * ROWS // SPAN * 2 + 1), ROWS), begin + bands)
    else:
        first_half = inner[:, None] >= inner[None, :]
        begin = 0
        end = bands
    total = tl.zeros((TILE, ROWS), dtype=tl.float32)
    for turn in range(begin, end):
        band = turn % bands
        offset = tl.load(offsets + band * ROWS)
        slot = part
        first = part * ROWS + offset
        if TALL:
            slot = part - offset // ROWS
            slot = tl.where(slot < 0, slot + parts, slot)
            first = part * ROWS - offset - ROWS
        tile = tiles + (band.to(tl.int64) * slots + slot) * (ROWS * ROWS)
        if TALL:
            tile += inner[None, :] * ROWS + inner[:, None]
        else:
            tile += inner[:, None] * ROWS + inner[None, :]
        weight = tl.load(tile, mask=(slot + 0 * inner < slots)[:, None], other=0).to(x.dtype.element_ty)
        low = column_of(first, inner, wrap, TALL, EVEN)
        live = low < in_features
        source = permuted(low, live, perm_in, PERM_IN)
        inputs = tl.load(x + token[:, None] * in_features + source[None, :], mask=here & live[None, :], other=0)
        total = tl.dot(inputs, tl.where(first_half, weight, 0), total, input_precision=PRECISION)
        high = column_of(first, inner + ROWS, wrap, TALL, EVEN)
        live = high < in_features
        source = permuted(high, live, perm_in, PERM_IN)
        inputs = tl.load(x + token[:, None] * in_features + source[None, :], mask=here & live[None, :], other=0)
        total = tl.dot(inputs, tl.where(first_half, 0, weight), total, input_precision=PRECISION)
    row = part * ROWS + inner
    write(total, token, row, bias, store, y, tokens, out_features, BIAS, STORE, ACTIVATION)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    x, dy, offsets, found, tokens, out_features, in_features, bands, slots,
    TALL: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile's values from one part of the tokens; found `[SPLIT, K, min(out, in)]`."""
    slot = tl.program_id(0) % slots
    band = tl.program_id(0) // slots % bands
    split = tl.program_id(0) // slots // bands
    offset = tl.load(offsets + band * ROWS)
    inner = tl.arange(0, ROWS)
    wrap = max(out_features, in_features)
    part = slot
    first = slot * ROWS + offset
    if TALL:
        part = (offset // ROWS + slot) % tl.cdiv(out_features, ROWS)
        first = part * ROWS - offset - ROWS
    row = part * ROWS + inner
    low = column_of(first, inner, wrap, TALL, EVEN)
    high = column_of(first, inner + ROWS, wrap, TALL, EVEN)
    one = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    other = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    for start in range(split * TILE, tokens, SPLIT * TILE):
        token = start + tl.arange(0, TILE).to(tl.int64)
        here = (token < tokens)[:, None]
        from_row = token[:, None] * in_features
        outputs = tl.load(
            dy + token[:, None] * out_features + row[None, :], mask=here & (row < out_features)[None, :], other=0
        )
        lower = tl.load(x + from_row + low[None, :], mask=here & (low < in_features)[None, :], other=0)
        upper = tl.load(x + from_row + high[None, :], mask=here & (high < in_features)[None, :], other=0)
        if TALL:
            one = tl.dot(tl.trans(outputs), lower, one, input_precision=PRECISION)
            other = tl.dot(tl.trans(outputs), upper, other, input_precision=PRECISION)
        else:
            one = tl.dot(tl.trans(lower), outputs, one, input_precision=PRECISION)
            other = tl.dot(tl.trans(upper), outputs, other, input_precision=PRECISION)
    if TALL:
        folded = tl.where(inner[None, :] > inner[:, None], one, other)
    else:
        folded = tl.where(inner[:, None] >= inner[None, :], one, other)
    diagonals = tl.gather(folded, (inner[:, None] + inner[None, :]) % ROWS, 0)
    place, live = stored(part * ROWS, offset, out_features, in_features, TALL, ROWS)
    length = min(out_features, in_features)
    first_diagonal = (split.to(tl.int64) * bands + band) * ROWS
    tl.store(found + (first_diagonal + inner[:, None]) * length + place, diagonals, mask=live)


def _slots(out_features: int, in_features: int, tall: bool, size: int) -> int:
    """The most tiles of rows that a band meets: its in + B - 1 rows may begin anew at row 0, out of step with tiles."""
    tiles = triton.cdiv(out_features, size)
    return min(tiles, (in_features + 3 * size - 3) // size) if tall else tiles


def launch(
    x: Tensor, bias: Tensor | None, values: Tensor, index: list[Tensor], perm_in: Tensor | None, store: Tensor | None,
    y: Tensor, size: int, tall: bool, activation: str,
) -> None:  # fmt: skip
    """Write y; `index` is offsets and spans, `tall` whether S as it is multiplied counts its offsets along rows."""
    offsets, spans = index
    in_features, out_features = x.shape[-1], y.shape[-1]
    tokens, bands, slots = x.numel() // in_features, len(offsets) // size, _slots(out_features, in_features, tall, size)
    shape = {"out_features": out_features, "in_features": in_features, "slots": slots}
    tiles = torch.empty((bands, slots, size, size), dtype=values.dtype, device=x.device)
    launcher(tile_kernel, x)[(bands * slots,)](
        values=values, offsets=offsets, tiles=tiles, TALL=tall, SIZE=size, num_warps=4, **shape
    )
    cuts = space(tokens, size, x.dtype, tuning.shares_operands(x.device))
    cut = tuning.tuned("bands", cuts, tokens, x, values, out_features)
    launcher(band_kernel, x)[(triton.cdiv(out_features, size) * triton.cdiv(tokens, cut.TILE),)](
        x=x, tiles=tiles, offsets=offsets, spans=spans, y=y, tokens=tokens, bands=bands,
        TALL=tall, EVEN=max(in_features, out_features) % 16 == 0, SPAN=ROWS_OF_SPAN, PRECISION=precision(x.dtype),
        **shape, **epilogue(bias, perm_in, store, x, activation), **cut.keywords(),
    )  # fmt: skip


def launch_gradient(x: Tensor, dy: Tensor, values: Tensor, offsets: Tensor, size: int, tall: bool) -> Tensor:
    """The gradient of the values, float32 `[K, min(out, in)]`."""
    in_features, out_features = x.shape[-1], dy.shape[-1]
    tokens, bands, slots = x.numel() // in_features, len(offsets) // size, _slots(out_features, in_features, tall, size)
    cuts = gradient_space(tokens, bands * slots, size, x.dtype)
    cut = tuning.tuned("bands gradient", cuts, tokens, x, values, out_features)
    found = torch.empty((cut.SPLIT, *values.shape), dtype=torch.float32, device=x.device)
    launcher(gradient_kernel, x)[(bands * slots * cut.SPLIT,)](
        x=x, dy=dy, offsets=offsets, found=found, tokens=tokens, out_features=out_features, in_features=in_features,
        bands=bands, slots=slots, TALL=tall, EVEN=max(in_features, out_features) % 16 == 0,
        PRECISION=precision(x.dtype), **cut.keywords(),
    )  # fmt: skip
    return found[0] if cut.SPLIT == 1 else found.sum(dim=0)
