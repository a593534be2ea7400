"""Measuring the costs of this machine: every kind of kernel on one shape, at two densities and a grid of tokens.

Weights stay where the calls before left them, which flatters all candidates alike. What else the machine does only ever
adds time, so the fastest calls count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..cost import TOKENS, Costs, Curve, Unpack, index_bits
from ..layout import Layout
from .library import TYPES
from .native import NativeKernel
from .transient import fill_dense, work_of

OUT, IN = 1024, 768
TINY = 32
ROUNDS = 4
"""How often all cells are gone through: a busy moment of the machine then spoils none for good."""

MANY = 256
"""The tokens of the products that unpacking is timed among: about where it begins to pay."""

ENOUGH = 0.001
"""Seconds that a cell gets in a round, or one call."""

LONG = 0.03
"""Seconds from which on a call is not repeated in later rounds."""

SIZES: dict[str, tuple[tuple[int, int], int]] = {
    "diag": ((4, 14), 16),
    "nm2": ((1, 3), 4),
    "nm4": ((4, 14), 16),
    "nm8": ((8, 28), 32),
    "block": ((4, 14), 16),
}
"""Family -> the two densities that are measured, as numerators and denominator (N and M of N:M)."""

_BLOCK = 32
_VALUES = (torch.float32, torch.bfloat16)


def measure(threads: int) -> Costs:
    """The costs of this machine with `threads` threads; takes about four seconds."""
    cells = _Cells()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", enabled=False), torch.inference_mode(), torch.device("cpu"):
            sparse = {key: _family_cells(cells, *key, threads) for key in product(SIZES, _VALUES)}
            dense = {dtype: _dense_cells(cells, dtype) for dtype in TYPES}
            cells.run()
    finally:
        torch.set_num_threads(before)
    return Costs(
        kernels={f"{family} {_name(dtype)}": found.curve() for (family, dtype), found in sparse.items()},
        unpacks={f"{family} {_name(dtype)}": found.unpack() for (family, dtype), found in sparse.items()},
        dense={_name(dtype): _dense_curve(*found) for dtype, found in dense.items()},
    )


class _Cell:
    """A function to time: the fastest call of every round, and in the end that of the round that counts."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.rounds: list[float] = []
        self.seconds = 0.0

    def run(self) -> None:
        """One more round, unless a call is long."""
        if not self.rounds:
            # It may make what later calls find, as oneDNN does with the code of its products; only a long one counts.
            first = self._seconds()
            if first > LONG:
                self.rounds.append(first)
                return
        if self.rounds and self.rounds[0] > LONG:
            self.rounds.append(self.rounds[0])
            return
        best, spent = float("inf"), 0.0
        while spent < ENOUGH:
            seconds = self._seconds()
            best, spent = min(best, seconds), spent + seconds
        self.rounds.append(best)

    def _seconds(self) -> float:
        start = time.perf_counter()
        self.work()
        return time.perf_counter() - start


class _Cells:
    """Functions to time, in groups whose times are compared with one another.

    All cells of a group take their time from one round, the fastest for the group as a whole: a machine that is busy
    for a second then slows the whole group, and its cells still compare.
    """

    def __init__(self) -> None:
        self.groups: dict[int, list[_Cell]] = {}

    def add(self, group: int, work: Callable[[], object]) -> _Cell:
        """One more function."""
        cell = _Cell(work)
        self.groups.setdefault(group, []).append(cell)
        return cell

    def run(self) -> None:
        """Time all of them."""
        for _ in range(ROUNDS):
            for cells in self.groups.values():
                for cell in cells:
                    cell.run()
        for cells in self.groups.values():
            fastest = min(range(ROUNDS), key=lambda number: sum(cell.rounds[number] for cell in cells))
            for cell in cells:
                cell.seconds = cell.rounds[fastest]


@dataclass(frozen=True)
class _Family:
    """The cells of one family and dtype of values; pairs are for the two densities."""

    entries: tuple[int, int]
    call: _Cell
    kernels: tuple[tuple[_Cell, _Cell], ...]
    unpack_call: _Cell
    unpacks: tuple[_Cell, _Cell]

    def curve(self) -> Curve:
        """What the kernel costs."""
        call = self.call.seconds
        lines = [_line(self.entries, (low.seconds - call, high.seconds - call)) for low, high in self.kernels]
        return Curve(call, tuple(edge / (OUT + IN) for edge, _ in lines), tuple(rate for _, rate in lines))

    def unpack(self) -> Unpack:
        """What unpacking costs."""
        call = self.unpack_call.seconds
        zeros, value = _line(self.entries, [cell.seconds - call for cell in self.unpacks])
        return Unpack(call, zeros / (OUT * IN), value)


