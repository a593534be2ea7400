"""Blocks: block-CSR times activations on tensor cores.

y[t, r] = sum over the blocks j of r's block row, over i < B: values[j, r mod B, i] x[t, perm_in[col[j] B + i]]

The blocks of a row are one long reduction of B times their number, cut into steps that may hold several blocks or part
of one. Many tokens: a program computes a whole block row for a tile of tokens, so each value is read once a tile.
Few tokens: 16 rows of a block a program, whose warps share its steps and add up in the end, so that enough reads are
under way to keep the memory busy, also where one block row is much longer than the others; every value is read once.
One token on CUDA cores, more on tensor cores padded to 16.

S transposed is block-CSR by columns: the same kernels with the blocks read in another `order`, each of them transposed.
The gradient is a product for each block: dvalues[j, a, b] = sum over t: dy[t, row[j] B + a] x[t, col[j] B + b].
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import permute, tuning
from .common import Config, epilogue, launcher, limit_of, parts_of, permuted, precision, write
from .operator import define

FEW = 16
"""Tokens up to which the weight is read by 16 rows a program; the least side of a tensor-core tile."""


def space(tokens: int, size: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """How a product may be cut for blocks of `size` and activations of `dtype`, the default first.

    Few tokens: how many values of a row are under way at once. Many: the tile of tokens, and how deep loads run ahead.
    """
    return _space(limit_of(tokens, 1, FEW, 64), size, dtype)


@functools.cache
def _space(most: int, size: int, dtype: torch.dtype) -> tuple[Config, ...]:
    if most == 1:
        steps = ((256, 4), (256, 2), (128, 4), (512, 4))
        return tuple(Config(TILE=1, ROWS=16, STEP=step, num_warps=warps, num_stages=2) for step, warps in steps)
    if most == FEW:
        if dtype is torch.float32:  # more would not fit the registers where values of 16 bits are widened
            splits: tuple[tuple[int, int], ...] = ((2, 32), (4, 32), (8, 32))
        else:
            splits = ((2, 64), (4, 64), (4, 32), (2, 128), (8, 32))
        return tuple(
            Config(TILE=16, ROWS=16, STEP=step, SPLIT=split, num_warps=split, num_stages=2) for split, step in splits
        )
    tiles: tuple[tuple[int, int, int, int], ...]
    if dtype is torch.float32:
        tiles = ((64, 32, 8, 2), (32, 32, 4, 2), (128, 16, 8, 2))
    elif most == 64:
        tiles = ((64, 64, 4, 3), (32, 64, 4, 3), (16, 64, 2, 4), (64, 32, 4, 4))
    elif size < 64:
        tiles = ((128, 32, 4, 4), (128, 64, 8, 3), (256, 32, 8, 3), (64, 64, 4, 3))
    else:  # the sums of more would not fit the registers
        tiles = ((128, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3))
    return tuple(
        Config(TILE=tile, ROWS=size, STEP=step, num_warps=warps, num_stages=stages)
        for tile, step, warps, stages in tiles
    )


def gradient_space(tokens: int, blocks: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """How the gradient may be cut, the default first: tokens at a time, parts that they are cut into.

    Few blocks are many tokens' work each: cut into parts there are programs enough.
    """
    return _gradient_space(parts_of(tokens, blocks), dtype)


@functools.cache
def _gradient_space(split: int, dtype: torch.dtype) -> tuple[Config, ...]:
    tiles = ((16, 4), (32, 4)) if dtype is torch.float32 else ((64, 4), (32, 4), (128, 8))
    splits = dict.fromkeys((split, 2 * split, max(split // 2, 1)))
    return tuple(
        Config(TILE=tile, SPLIT=each, num_warps=warps, num_stages=3) for each in splits for tile, warps in tiles
    )


@triton.jit
def columns_of(entry, end, col_indices, in_features, SIZE: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of the entries of a block row, and whether there are any; runs of `RUN` (if not 0) have no gap."""
    column = tl.load(col_indices + entry // SIZE, mask=entry < end, other=0) * SIZE + entry % SIZE
    if RUN > 0:
        column = tl.multiple_of(tl.max_contiguous(column, RUN), RUN)
    return column, (entry < end) & (column < in_features)


@triton.jit
def place_of(entry, end, row, order, SIZE: tl.constexpr, TRANSPOSED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the values of these entries and rows lie; `entry` and `row` broadcast against each other."""
    number = entry // SIZE
    if TRANSPOSED:
        number = tl.load(order + number, mask=entry < end, other=0)
        return number.to(tl.int64) * (SIZE * SIZE) + entry % SIZE * SIZE + row % SIZE
    else:
        return number.to(tl.int64) * (SIZE * SIZE) + entry % SIZE + row % SIZE * SIZE


@triton.jit
def block_kernel(  # type: ignore[no-untyped-def]
    x, values, row_offsets, col_indices, order, perm_in, store, bias, y, tokens, out_features, in_features,
    SIZE: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PERM_IN: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile; programs of one tile of tokens are neighbours, so that its inputs stay in the cache."""
    RUN: tl.constexpr = min(STEP, SIZE)
    parts = tl.cdiv(out_features, ROWS)
    part = tl.program_id(0) % parts
    token = (tl.program_id(0) // parts).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = part * ROWS + tl.arange(0, ROWS)
    begin = tl.load(row_offsets + part * ROWS // SIZE) * SIZE
    end = tl.load(row_offsets + part * ROWS // SIZE + 1) * SIZE
    total = tl.zeros((TILE, ROWS), dtype=tl.float32)
    for start in range(begin, end, STEP):
        entry = start + tl.arange(0, STEP)
        column, live = columns_of(entry, end, col_indices, in_features, SIZE, RUN)
        source = permuted(column, live, perm_in, PERM_IN)
        inputs = tl.load(
            x + token[:, None] * in_features + source[None, :], mask=(token < tokens)[:, None] & live[None, :], other=0
        )
        place = place_of(entry[:, None], end, row[None, :], order, SIZE, TRANSPOSED)
        weight = tl.load(values + place, mask=(entry < end)[:, None], other=0)
        total = tl.dot(inputs, weight.to(inputs.dtype), total, input_precision=PRECISION)
    write(total, token, row, bias, store, y, tokens, out_features, BIAS, STORE, ACTIVATION)


@triton.jit
def few_kernel(  # type: ignore[no-untyped-def]
    x, values, row_offsets, col_indices, order, perm_in, store, bias, y, tokens, out_features, in_features,
    SIZE: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr, PERM_IN: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """16 rows for a tile of tokens: `SPLIT` steps at once on tensor cores, or one token on CUDA cores where it is 0."""
    part = tl.program_id(0)
    token = tl.arange(0, TILE).to(tl.int64)
    row = part * ROWS + tl.arange(0, ROWS)
    begin = tl.load(row_offsets + part * ROWS // SIZE)
    end = tl.load(row_offsets + part * ROWS // SIZE + 1)
    if SPLIT == 0:
        # Blocks have an axis of their own, so that what is read once a block is not read for each of its columns.
        BLOCKS: tl.constexpr = STEP // SIZE
        inner = tl.arange(0, SIZE)
        products = tl.zeros((ROWS, BLOCKS, SIZE), dtype=tl.float32)
        for start in range(begin, end, BLOCKS):
            number = start + tl.arange(0, BLOCKS)
            live = number < end
            stored = number
            if TRANSPOSED:
                stored = tl.load(order + number, mask=live, other=0)
            place = stored.to(tl.int64)[None, :, None] * (SIZE * SIZE)
            if TRANSPOSED:
                place += inner[None, None, :] * SIZE + (row % SIZE)[:, None, None]
            else:
                place += (row % SIZE)[:, None, None] * SIZE + inner[None, None, :]
            weight = tl.load(values + place, mask=live[None, :, None], other=0)
            column = tl.load(col_indices + number, mask=live, other=0)[:, None] * SIZE + inner[None, :]
            inside = live[:, None] & (column < in_features)
            inputs = tl.load(x + permuted(column, inside, perm_in, PERM_IN), mask=inside, other=0)
            products += weight.to(inputs.dtype).to(tl.float32) * inputs.to(tl.float32)[None, :, :]
        total = tl.sum(tl.sum(products, axis=2), axis=1)[None, :]
    else:
        sums = tl.zeros((SPLIT, TILE, ROWS), dtype=tl.float32)
        end *= SIZE
        for start in range(begin * SIZE, end, SPLIT * STEP):
            head = start + tl.arange(0, SPLIT) * STEP
            entry = head[:, None] + tl.arange(0, STEP)[None, :]
            if STEP <= SIZE:
                column = tl.load(col_indices + head // SIZE, mask=head < end, other=0) * SIZE + head % SIZE
                column = column[:, None] + tl.arange(0, STEP)[None, :]
                live = (head < end)[:, None] & (column < in_features)
            else:
                column, live = columns_of(entry, end, col_indices, in_features, SIZE, 0)
            source = permuted(column, live, perm_in, PERM_IN)
            inputs = tl.load(
                x + token[None, :, None] * in_features + source[:, None, :],
                mask=(token < tokens)[None, :, None] & live[:, None, :],
                other=0,
            )
            place = place_of(entry[:, :, None], end, row[None, None, :], order, SIZE, TRANSPOSED)
            weight = tl.load(values + place, mask=(entry < end)[:, :, None], other=0)
            sums = tl.dot(inputs, weight.to(inputs.dtype), sums, input_precision=PRECISION)
        total = tl.sum(sums, axis=0)
    write(total, token, row, bias, store, y, tokens, out_features, BIAS, STORE, ACTIVATION)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    x, dy, found, col_indices, row_indices, order, tokens, out_features, in_features, blocks,
    SIZE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one block from one part of the tokens; found `[SPLIT, blocks, B, B]`."""
    turn = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks
    number = tl.load(order + turn)
    row = tl.load(row_indices + turn) * SIZE + tl.arange(0, SIZE)
    column = tl.load(col_indices + number) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for start in range(part * TILE, tokens, SPLIT * TILE):
        token = start + tl.arange(0, TILE).to(tl.int64)
        live = (token < tokens)[:, None]
        outputs = tl.load(
            dy + token[:, None] * out_features + row[None, :], mask=live & (row < out_features)[None, :], other=0
        )
        inputs = tl.load(
            x + token[:, None] * in_features + column[None, :], mask=live & (column < in_features)[None, :], other=0
        )
        total = tl.dot(tl.trans(outputs), inputs, total, input_precision=PRECISION)
    first = (part.to(tl.int64) * blocks + number) * (SIZE * SIZE)
    inner = tl.arange(0, SIZE)
    tl.store(found + first + inner[:, None] * SIZE + inner[None, :], total)


def transposed_index(row_offsets: Tensor, col_indices: Tensor, block_columns: int) -> list[Tensor]:
    """Block-CSR by columns: column_offsets int32 `[block columns + 1]`, row_indices and order int32 `[count]`.

    `order` are the numbers of the blocks, by column and ascending within a column.
    """
    order = torch.argsort(col_indices, stable=True)
    numbers = torch.arange(len(row_offsets) - 1, dtype=torch.int32, device=col_indices.device)
    rows = numbers.repeat_interleave(row_offsets.diff(), output_size=len(col_indices))
    columns = torch.arange(block_columns + 1, dtype=torch.int32, device=col_indices.device)
    column_offsets = torch.searchsorted(col_indices[order], columns, out_int32=True)
    return [column_offsets, rows[order].contiguous(), order.to(torch.int32)]


class _Block:
    """`index` is row_offsets, col_indices, and what `transposed_index` gives; the one parameter is B."""

    NAME = "block"

    @staticmethod
    def launch(
        x: Tensor, bias: Tensor | None, values: Tensor, index: list[Tensor], perm_in: Tensor | None,
        store: Tensor | None, y: Tensor, parameters: list[int], transposed: bool, activation: str,
    ) -> None:  # fmt: skip
        row_offsets, col_indices, column_offsets, row_indices, order = index
        in_features, out_features, (size,) = x.shape[-1], y.shape[-1], parameters
        tokens = x.numel() // in_features
        x, perm_in = permute.ahead(x, perm_in, tokens * values.numel() // FEW)
        name = "block transposed" if transposed else "block"
        cut = tuning.tuned(name, space(tokens, size, x.dtype), tokens, x, values, out_features)
        kernel, tiles = (few_kernel, 1) if tokens <= FEW else (block_kernel, triton.cdiv(tokens, cut.TILE))
        more = {"SPLIT": cut.SPLIT} if tokens <= FEW else {}
        launcher(kernel, x)[(triton.cdiv(out_features, cut.ROWS) * tiles,)](
            x=x, values=values, y=y, order=order,
            row_offsets=column_offsets if transposed else row_offsets,
            col_indices=row_indices if transposed else col_indices,
            tokens=tokens, out_features=out_features, in_features=in_features,
            SIZE=size, TRANSPOSED=transposed, PRECISION=precision(x.dtype),
            **epilogue(bias, perm_in, store, x, activation), **{**more, **cut.keywords()},
        )  # fmt: skip

    @staticmethod
    def launch_gradient(x: Tensor, dy: Tensor, values: Tensor, index: list[Tensor], parameters: list[int]) -> Tensor:
        _, col_indices, _, row_indices, order = index
        blocks, (size,), tokens = len(col_indices), parameters, x.numel() // x.shape[-1]
        cuts = gradient_space(tokens, blocks, x.dtype)
        cut = tuning.tuned("block gradient", cuts, tokens, x, values, dy.shape[-1])
        found = torch.empty((cut.SPLIT, *values.shape), dtype=torch.float32, device=x.device)
        launcher(gradient_kernel, x)[(blocks * cut.SPLIT,)](
            x=x, dy=dy, found=found, col_indices=col_indices, row_indices=row_indices, order=order,
            tokens=tokens, out_features=dy.shape[-1], in_features=x.shape[-1], blocks=blocks,
            SIZE=size, PRECISION=precision(x.dtype), **cut.keywords(),
        )  # fmt: skip
        return found[0] if cut.SPLIT == 1 else found.sum(dim=0)


block_linear, block_gradient = define(_Block)
