"""Permuting activations in a pass of their own: y[t, i] = x[t, index[i]].

In a kernel's load a permutation costs a scattered read wherever a value is used: 32 neighbouring values then touch some
25 lines of the cache instead of one or two, and 16-bit inputs can no longer be copied 16 bytes at a time on the way to
a tensor core. A pass of its own reads and writes every activation once, scattered only within on-chip memory, and takes
a launch: a microsecond or two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .common import launcher

WORTH = 1 << 19
"""Scattered reads or writes that take as long as a pass of its own with its launch: at 25 cycles for every 32 of them
and 132 multiprocessors at 1.7 GHz, close to 2 us.
"""

WIDEST = 1 << 14
"""Widest row that is permuted within shared memory (64 KiB in float32, what the smallest target has)."""

FEW_ROWS = 1024


def pays(scattered: int) -> bool:
    """Whether a pass of its own takes less than so many scattered reads or writes within a kernel."""
    return scattered > WORTH


@triton.jit
def permute_kernel(x, index, y, rows, width, WIDTH: tl.constexpr, REPEAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """`REPEAT` rows one after the other, with one index."""
    place = tl.arange(0, WIDTH)
    inside = place < width
    source = tl.load(index + place, mask=inside, other=0)
    for turn in range(REPEAT):
        row = tl.program_id(0).to(tl.int64) * REPEAT + turn
        live = place < tl.where(row < rows, width, 0)
        values = tl.load(x + row * width + place, mask=live, other=0)
        tl.store(y + row * width + place, tl.gather(values, source, 0), mask=live)


def ahead(x: Tensor, index: Tensor | None, reads: int) -> tuple[Tensor, Tensor | None]:
    """x permuted and no index, where that pays for a kernel that reads so many inputs; else both as they are."""
    return (x, index) if index is None or not pays(reads) else (permute(x, index), None)


def permute(x: Tensor, index: Tensor) -> Tensor:
    """x `[..., d]` contiguous, index int32 `[d]` -> y `[..., d]`."""
    width = x.shape[-1]
    if width > WIDEST:
        return x.index_select(-1, index)
    y = torch.empty_like(x)
    rows = x.numel() // width
    repeat = 1 if rows <= FEW_ROWS else 4
    launcher(permute_kernel, x)[(triton.cdiv(rows, repeat),)](
        x=x, index=index, y=y, rows=rows, width=width,
        WIDTH=triton.next_power_of_2(width), REPEAT=repeat, num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return y


COLUMNS = 256
"""Columns of a program that moves inputs: few, so that many programs share the scattered reads."""


@triton.jit
def side_kernel(  # type: ignore[no-untyped-def]
    x, index, y, tokens, width, TILE: tl.constexpr, COLUMNS: tl.constexpr, PERMUTED: tl.constexpr
):
    """`COLUMNS` columns of a tile of tokens."""
    parts = tl.cdiv(width, COLUMNS)
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    tile = (tl.program_id(0) // parts).to(tl.int64) * TILE
    inner = tl.arange(0, TILE)
    inside = column < width
    source = column
    if PERMUTED:
        source = tl.load(index + column, mask=inside, other=0)
    token = tile + inner
    values = tl.load(
        x + token[None, :] * width + source[:, None], mask=(token < tokens)[None, :] & inside[:, None], other=0
    )
    tl.store(y + tile * width + column[:, None] * TILE + inner[None, :], values, mask=inside[:, None])


def side_by_side(x: Tensor, index: Tensor | None, tile: int) -> Tensor:
    """x `[..., d]` contiguous, index int32 `[d]` or None -> y `[tiles, d, tile]`, y[n, i, t] = x[n tile + t, index[i]].

    The last tile is filled up with zeros. A kernel on CUDA cores then reads the inputs of all its tokens at once.
    """
    width = x.shape[-1]
    tokens = x.numel() // width
    tiles = triton.cdiv(tokens, tile)  # and not len(y), which would be one number for all graphs
    y = x.new_empty((tiles, width, tile))
    launcher(side_kernel, x)[(triton.cdiv(width, COLUMNS) * tiles,)](
        x=x, index=x if index is None else index, y=y, tokens=tokens, width=width,
        TILE=tile, COLUMNS=COLUMNS, PERMUTED=index is not None, num_warps=4,
    )  # fmt: skip
    return y


@triton.jit
def shift_kernel(  # type: ignore[no-untyped-def]
    x, index, y, width, length, COPIES: tl.constexpr, COLUMNS: tl.constexpr, PERMUTED: tl.constexpr
):
    """What `COLUMNS` columns of x, counted on where it begins anew, are in every copy; each input is read once."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    source = column % width
    if PERMUTED:
        source = tl.load(index + source)
    values = tl.load(x + source)
    copy = tl.arange(0, COPIES)[:, None]
    place = column[None, :] - copy
    tl.store(y + copy * length + place, values[None, :], mask=(place >= 0) & (place < length))


def shifted(x: Tensor, index: Tensor | None, copies: int, length: int) -> Tensor:
    """x `[..., d]` of one token, index int32 `[d]` or None -> y `[copies, length]`, y[c, j] = x[index[(j + c) mod d]].

    Whatever place a kernel reads from, one of the copies has it at a multiple of `copies`.
    """
    width = x.shape[-1]
    y = torch.empty((copies, length), dtype=x.dtype, device=x.device)
    launcher(shift_kernel, x)[(triton.cdiv(length + copies - 1, COLUMNS),)](
        x=x, index=x if index is None else index, y=y, width=width, length=length,
        COPIES=copies, COLUMNS=COLUMNS, PERMUTED=index is not None, num_warps=4,
    )  # fmt: skip
    return y


def inverse(permutation: Tensor) -> Tensor:
    """int32 `[n]`: inverse[permutation[i]] = i."""
    numbers = torch.arange(len(permutation), dtype=torch.int32, device=permutation.device)
    return torch.empty_like(permutation, dtype=torch.int32).scatter_(0, permutation.long(), numbers)


_inverses: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def kept_inverse(permutation: Tensor) -> Tensor:
    """`inverse`, made once for as long as the permutation is there and stays what it is."""
    version = 0 if permutation.is_inference() else permutation._version
    known: tuple[int, Tensor] | None = _inverses.get(permutation)
    if known is not None and known[0] == version:
        return known[1]
    made = inverse(permutation)
    # What a graph computes while it is captured holds nothing before the graph is replayed.
    if not (permutation.is_cuda and torch.cuda.is_current_stream_capturing()):
        _inverses[permutation] = (version, made)
    return made
