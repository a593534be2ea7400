"""N:M on CUDA cores, for tokens so few that reading the weight is what costs; nm_tiles.py has the rest.

y[t, r] = sum over groups g and slots n: values[r, g, n] x[t, perm_in[g M + index[r, g, n]]]

A program computes a few rows for a tile of tokens. A row's values lie side by side, `STEP` of them are read at a time,
with their indices as packed (1, 2, 4 or 8 bits, little-endian within the byte), once a tile, and used for all its
tokens.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from . import nm_tiles, permute, tuning
from .common import Config, epilogue, gathered, launcher, limit_of, permuted, write
from .operator import define

FEW = 16
"""Tokens up to which products run on CUDA cores."""


def space(tokens: int) -> tuple[Config, ...]:
    """How a product may be cut, the default first: rows, values of a row at a time, warps."""
    return _space(limit_of(tokens, 1, 4))


@functools.cache
def _space(most: int) -> tuple[Config, ...]:
    cuts: tuple[tuple[int, int, int], ...] = ((8, 32, 4), (4, 128, 8), (2, 64, 4))
    if most == 1:
        cuts = ((4, 512, 4), (1, 512, 4), (4, 128, 4), (8, 128, 4), (4, 128, 2))
    elif most == 4:
        cuts = ((4, 128, 4), (2, 256, 4), (4, 64, 2))
    return tuple(
        Config(TILE=most or 16, ROWS=rows, STEP=step, num_warps=warps, num_stages=2) for rows, step, warps in cuts
    )


@functools.cache
def index_bits(m: int) -> int:
    """Bits of a packed index within groups of `m`: the least of 1, 2, 4 and 8 that holds m - 1."""
    return next(bits for bits in (1, 2, 4, 8) if m <= 2**bits)


def group_of(values: Tensor, parameters: list[int]) -> dict[str, int]:
    """N, M and the bits of an index, as kernels take them."""
    (m,) = parameters
    return {"N": values.shape[2], "M": m, "BITS": index_bits(m)}


@triton.jit
def nm_kernel(  # type: ignore[no-untyped-def]
    x, values, indices, perm_in, store, bias, y, tokens, out_features, in_features, slots, index_bytes,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, MINOR: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PERM_IN: tl.constexpr, STORE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One tile; programs of one tile of tokens are neighbours, so that its inputs stay in the cache."""
    parts = tl.cdiv(out_features, ROWS)
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts
    row = part * ROWS + tl.arange(0, ROWS)
    values_of_row = row.to(tl.int64)[:, None] * slots
    indices_of_row = row.to(tl.int64)[:, None] * index_bytes
    partial = tl.zeros((ROWS, STEP, TILE), dtype=tl.float32)
    for start in range(0, slots, STEP):
        slot = start + tl.arange(0, STEP)
        live = (row < out_features)[:, None] & (slot < slots)[None, :]
        weight = tl.load(values + values_of_row + slot[None, :], mask=live, other=0)
        weight = weight.to(x.dtype.element_ty).to(tl.float32)
        packed = tl.load(indices + indices_of_row + (slot * BITS // 8)[None, :], mask=live, other=0).to(tl.int32)
        index = (packed >> (slot * BITS % 8)[None, :]) & ((1 << BITS) - 1)
        source = permuted((slot // N * M)[None, :] + index, live, perm_in, PERM_IN)
        inputs = gathered(x, source, live, tile, tokens, in_features, TILE, MINOR)
        partial += inputs.to(tl.float32) * weight[:, :, None]
    token = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    write(tl.trans(tl.sum(partial, axis=1)), token, row, bias, store, y, tokens, out_features, BIAS, STORE, ACTIVATION)


class _NM:
    """`index` is the packed indices, uint8 `[out, bytes]`; values `[out, G, N]`; the one parameter is M."""

    NAME = "nm"

    @staticmethod
    def launch(
        x: Tensor, bias: Tensor | None, values: Tensor, index: list[Tensor], perm_in: Tensor | None,
        store: Tensor | None, y: Tensor, parameters: list[int], transposed: bool, activation: str,
    ) -> None:  # fmt: skip
        (indices,), group = index, group_of(values, parameters)
        in_features, out_features = x.shape[-1], y.shape[-1]
        tokens = x.numel() // in_features
        reads = tokens * values.numel()
        if transposed or tokens == 1 or tokens > FEW:
            x, perm_in = permute.ahead(x, perm_in, reads)
        if transposed or tokens > FEW:
            nm_tiles.launch(x, bias, values, indices, perm_in, store, y, group, transposed, activation)
            return
        cut = tuning.tuned("nm", space(tokens), tokens, x, values, out_features)
        minor = tokens > 1 and permute.pays(reads)
        if minor:
            x, perm_in = permute.side_by_side(x, perm_in, cut.TILE), None
        launcher(nm_kernel, x)[(triton.cdiv(out_features, cut.ROWS) * triton.cdiv(tokens, cut.TILE),)](
            x=x, values=values, indices=indices, y=y,
            tokens=tokens, out_features=out_features, in_features=in_features,
            MINOR=minor, slots=values.shape[1] * values.shape[2], index_bytes=indices.shape[1], **group,
            **epilogue(bias, perm_in, store, x, activation), **cut.keywords(),
        )  # fmt: skip

    @staticmethod
    def launch_gradient(x: Tensor, dy: Tensor, values: Tensor, index: list[Tensor], parameters: list[int]) -> Tensor:
        return nm_tiles.launch_gradient(x, dy, values, index[0], group_of(values, parameters))


nm_linear, nm_gradient = define(_NM)
