"""Diagonals on CUDA cores, for tokens so few that reading the weight is what costs; bands take bands.py beyond them.

out >= in: y[t, r] = sum over k with i = (r - o_k) mod out < in: values[k, i] x[t, perm_in[i]]
out < in: y[t, r] = sum over k: values[k, r] x[t, perm_in[(r + o_k) mod in]]

Each form is the other one's transpose, with the same offsets and values. A program computes neighbouring rows
for a tile of tokens: along a diagonal these are neighbouring values, so every value is read once a tile, coalesced, and
used for all its tokens. `SPLIT` diagonals are summed side by side, one or more a warp, and added up at the end; `STEP`
are under way at once. Where out > in only some diagonals meet a range of rows; as offsets ascend these follow on each
other, and `spans` says where they begin and end.

One token, where both sizes are multiples of 8: what is out of step with the rest falls into eight classes of diagonals,
by o_k mod 8, and is shifted once for each class, so that values and inputs are both read 16 bytes at a time. Where out
>= in, values and inputs have the same index i, and it is the sums that are shifted: those of a class begin at the row
that makes i a multiple of 8, and are shifted only when added up. Where out < in, values and sums have the same index r,
and it is the inputs that are shifted. A pass of its own (`permute.shifted`) writes eight copies of x, permuted, each
begun one input later than the one before, and diagonal k reads copy o_k mod 8 from r + o_k - o_k mod 8 on: a multiple
of 8 whenever r is one. In each copy x begins anew behind its last input, so that nothing wraps around.

The gradient: dvalues[k, i] = sum over t: dy[t, r] x[t, c] with (r, c) the place of entry i on diagonal k.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bands, permute, tuning
from .common import MANY, Config, epilogue, gathered, launcher, limit_of, permuted, write
from .operator import define

ROWS = bands.ROWS_OF_SPAN
"""Rows of a span, and the most of a program."""

FEW = 16
"""Tokens up to which bands, too, run on CUDA cores."""

CLASSES = 8
"""Neighbouring values that are read at once, 16 bytes of 16-bit ones, and so classes of diagonals."""

_PADDED = 32
"""What the number of diagonals of a class is a multiple of, so that every `STEP` of `one_space` divides it."""


def space(tokens: int, out_features: int) -> tuple[Config, ...]:
    """How a product may be cut, the default first: rows, diagonals under way, those side by side, warps."""
    return _space(limit_of(tokens, 1, 2, 4, 8), rows_for(out_features, 16))


def rows_for(out_features: int, least: int) -> int:
    """Rows of a program, of which a large GPU should have 96 or more."""
    return next((rows for rows in (64, 32) if rows > least and out_features >= 96 * rows), least)


@functools.cache
def _space(most: int, rows: int) -> tuple[Config, ...]:
    half = max(rows // 2, 16)
    cuts: tuple[tuple[int, int, int, int], ...]
    cuts = (half, 8, 8, 4), (rows, max(rows // 4, 8), 8, max(rows // 8, 4))
    if most == 1:
        cuts = (rows, 64, 16, 8), (rows, 64, 8, 8), (half, 128, 32, 8), (half, 32, 8, 4)
    elif most != MANY and most <= 4:
        cuts = (rows, 32, 8, 8), (half, 32, 8, 8), (half, 64, 16, 8), (rows, 16, 4, 4)
    return tuple(
        Config(TILE=most or 16, ROWS=each, STEP=step, SPLIT=split, num_warps=warps, num_stages=2)
        for each, step, split, warps in dict.fromkeys(cuts)
    )


def one_space(out_features: int, tall: bool) -> tuple[Config, ...]:
    """How a product with one token may be cut by classes, the default first: rows, diagonals at a time.

    `tall`, that is out >= in: diagonals of a class. Else also warps, 16 values at a time to each of their threads, and
    stages. One stage takes the fewest instructions a value (7.4 on sm_90 in bfloat16; two 8.4, three 9.1), but what is
    compiled then waits for some loads before it begins others; with more, those of further turns are under way.
    """
    return _tall_space(rows_for(out_features, 32)) if tall else _wide_space(rows_for(out_features, 16))


@functools.cache
def _tall_space(rows: int) -> tuple[Config, ...]:
    cuts = ((rows, 16), (rows, 8), (rows, 32), (2 * rows, 8))
    return tuple(Config(ROWS=rows, STEP=step, num_warps=8, num_stages=2) for rows, step in cuts)


@functools.cache
def _wide_space(rows: int) -> tuple[Config, ...]:
    step, half = 4096 // rows, max(rows // 2, 16)
    cuts = ((rows, step, 8, 3), (rows, step, 8, 1), (rows, 2 * step, 16, 2), (half, 4096 // half, 8, 2))
    return tuple(Config(ROWS=rows, STEP=step, num_warps=warps, num_stages=stages) for rows, step, warps, stages in cuts)


@functools.cache
def gradient_space() -> tuple[Config, ...]:
    """How the gradient may be cut, the default first: diagonals side by side, tokens at a time."""
    cuts = ((8, 4), (16, 2), (4, 8), (8, 2))
    return tuple(Config(TILE=tile, ROWS=ROWS, STEP=step, num_warps=4, num_stages=2) for step, tile in cuts)


def spans_of(offsets: Tensor, out_features: int, in_features: int) -> Tensor:
    """Of every `ROWS` rows the number of the first diagonal that meets them and of that behind the last.

    For out >= in; where it is less, those of the transpose. Diagonals are counted twice over, K + k being the part of
    diagonal k from its own row on and k the part that has come around to row 0. int32 `[ceil(max(out, in) / ROWS), 2]`;
    offsets int32 `[K]` ascending.
    """
    count, rows, length = len(offsets), max(out_features, in_features), min(out_features, in_features)
    first_row = torch.arange(0, rows, ROWS, device=offsets.device)
    # Row r meets offset o where r - in < o <= r, counted modulo out; one turn more keeps that above zero.
    turns = torch.cat([offsets.long(), offsets.long() + rows])
    begin = torch.searchsorted(turns, first_row + rows - length, right=True)
    end = torch.searchsorted(turns, first_row + rows + ROWS - 1, right=True)
    return torch.stack([begin, end.clamp(max=2 * count)], dim=1).to(torch.int32)


def classes_of(offsets: Tensor, out_features: int, in_features: int) -> Tensor:
    """The diagonals by class: their numbers and their offsets, int32 `[2, CLASSES, longest class]`.

    Short classes are filled up with an offset of theirs that meets no row. offsets int32 `[K]`.
    """
    kinds, order = torch.sort(offsets % CLASSES, stable=True)
    counts = torch.bincount(kinds, minlength=CLASSES)
    longest = triton.cdiv(int(counts.max()), _PADDED) * _PADDED
    table = torch.zeros((2, CLASSES, longest), dtype=torch.int32, device=offsets.device)
    # Behind what the last program's rows could meet, and of the class, whose places are promised to be aligned.
    behind = 2 * (max(out_features, in_features) + ROWS)
    table[1] = behind - behind % CLASSES + torch.arange(CLASSES, device=offsets.device)[:, None]
    place = torch.arange(len(offsets), device=offsets.device) - (counts.cumsum(0) - counts)[kinds]
    table[0, kinds, place] = order.to(torch.int32)
    table[1, kinds, place] = offsets[order]
    return table


@triton.jit
def diag_kernel(  # type: ignore[no-untyped-def]
    x, values, offsets, spans, perm_in, store, bias, y, tokens, out_features, in_features, diagonals,
    TALL: tl.constexpr, SPAN: tl.constexpr, MINOR: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, SPLIT: tl.constexpr,
    PERM_IN: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One tile; programs of one tile of tokens are neighbours, so that its inputs stay in the cache."""
    parts = tl.cdiv(out_features, ROWS)
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts
    row = part * ROWS + tl.arange(0, ROWS)
    along = row
    if TILE > 1:
        # Tokens are what lies side by side then; 16 bytes of values a thread would have to change hands.
        along = tl.max_contiguous(row, 1)
    begin = 0
    end = diagonals
    if TALL:
        begin = tl.load(spans + part * ROWS // SPAN * 2)
        end = tl.load(spans + part * ROWS // SPAN * 2 + 1)
    partial = tl.zeros((SPLIT, ROWS, TILE), dtype=tl.float32)
    for start in range(begin, end, STEP):
        for turn in tl.static_range(0, STEP, SPLIT):
            number = start + turn + tl.arange(0, SPLIT)
            here = number < end
            if TALL:
                around = number < diagonals
                number = tl.where(around, number, number - diagonals)
                offset = tl.load(offsets + number, mask=here, other=0)
                column = row[None, :] + (tl.where(around, out_features, 0) - offset)[:, None]
                # As unsigned, and so not negative.
                live = here[:, None] & (column.to(tl.uint32, bitcast=True) < in_features)
                place = number.to(tl.int64)[:, None] * in_features + column
            else:
                column = row[None, :] + tl.load(offsets + number, mask=here, other=0)[:, None]
                column = tl.where(column >= in_features, column - in_features, column)
                live = here[:, None] & (row < out_features)[None, :]
                place = number.to(tl.int64)[:, None] * out_features + along[None, :]
            weight = tl.load(values + place, mask=live, other=0).to(x.dtype.element_ty).to(tl.float32)
            source = permuted(column, live, perm_in, PERM_IN)
            inputs = gathered(x, source, live, tile, tokens, in_features, TILE, MINOR)
            partial += inputs.to(tl.float32) * weight[:, :, None]
    token = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    write(tl.trans(tl.sum(partial, axis=0)), token, row, bias, store, y, tokens, out_features, BIAS, STORE, ACTIVATION)


@triton.jit
def products(x, values, source, place, live):  # type: ignore[no-untyped-def]
    """Inputs at `source` times values at `place`, float32."""
    weight = tl.load(values + place, mask=live, other=0).to(x.dtype.element_ty)
    inputs = tl.load(x + source, mask=live, other=0)
    return inputs.to(tl.float32) * weight.to(tl.float32)


@triton.jit
def tall_kernel(  # type: ignore[no-untyped-def]
    x, values, classes, store, bias, y, out_features, in_features, longest,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    STORE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """`ROWS - CLASSES` rows of the one token, out >= in, both multiples of `CLASSES`.

    The sums of class c begin at row first + c - CLASSES, whatever multiple of `CLASSES` its offsets are past c.
    """
    first = tl.program_id(0) * (ROWS - CLASSES)
    kind = tl.arange(0, CLASSES)
    inner = tl.arange(0, ROWS)
    sums = tl.zeros((CLASSES, STEP, ROWS), dtype=tl.float32)
    for start in range(0, longest, STEP):
        at = classes + kind[:, None] * longest + (start + tl.arange(0, STEP))[None, :]
        number = tl.load(at)
        offset = tl.load(at + CLASSES * longest)
        column = (first - CLASSES + kind[:, None] - offset)[:, :, None] + inner[None, None, :]
        column = tl.where(column < 0, column + out_features, column)
        column = tl.multiple_of(tl.max_contiguous(column, [1, 1, CLASSES]), [1, 1, CLASSES])
        live = (column >= 0) & (column < in_features)
        place = number.to(tl.int64)[:, :, None] * in_features + column
        sums += products(x, values, column, place, live)
    behind = tl.minimum(inner[None, :] + CLASSES - kind[:, None], ROWS - 1)
    total = tl.sum(tl.gather(tl.sum(sums, axis=1), behind, 1), axis=0)[None, :]
    row = tl.where(inner < ROWS - CLASSES, first + inner, out_features)
    write(total, tl.arange(0, 1).to(tl.int64), row, bias, store, y, 1, out_features, BIAS, STORE, ACTIVATION)


@triton.jit
def wide_kernel(  # type: ignore[no-untyped-def]
    copies, values, offsets, store, bias, y, out_features, length, diagonals,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    STORE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of the one token, out < in, out a multiple of `CLASSES`.

    copies `[CLASSES, length]` as from `permute.shifted`, length, too, a multiple of `CLASSES`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.max_constancy(row < out_features, CLASSES)
    sums = tl.zeros((STEP, ROWS), dtype=tl.float32)
    # Unless asked to, Triton lets no loads run ahead in a loop without tensor cores.
    for start in tl.range(0, diagonals, STEP, num_stages=STAGES):
        number = start + tl.arange(0, STEP)
        here = number < diagonals
        offset = tl.load(offsets + number, mask=here, other=0)
        shift = offset & (CLASSES - 1)
        source = tl.multiple_of(shift * length + offset - shift, CLASSES)[:, None] + row[None, :]
        place = tl.multiple_of(number.to(tl.int64) * out_features, CLASSES)[:, None] + row[None, :]
        sums += products(copies, values, source, place, here[:, None] & inside[None, :])
    total = tl.sum(sums, axis=0)[None, :]
    write(total, tl.arange(0, 1).to(tl.int64), row, bias, store, y, 1, out_features, BIAS, STORE, ACTIVATION)


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
    """`index` is offsets, spans and classes, the one parameter the length of the runs that offsets come in."""

    NAME = "diag"

    @staticmethod
    def launch(
        x: Tensor, bias: Tensor | None, values: Tensor, index: list[Tensor], perm_in: Tensor | None,
        store: Tensor | None, y: Tensor, parameters: list[int], transposed: bool, activation: str,
    ) -> None:  # fmt: skip
        offsets, spans, _ = index
        in_features, out_features = x.shape[-1], y.shape[-1]
        tokens, size = x.numel() // in_features, bands.side(parameters[0], x.dtype)
        tall = in_features < out_features if transposed else in_features <= out_features
        reads = tokens * values.numel()
        even = in_features % CLASSES == 0 and out_features % CLASSES == 0
        if tokens == 1 and even and (permute.pays(reads) or (tall and perm_in is None)):
            _launch_one(x, bias, values, index, perm_in, store, y, tall, activation)
            return
        if tokens == 1 or (size and tokens > FEW):
            x, perm_in = permute.ahead(x, perm_in, reads)
        if size and tokens > FEW:
            bands.launch(x, bias, values, [offsets, spans], perm_in, store, y, size, tall, activation)
            return
        cut = tuning.tuned("diag", space(tokens, out_features), tokens, x, values, out_features)
        minor = tokens > 1 and permute.pays(reads)
        if minor:
            x, perm_in = permute.side_by_side(x, perm_in, cut.TILE), None
        launcher(diag_kernel, x)[(triton.cdiv(out_features, cut.ROWS) * triton.cdiv(tokens, cut.TILE),)](
            x=x, values=values, offsets=offsets, spans=spans, y=y, tokens=tokens, out_features=out_features,
            in_features=in_features, diagonals=len(offsets), TALL=tall, SPAN=ROWS,
            MINOR=minor, **epilogue(bias, perm_in, store, x, activation), **cut.keywords(),
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


def _launch_one(
    x: Tensor, bias: Tensor | None, values: Tensor, index: list[Tensor], perm_in: Tensor | None, store: Tensor | None,
    y: Tensor, tall: bool, activation: str,
) -> None:  # fmt: skip
    """One token by classes of diagonals, after a pass over x where that is permuted or out < in."""
    offsets, _, classes = index
    in_features, out_features = x.shape[-1], y.shape[-1]
    name = "diag one token tall" if tall else "diag one token wide"
    cut = tuning.tuned(name, one_space(out_features, tall), 1, x, values, out_features)
    ending = epilogue(bias, None, store, x, activation)
    del ending["perm_in"], ending["PERM_IN"]
    shared = {"values": values, "y": y, "out_features": out_features, "CLASSES": CLASSES, **ending, **cut.keywords()}
    if tall:
        launcher(tall_kernel, x)[(triton.cdiv(out_features, cut.ROWS - CLASSES),)](
            x=x if perm_in is None else permute.permute(x, perm_in), classes=classes,
            in_features=in_features, longest=classes.shape[-1], **shared,
        )  # fmt: skip
        return
    copies = permute.shifted(x, perm_in, CLASSES, in_features + out_features)
    launcher(wide_kernel, x)[(triton.cdiv(out_features, cut.ROWS),)](
        copies=copies, offsets=offsets, length=copies.shape[-1], diagonals=len(offsets), STAGES=cut.num_stages, **shared
    )


diag_linear, diag_gradient = define(_Diag)
