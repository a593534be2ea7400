"""The statistics of a study: means over seeds with t-intervals, paired differences, and the gap that is closed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from scipy import stats

LEVEL: Final = 0.95
"""Coverage of every interval."""
CLEAR: Final = 3.0
"""Standard errors that the denominator of *gap closed* must exceed: a ratio over less says nothing."""


@dataclass(frozen=True)
class Interval:
    """A mean over `count` values with its two-sided Student interval of coverage `LEVEL`.

    `low`, `high` and `error` (the standard error of the mean) are None for a single value, which has no spread.
    """

    mean: float
    low: float | None
    high: float | None
    error: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.mean


def interval(values: Sequence[float]) -> Interval | None:
    """Mean and t-interval of independent values; None without any."""
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, None, None, 1)
    error = float(stats.sem(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Interval(mean, mean - half, mean + half, error, count)


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """Mean of `one - other` over the seeds that both have, with the interval of those differences.

    Both are figures by seed. A seed decides the order of the data and every draw, so that differences within one seed
    spread less than the figures do.
    """
    return interval([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def gap_closed(method: Mapping[int, float], none: Mapping[int, float], best: Mapping[int, float]) -> float | None:
    """`(method - none) / (best - none)` of the means over the seeds that all three have; figures where less is better.

    0 is as good as no permutation, 1 as good as `best`, the unstructured control. None where `best` is not better than
    `none` by more than `CLEAR` standard errors of the paired difference, or where one seed alone shows no error.
    """
    seeds = method.keys() & none.keys() & best.keys()
    whole = paired({seed: none[seed] for seed in seeds}, {seed: best[seed] for seed in seeds})
    part = paired({seed: none[seed] for seed in seeds}, {seed: method[seed] for seed in seeds})
    if whole is None or part is None or whole.error is None or whole.mean <= CLEAR * whole.error:
        return None
    return part.mean / whole.mean
