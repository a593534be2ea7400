"""Measuring a model's layers on a GPU: their kernels tuned and every path timed, for a grid of token counts.

Layers that are alike are measured once. A path that has fallen far behind the dense one is not followed to more tokens:
it ran on CUDA cores, whose time grows with the tokens where that of the dense product hardly does.

Products are timed without their launches, as in a graph. Steps of training are launched one by one: their kernels are
tuned without launches, too, but a path is chosen with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..layout import Kernel, Layout
from ..steps import GRID, bucket
from . import measured, tuning
from .device import current
from .measured import Measured
from .paths import DENSE, signature
from .semi import Unavailable
from .timing import Timer, launched, seconds

_log = logging.getLogger("padst_kernels")

HOPELESS = 4.0
"""Times the dense product's seconds from which on a path is not followed."""

TRAINING_GRID = tuple(tokens for tokens in GRID if tokens >= 64)
"""Token counts that steps of training are measured at."""

Paths = Mapping[str, Callable[[Layout], Kernel]]
OnMeasured = Callable[[int, int, str], None]
"""Called with (cells done, cells in all, what comes next)."""

Work = Callable[[], object]
Looks = Callable[[int], Mapping[str, Callable[[], float]]]
"""For a number of tokens what measures each path, the dense one among them, in seconds."""


@dataclass(frozen=True)
class Kind:
    """Layers that are alike: where they are, and what prepares to measure them once their turn has come."""

    device: torch.device
    prepare: Callable[[], Looks]


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
    keeps its rules, and so does what the device has not the memory for. Returns how many cells (a kind of layer at a
    token count) were left.
    """
    kinds = {
        signature(layout, dtype): Kind(
            layout.tensors["values"].device, partial(_products, layout, paths, dtype=dtype, timer=timer)
        )
        for layout in layouts
    }
    with torch.inference_mode():
        return _measure(kinds, tokens, deadline, on_measured)


def calibrate_training(
    layers: Mapping[str, Callable[[], Callable[[int], Mapping[str, Work]]]],
    device: torch.device,
    *,
    tokens: Sequence[int] = TRAINING_GRID,
    tuner: Timer = seconds,
    timer: Timer = launched,
    deadline: float = float("inf"),
    on_measured: OnMeasured = silent,
) -> int:
    """As `calibrate`, for forward and backward passes of layers in training on `device`.

    `layers` has for every kind of layer, by its signature in training (`paths.signature_of`), what makes its steps: for
    a number of tokens a step by each path, the dense one among them.
    """
    kinds = {name: Kind(device, partial(_training, make, device, tuner, timer)) for name, make in layers.items()}
    with torch.enable_grad():
        return _measure(kinds, tokens, deadline, on_measured)


def _measure(kinds: Mapping[str, Kind], tokens: Sequence[int], deadline: float, on_measured: OnMeasured) -> int:
    grid = sorted({bucket(count) for count in tokens})
    total, done, left = len(kinds) * len(grid), 0, 0
    for number, (name, kind) in enumerate(kinds.items(), start=1):
        try:
            looks, behind = kind.prepare(), set[str]()
            for count in grid:
                if time.monotonic() > deadline:
                    return left + total - done
                on_measured(done, total, f"{name}, {count} tokens")
                times = {path: look() for path, look in looks(count).items() if path not in behind}
                measured.keep(kind.device, Measured(paths={name: {count: times}}))
                behind.update(path for path, taken in times.items() if taken > HOPELESS * times[DENSE])
                done += 1
        except torch.OutOfMemoryError as error:
            more = number * len(grid) - done
            _log.warning("%s: out of memory (%s), %d token counts are left to rules", name, _first_line(error), more)
            left, done = left + more, done + more
            torch.cuda.empty_cache()
    return left


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _products(layout: Layout, paths: Callable[[Layout], Paths], dtype: torch.dtype, timer: Timer) -> Looks:
    kernels, device = _ready(paths(layout), layout, dtype), layout.tensors["values"].device

    def looks(tokens: int) -> dict[str, Callable[[], float]]:
        x = torch.randn(tokens, layout.in_features, device=device, dtype=dtype)
        bias = torch.zeros(layout.out_features, device=device, dtype=dtype)
        return {name: partial(tuning.tune, partial(kernel, x, bias), timer, device) for name, kernel in kernels.items()}

    return looks


def _training(
    make: Callable[[], Callable[[int], Mapping[str, Work]]], device: torch.device, tuner: Timer, timer: Timer
) -> Looks:
    steps = make()

    def seconds_of(step: Work) -> float:
        tuning.tune(step, tuner, device)
        with current(device):
            return timer(step)

    return lambda tokens: {name: partial(seconds_of, step) for name, step in steps(tokens).items()}


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
