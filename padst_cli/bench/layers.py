"""Layers one at a time, sparse against dense."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from padst_kernels.cost import resident_bound
from torch import Tensor

from padst_cli.bench.result import FasterDense, LayerRow, Limits
from padst_cli.bench.roofline import roofline
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.packing import resident_bytes
from padst_cli.stopwatch import Pair, Progress, Stopwatch, Turns

SLOWER = 0.97
"""Speed-ups under this are no measuring error: the layer is slower than dense."""


class LayerBench:
    """Times one layer at a time on random inputs `[tokens, in]`."""

    def __init__(self, stopwatch: Stopwatch, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.stopwatch, self.device, self.dtype = stopwatch, device, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self._local = torch.Generator(device).manual_seed(seed) if device.type == "cuda" else self.generator

    def row(
        self, names: list[str], packed: Mapping[str, PackedLinear], tokens: int, limits: Limits, progress: Progress
    ) -> LayerRow:
        """The row of the report for layers that are alike."""
        layer = packed[names[0]]
        structure = layer.format.structure
        progress.next(f"{names[0]}, {tokens} tokens")
        pair, measured = self._measure(layer, tokens)
        weight_bytes = resident_bytes(measured) - _bias_bytes(measured)
        return LayerRow(
            name=names[0],
            count=len(names),
            out_features=layer.out_features,
            in_features=layer.in_features,
            structure=structure.name,
            parameters=structure.parameters(),
            density=structure.density,
            tokens=tokens,
            dense_us=pair.dense * 1e6,
            sparse_us=pair.sparse * 1e6,
            speedup=pair.dense / pair.sparse,
            kernel=measured.kernel_name(tokens),
            dense_spread=pair.dense_spread,
            sparse_spread=pair.sparse_spread,
            resident_bytes=weight_bytes,
            resident_bound=resident_bound(
                structure.name,
                structure.parameters().get("m", 0),
                structure.nonzeros,
                layer.value_dtype.itemsize,
            ),
            roofline=roofline(layer, weight_bytes, tokens, self.dtype.itemsize, pair.sparse, limits),
        )

    def compare(self, layer: PackedLinear, tokens: int) -> Pair:
        """Dense and sparse seconds a call at this token count."""
        return self._measure(layer, tokens)[0]

    def _measure(self, layer: PackedLinear, tokens: int) -> tuple[Pair, PackedLinear]:
        """The times, and one of the copies of the layer that were run."""
        x = self._random(tokens, layer.in_features)
        copies = self._copies(layer, x)
        return self.stopwatch.calls(self._dense_step(layer, x), _sparse_step(copies, x)), copies[0]

    def _random(self, rows: int, columns: int) -> Tensor:
        made = torch.randn(rows, columns, generator=self._local, device=self._local.device)
        return made.to(self.device, self.dtype)

    def _dense_step(self, layer: PackedLinear, x: Tensor) -> Callable[[], Tensor]:
        first = self._random(layer.out_features, layer.in_features) / math.sqrt(layer.in_features)
        bias = None if layer.bias is None else layer.bias.detach()
        copies = self.stopwatch.timing.copies(first.numel() * first.element_size())
        weights = (first, *(first.clone() for _ in range(copies - 1)))
        return Turns([partial(F.linear, x, weight, bias) for weight in weights])

    def _copies(self, layer: PackedLinear, x: Tensor) -> list[PackedLinear]:
        # So that what kernels prepare for these runs does not count as resident in the model.
        first = copy.deepcopy(layer)
        first(x)
        copies = self.stopwatch.timing.copies(resident_bytes(first))
        layers = [first, *(copy.deepcopy(layer) for _ in range(copies - 1))]
        for one in layers:
            one(x)
        return layers


def _sparse_step(layers: list[PackedLinear], x: Tensor) -> Callable[[], Tensor]:
    # Without the hooks of `nn.Module.__call__`, as the dense side is called without them.
    return Turns([partial(layer.forward, x) for layer in layers])


def faster_dense(rows: Sequence[LayerRow], itemsize: int) -> tuple[FasterDense, ...]:
    """The layers that were slower than dense at some token count, with what a dense weight beside them would take."""
    found: dict[str, list[LayerRow]] = {}
    for row in rows:
        if row.speedup < SLOWER:
            found.setdefault(row.name, []).append(row)
    return tuple(
        FasterDense(
            name=name,
            count=slow[0].count,
            tokens=tuple(row.tokens for row in slow),
            extra_bytes=slow[0].count * slow[0].out_features * slow[0].in_features * itemsize,
        )
        for name, slow in found.items()
    )


def groups_of(packed: Mapping[str, PackedLinear]) -> list[list[str]]:
    """Names of layers that take equally long: the same format (shape, structure, sides, bias) in the model's order."""
    groups: dict[Any, list[str]] = {}
    for name, layer in packed.items():
        groups.setdefault(layer.format, []).append(name)
    return list(groups.values())


def _bias_bytes(layer: PackedLinear) -> int:
    return 0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size()
