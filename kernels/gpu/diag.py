"""Diagonals on CUDA cores, for tokens so few that reading the weight is what costs; bands take bands.py beyond them.

out >= in: y[t, r] = sum over k with i = (r - o_k) mod out < in: values[k, i] x[t, perm_in[i]]
out < in: y[t, r] = sum over k: values[k, r] x[t, perm_in[(r + o_k) mod in]]

Each form is the other one's transpose, with the same offsets and values. A program computes neighbouring rows
for a tile of tokens: along a diagonal these are neighbouring values, so every value is read once a tile, coalesced, and
used for all its tokens. `STEP` diagonals are summed side by side and added up at the end. Where out > in only some
diagonals meet a range of rows; as offsets ascend these follow on each other (from the last on to the first), and
`spans` says where they begin and end.

The gradient: dvalues[k, i] = sum over t: dy[t, r] x[t, c] with (r, c) the place of entry i on diagonal k.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bands, tuning
from .common import MANY, Config, epilogue, launcher, limit_of, permuted, write
from .operator import define

ROWS = bands.ROWS_OF_SPAN
"""Rows of a span, and the most of a program."""

FEW = 16
"""Tokens up to which bands, too, run on CUDA cores."""


def space(tokens: int) -> tuple[Config, ...]:
    """How a product may be cut, the default first: rows, diagonals side by side, warps."""
    return _space(limit_of(tokens, 1, 4))


@functools.cache
def _space(most: int) -> tuple[Config, ...]:
    cuts: tuple[tuple[int, int, int], ...] = ((64, 4, 4), (64, 2, 4), (64, 8, 8), (64, 4, 8))
    if most != MANY:
        cuts = ((16, 64, 4), (32, 64, 8), (64, 16, 4), (64, 32, 8), (16, 32, 2))
    return tuple(
        Config(TILE=most or 16, ROWS=rows, STEP=step, num_warps=warps, num_stages=2) for rows, step, warps in cuts
    )


@functools.cache
def gradient_space() -> tuple[Config, ...]:
    """How the gradient may be cut, the default first: diagonals side by side, tokens at a time."""
    cuts = ((8, 4), (16, 2), (4, 8), (8, 2))
    return tuple(Config(TILE=tile, ROWS=ROWS, STEP=step, num_warps=4, num_stages=2) for step, tile in cuts)


def spans_of(offsets: Tensor, out_features: int, in_features: int) -> Tensor:
    """Of every `ROWS` rows the number of the first diagonal that meets them and of that behind the last.

    For out >= in; where it is less, those of the transpose. Numbers go on past K where the diagonals start over. int32
    `[ceil(max(out, in) / ROWS), 2]`; offsets int32 `[K]` ascending.
    """
    count, rows, length = len(offsets), max(out_features, in_features), min(out_features, in_features)
    first_row = torch.arange(0, rows, ROWS, device=offsets.device)
    # Row r meets offset o where r - in < o <= r, counted modulo out; one turn more keeps that above zero.
    turns = torch.cat([offsets.long() + turn * rows for turn in range(3)])
    begin = torch.searchsorted(turns, first_row + rows - length, right=True)
    end = torch.searchsorted(turns, first_row + rows + ROWS - 1, right=True)
    return torch.stack([begin, torch.minimum(end, begin + count)], dim=1).to(torch.int32)


@triton.jit
def diag_kernel(  # type: ignore[no-untyped-def]
    x, values, offsets, spans, perm_in, store, bias, y, tokens, out_features, in_features, diagonals,
    TALL: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PERM_IN: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One tile; programs of one tile of tokens are neighbours, so that its inputs stay in the cache."""
    parts = tl.cdiv(out_features, ROWS)
    part = tl.program_id(0) % parts
    token = (tl.program_id(0) // parts).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = part * ROWS + tl.arange(0, ROWS)
    begin = 0
    end = diagonals
    if TALL:
        begin = tl.load(spans + part * ROWS // SPAN * 2)
        end = tl.load(spans + part * ROWS // SPAN * 2 + 1)
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
    write(tl.sum(partial, axis=1), token, row, bias, store, y, tokens, out_features, BIAS, STORE, ACTIVATION)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    x, dy, offsets, found, tokens, long_features, short_features, diagonals,
    TILE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """`STEP` diagonals by `ROWS` entries; x is the activation of the shorter side, dy that of the longer."""
    parts = tl.cdiv(short_features, ROWS)
    entry = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    number = tl.program_id(0) // parts * STEP + tl.arange(0, STEP)
    inside = entry < short_features
    live = (number < diagonals)[:, None] & inside[None, :]
    far = entry[None, :] + tl.load(offsets + number, mask=number < diagonals, other=0)[:, None]
    far = tl.where(far >= long_features, far - long_features, far)
    total = tl.zeros((STEP, ROWS), dtype=tl.float32)
    for start in range(0, tokens, TILE):
        token = start + tl.arange(0, TILE).to(tl.int64)
        here = token < tokens
        near = tl.load(
            x + token[:, None] * short_features + entry[None, :], mask=here[:, None] & inside[None, :], other=0
        )
        across = tl.load(
            dy + token[:, None, None] * long_features + far[None, :, :],
            mask=here[:, None, None] & live[None, :, :],
            other=0,
        )
        total += tl.sum(near.to(tl.float32)[:, None, :] * across.to(tl.float32), axis=0)
    tl.store(found + number.to(tl.int64)[:, None] * short_features + entry[None, :], total, mask=live)


class _Diag:
    """`index` is offsets and spans, the one parameter the length of the runs that offsets come in."""

    NAME = "diag"

    @staticmethod
    def reads(values: Tensor) -> int:
        return values.numel()

    @staticmethod
    def launch(
        x: Tensor, bias: Tensor | None, values: Tensor, index: list[Tensor], perm_in: Tensor | None,
        store: Tensor | None, y: Tensor, parameters: list[int], transposed: bool, activation: str,
    ) -> None:  # fmt: skip
        in_features, out_features = x.shape[-1], y.shape[-1]
        tokens, size = x.numel() // in_features, bands.side(parameters[0], x.dtype)
        tall = in_features < out_features if transposed else in_features <= out_features
        if size and tokens > FEW:
            bands.launch(x, bias, values, index, perm_in, store, y, size, tall, activation)
            return
        cut = tuning.tuned("diag", space(tokens), tokens, x, values, out_features)
        launcher(diag_kernel, x)[(triton.cdiv(out_features, cut.ROWS) * triton.cdiv(tokens, cut.TILE),)](
            x=x, values=values, offsets=index[0], spans=index[1], y=y,
            tokens=tokens, out_features=out_features, in_features=in_features, diagonals=len(index[0]), TALL=tall,
            SPAN=ROWS,
            **epilogue(bias, perm_in, store, x, activation), **cut.keywords(),
        )  # fmt: skip

    @staticmethod
    def launch_gradient(x: Tensor, dy: Tensor, values: Tensor, index: list[Tensor], parameters: list[int]) -> Tensor:
        in_features, out_features = x.shape[-1], dy.shape[-1]
        size, tall = bands.side(parameters[0], x.dtype), in_features <= out_features
        if size:
            return bands.launch_gradient(x, dy, values, index[0], size, tall)
        near, far = (x, dy) if tall else (dy, x)
        cut = tuning.tuned("diag gradient", gradient_space(), x.numel() // in_features, x, values, out_features)
        found = torch.empty_like(values, dtype=torch.float32)
        grid = (triton.cdiv(near.shape[-1], cut.ROWS) * triton.cdiv(len(index[0]), cut.STEP),)
        launcher(gradient_kernel, x)[grid](
            x=near, dy=far, offsets=index[0], found=found, tokens=x.numel() // in_features,
            long_features=far.shape[-1], short_features=near.shape[-1], diagonals=len(index[0]), **cut.keywords(),
        )  # fmt: skip
        return found


diag_linear, diag_gradient = define(_Diag)