def _family_cells(cells: _Cells, family: str, dtype: torch.dtype, threads: int) -> _Family:
    low, high = (_layer(family, OUT, IN, place, dtype) for place in (0, 1))
    tiny = _layer(family, TINY, TINY, 1, dtype)

    def forward(layer: NativeKernel, tokens: int) -> _Cell:
        x, bias = torch.ones(tokens, layer.in_features), torch.ones(layer.out_features)
        return cells.add(tokens, lambda: layer.compute(x, bias, threads))

    def unpack(layer: NativeKernel) -> _Cell:
        weight = torch.empty(layer.out_features, layer.in_features)
        return cells.add(MANY, lambda: fill_dense(layer.image.data_ptr(), weight, threads))

    entries = [work_of(layer.image.data_ptr()).entries for layer in (low, high)]
    return _Family(
        entries=(entries[0], entries[1]),
        call=forward(tiny, 1),
        kernels=tuple((forward(low, tokens), forward(high, tokens)) for tokens in TOKENS),
        unpack_call=unpack(tiny),
        unpacks=(unpack(low), unpack(high)),
    )


def _dense_cells(cells: _Cells, dtype: torch.dtype) -> tuple[_Cell, list[_Cell]]:
    def forward(out_features: int, in_features: int, tokens: int) -> _Cell:
        weight, bias = torch.ones(out_features, in_features, dtype=dtype), torch.ones(out_features, dtype=dtype)
        x = torch.ones(tokens, in_features, dtype=dtype)
        return cells.add(tokens, lambda: functional.linear(x, weight, bias))

    return forward(TINY, TINY, 1), [forward(OUT, IN, tokens) for tokens in TOKENS]


def _dense_curve(call: _Cell, products: list[_Cell]) -> Curve:
    rates = tuple(max(0.0, cell.seconds - call.seconds) / (OUT * IN) for cell in products)
    return Curve(call.seconds, (0.0,) * len(TOKENS), rates)


def _line(entries: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(seconds at no entries, seconds an entry) of the line through two measurements, neither under zero."""
    rate = max(0.0, (seconds[1] - seconds[0]) / (entries[1] - entries[0]))
    return max(0.0, seconds[1] - rate * entries[1]), rate


def _layer(family: str, out_features: int, in_features: int, place: int, dtype: torch.dtype) -> NativeKernel:
    """A layer of ones with its entries spread out evenly and its inputs permuted."""
    numerators, denominator = SIZES[family]
    share = numerators[place]
    structure = "nm" if family.startswith("nm") else family
    make = {"diag": _diagonals, "nm": _groups, "block": _blocks}[structure]
    parameters, tensors = make(out_features, in_features, share, denominator, dtype)
    # 5 divides neither size, so every input comes up once, far from its place.
    perm = (torch.arange(in_features) * 5 % in_features).to(torch.int32)
    density = share / denominator
    layout = Layout(structure, out_features, in_features, density, parameters, tensors, perm, None, _no_weight)
    return NativeKernel(layout)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _no_weight() -> Tensor:
    raise RuntimeError("a layer for measuring has no dense weight")


_Made = tuple[dict[str, Any], dict[str, Tensor]]


def _diagonals(out_features: int, in_features: int, share: int, of: int, dtype: torch.dtype) -> _Made:
    offsets = _spread(max(out_features, in_features), share, of)
    return {}, {"values": torch.ones(len(offsets), min(out_features, in_features), dtype=dtype), "offsets": offsets}


def _groups(out_features: int, in_features: int, n: int, m: int, dtype: torch.dtype) -> _Made:
    groups, bits = in_features // m, index_bits(m)
    slots = (torch.arange(out_features)[:, None, None] + torch.arange(n) * m // n) % m
    packed = slots.sort(dim=2).values.expand(out_features, groups, n).reshape(out_features, -1, 8 // bits)
    indices = (packed << torch.arange(0, 8, bits)).sum(dim=2).to(torch.uint8)
    return {"n": n, "m": m}, {"values": torch.ones(out_features, groups, n, dtype=dtype), "indices": indices}


def _blocks(out_features: int, in_features: int, share: int, of: int, dtype: torch.dtype) -> _Made:
    columns = _spread(in_features // _BLOCK, share, of)
    rows = out_features // _BLOCK
    return {"block_size": _BLOCK}, {
        "values": torch.ones(rows * len(columns), _BLOCK, _BLOCK, dtype=dtype),
        "row_offsets": torch.arange(rows + 1, dtype=torch.int32) * len(columns),
        "col_indices": columns.repeat(rows),
    }


def _spread(size: int, share: int, of: int) -> Tensor:
    """share / of of the numbers under `size` (at least one), as even as can be, int32."""
    count = max(1, size * share // of)
    return (torch.arange(count) * size // count).to(torch.int32)
