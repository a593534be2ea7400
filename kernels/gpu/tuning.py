"""Which cut of a kernel is the fastest for a layer and a number of tokens on this device: measured when asked for.

Every kernel has a space of Configs, the default first, and asks `tuned` for one at each launch. `tune` runs a piece
of work with every Config of every kernel that the work launches, times it, and keeps the fastest. Compiling a kernel
takes about a second a Config, so nothing is tuned unasked, and never while a graph is captured or traced: a launch
takes what is known of its device, or the default.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from ..steps import Steps, bucket, octave
from . import measured
from .device import current
from .measured import Cut, Measured
from .timing import Timer

AnyConfig = TypeVar("AnyConfig")
Place = tuple[str, int]
"""A kernel with what its speed depends on, and a token count of the grid."""


@dataclass
class _Trial:
    """What is tried now: `spaces` that launches asked with, and the Config that each place takes instead of its own.

    For the whole process and not for a thread, because backward passes launch from a thread of their own.
    """

    spaces: dict[Place, tuple[Any, ...]] = field(default_factory=dict)
    forced: dict[Place, Any] = field(default_factory=dict)


_trial: _Trial | None = None
_resolved: dict[tuple[int, str], tuple[dict[int, Cut], Steps[Cut]]] = {}


def tuned(
    kernel: str,
    space: tuple[AnyConfig, ...],
    tokens: int,
    x: torch.Tensor,
    values: torch.Tensor,
    out_features: int,
) -> AnyConfig:
    """How to cut a launch of `kernel` on x `[..., in]` and stored `values`, out of `space`; what a launch asks."""
    return chosen(features(kernel, x, values, out_features), tokens, space, x.device)


@functools.cache
def shares_operands(device: torch.device) -> bool:
    """Whether tensor cores take their operands from shared memory (Hopper on), so that larger tiles fit the registers.

    AMD's have registers enough; nothing is known of a device that is not at hand.
    """
    nvidia = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    return not nvidia or torch.cuda.get_device_properties(device).major >= 9


def features(kernel: str, x: torch.Tensor, values: torch.Tensor, out_features: int) -> str:
    """What the speed of a launch depends on, besides its tokens: shape, about how many values, dtypes."""
    kinds = "/".join(str(tensor.dtype).removeprefix("torch.") for tensor in (x, values))
    return f"{kernel} {out_features}x{x.shape[-1]} {octave(values.numel())} {kinds}"


def chosen(kernel: str, tokens: int, space: tuple[AnyConfig, ...], device: torch.device) -> AnyConfig:
    """How to cut a launch: the Config of `space` that is known to be the fastest, or the first one.

    `kernel` as from `features`.
    """
    if _trial is not None and isinstance(tokens, int):
        place = (kernel, bucket(tokens))
        _trial.spaces[place] = space
        if place in _trial.forced:
            forced: AnyConfig = _trial.forced[place]
            return forced
    if device.type != "cuda":
        return space[0]
    cut = _steps(kernel, device).at(tokens)
    if cut is None:
        return space[0]
    return _member(space, tuple(sorted(cut.items())))


def tune(work: Callable[[], object], timer: Timer, device: torch.device) -> float:
    """Time `work` with every Config of the kernels it launches, one kernel after the other, and keep the fastest.

    Returns the seconds of the work as it then is. A Config that the device refuses is passed over; where it refuses
    all of them, its error is raised.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("kernels cannot be tuned while a CUDA graph is captured")
    best: dict[Place, Any] = {}
    with current(device), _trying() as trial:
        _seconds_with(trial, best, work, timer)
        while untried := [place for place in trial.spaces if place not in best]:
            place = untried[0]
            space = trial.spaces[place]
            times = [_seconds_with(trial, {**best, place: cut}, work, timer) for cut in space]
            best[place] = space[times.index(min(times))]
        trial.forced = best
        seconds = timer(work)  # raises what is wrong where every Config was refused
    found = Measured()
    for (kernel, tokens), cut in best.items():
        found.cuts.setdefault(kernel, {})[tokens] = _cut(cut)
    if best:
        measured.keep(device, found)
    return seconds


@functools.lru_cache(maxsize=4096)
def _member(space: tuple[AnyConfig, ...], cut: tuple[tuple[str, int], ...]) -> AnyConfig:
    """The Config of `space` that is `cut`; the first one where it has none, as beside a limit of no power of two."""
    return next((each for each in space if tuple(sorted(_cut(each).items())) == cut), space[0])


def _cut(config: Any) -> Cut:
    return asdict(config)


@contextmanager
def _trying() -> Iterator[_Trial]:
    global _trial
    if _trial is not None:
        raise RuntimeError("kernels are being tuned already")
    _trial = _Trial()
    try:
        yield _trial
    finally:
        _trial = None


def _seconds_with(trial: _Trial, forced: dict[Place, Any], work: Callable[[], object], timer: Timer) -> float:
    trial.forced = forced
    try:
        return timer(work)
    except Exception as error:
        if not refused(error):
            raise
        return float("inf")


def refused(error: Exception) -> bool:
    """Whether a Config does not fit the device: too much shared memory or registers, or no code for it."""
    return any(kind.__module__.startswith("triton.") and kind.__name__ == "TritonError" for kind in type(error).__mro__)


def _steps(kernel: str, device: torch.device) -> Steps[Cut]:
    table = measured.of(device).cuts.get(kernel)
    if table is None:
        return Steps((), ())
    key = (device.index if device.index is not None else -1, kernel)
    known = _resolved.get(key)
    if known is None or known[0] is not table:
        known = _resolved[key] = (table, Steps.of(table))
    return known[1]
