"""Measuring a model's layers on a GPU: their kernels tuned and every path timed, for a grid of token counts.

Layers that are alike are measured once. A path that has fallen far behind the dense one is not followed to more tokens:
it ran on CUDA cores, whose time grows with the tokens where that of the dense product hardly does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from ..layout import Kernel, Layout
from ..steps import GRID, bucket
from . import measured, tuning
from .measured import Measured
from .paths import DENSE, signature
from .semi import Unavailable
from .timing import Timer, seconds

_log = logging.getLogger("padst_kernels")

HOPELESS = 4.0
"""Times the dense product's seconds from which on a path is not followed."""

Paths = Mapping[str, Callable[[Layout], Kernel]]
OnMeasured = Callable[[int, int, str], None]
"""Called with (cells done, cells in all, what comes next)."""


def silent(done: int, total: int, what: str) -> None:
    """Tell nobody what is measured."""
    del done, total, what


def calibrate(
    layouts: Iterable[Layout],
    dtype: torch.dtype,
    paths: Callable[[Layout], Paths],
    *,
    tokens: Sequence[int] = GRID,
    timer: Timer = seconds,
    deadline: float = float("inf"),
    on_measured: OnMeasured = silent,
) -> int:
    """Measure layers on the device where they are, for activations of `dtype`, and keep what was found.

    `paths` gives a layer's paths, the dense one among them. Past `deadline` (seconds of `time.monotonic`) what is left
    keeps its rules. Returns how many cells (a kind of layer at a token count) were left.
    """
    kinds = {signature(layout, dtype): layout for layout in layouts}
    grid = sorted({bucket(count) for count in tokens})
    total, done = len(kinds) * len(grid), 0
    with torch.inference_mode():
        for name, layout in kinds.items():
            followed = _ready(paths(layout), layout, dtype)
            for count in grid:
                if time.monotonic() > deadline:
                    return total - done
                on_measured(done, total, f"{name}, {count} tokens")
                times = _cell(layout, followed, count, dtype, timer)
                measured.keep(layout.tensors["values"].device, Measured(paths={name: {count: times}}))
                limit = HOPELESS * times[DENSE]
                followed = {path: kernel for path, kernel in followed.items() if times[path] <= limit}
                done += 1
    return 0


def _ready(paths: Paths, layout: Layout, dtype: torch.dtype) -> dict[str, Kernel]:
    """The paths made for the layer; one that torch has not here is said and left out."""
    found = {}
    for name, make in paths.items():
        try:
            kernel = make(layout)
            kernel.prepare(dtype)
        except Unavailable as error:
            _log.warning("%s serves no %s: %s", name, signature(layout, dtype), error)
        else:
            found[name] = kernel
    return found


def _cell(
    layout: Layout, kernels: Mapping[str, Kernel], tokens: int, dtype: torch.dtype, timer: Timer
) -> dict[str, float]:
    device = layout.tensors["values"].device
    x = torch.randn(tokens, layout.in_features, device=device, dtype=dtype)
    bias = torch.zeros(layout.out_features, device=device, dtype=dtype)
    return {name: tuning.tune(partial(kernel, x, bias), timer, device) for name, kernel in kernels.items()}
