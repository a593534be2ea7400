"""Timing two functions against each other: alternating runs, medians, and how far the runs spread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

OnProgress = Callable[[int, int, str], None]
"""Called with (measurements done, measurements in all, what comes next)."""


@dataclass(frozen=True)
class Timing:
    """How long to look: `repeats` runs a side, alternating, each of about `run_seconds`.

    Copies of a layer's weights are rotated until they sum to `rotate_bytes` (72 MiB, beyond the caches of the
    machines at hand), at most `max_copies`.
    """

    repeats: int = 9
    run_seconds: float = 0.05
    rotate_bytes: int = 72 * 2**20
    max_copies: int = 512

    def copies(self, size: int) -> int:
        """How many copies of weights of `size` bytes to rotate through."""
        return max(1, min(self.max_copies, math.ceil(self.rotate_bytes / size)))


class Turns:
    """A function that at each call does the next of several like things, from the first again after the last."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.count = len(calls)
        self._next = cycle(calls).__next__

    def __call__(self) -> Any:
        """Do the next one."""
        return self._next()()


def turns_of(step: Callable[[], Any]) -> int:
    """After how many calls a function starts over."""
    return step.count if isinstance(step, Turns) else 1


@dataclass(frozen=True)
class Pair:
    """Median seconds a call of both sides, and interquartile ranges over medians."""

    dense: float
    sparse: float
    dense_spread: float
    sparse_spread: float


@dataclass(frozen=True)
class Rate:
    """Units a second of the whole model: `unit` is tokens, sequences or images, `tokens` how many a call took in (or
    made).
    """

    unit: str
    tokens: int
    dense_per_s: float
    sparse_per_s: float
    speedup: float
    dense_spread: float
    sparse_spread: float

    @classmethod
    def of(cls, unit: str, tokens: int, done: int, pair: Pair) -> Rate:
        """The rate of calls that each do `done` units of work."""
        return cls(
            unit=unit,
            tokens=tokens,
            dense_per_s=done / pair.dense,
            sparse_per_s=done / pair.sparse,
            speedup=pair.dense / pair.sparse,
            dense_spread=pair.dense_spread,
            sparse_spread=pair.sparse_spread,
        )


class Stopwatch:
    """Alternating runs of two functions, timed by `torch.utils.benchmark.Timer`, which sets threads and waits for the
    GPU.
    """

    def __init__(self, timing: Timing, threads: int, device: torch.device) -> None:
        self.timing, self.threads, self.device = timing, threads, device

    def calls(self, dense: Callable[[], Any], sparse: Callable[[], Any]) -> Pair:
        """Seconds a call, with as many calls to a run as `run_seconds` hold."""
        return self.alternate(self._run(dense), self._run(sparse))

    def uncaptured(self, dense: Callable[[], Any], sparse: Callable[[], Any]) -> Pair:
        """As `calls`, for functions that no CUDA graph can hold, such as training steps."""
        return self.calls(dense, sparse)

    def _run(self, step: Callable[[], Any]) -> Callable[[], float]:
        step()
        seconds = self.once(step)
        if seconds > self.timing.run_seconds:
            # Timer makes calls of its own before each run, which would triple the time of long ones.
            return partial(self.once, step)
        timer = Timer("step()", globals={"step": step}, num_threads=self.threads)
        return partial(_mean, timer, max(1, round(self.timing.run_seconds / seconds)))

    def once(self, work: Callable[[], Any]) -> float:
        """Seconds that one call takes, without a call before it: for work that cannot be repeated as it is."""
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def alternate(self, dense: Callable[[], float], sparse: Callable[[], float]) -> Pair:
        """Medians over functions that return seconds, called in turn."""
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.timing.repeats):
            found[0].append(dense())
            found[1].append(sparse())
        (low, middle, high) = np.percentile(np.array(found), [25, 50, 75], axis=1)
        spread = (high - low) / middle
        return Pair(float(middle[0]), float(middle[1]), float(spread[0]), float(spread[1]))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _mean(timer: Timer, number: int) -> float:
    return float(timer.timeit(number).mean)


class Progress:
    """Counts measurements and tells a callback what comes next."""

    def __init__(self, callback: OnProgress | None, total: int) -> None:
        self.callback, self.total, self.done = callback, total, 0

    def next(self, what: str) -> None:
        """Say that `what` is measured next."""
        if self.callback:
            self.callback(self.done, self.total, what)
        self.done += 1


def crossing(curve: Sequence[tuple[float, float]]) -> float | None:
    """The density at which sparse time over dense time reaches 1, by linear interpolation of points in rising density.

    None where the ratio is over 1 from the first point on; the last density where it is still under 1 there.
    """
    if not curve or curve[0][1] > 1.0:
        return None
    for (low, under), (high, over) in pairwise(curve):
        if over > 1.0:
            return low + (high - low) * (1.0 - under) / (over - under)
    return curve[-1][0]
