"""Statistics against cases worked out by hand (t of 0.975 with two degrees of freedom is 4.30265)."""

from __future__ import annotations

import math

import pytest

from padst_cli.study.statistics import gap_closed, interval, paired

T2 = 4.302652729911275


def test_the_interval_of_three_values() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found is not None
    half = T2 / math.sqrt(3)  # their standard deviation is 1
    assert (found.mean, found.count) == (2.0, 3)
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert found.half == pytest.approx(half)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_one_value_has_no_spread_and_none_has_no_mean() -> None:
    found = interval([4.0])
    assert found is not None
    assert (found.mean, found.low, found.high, found.error, found.half, found.count) == (4.0, None, None, None, None, 1)
    assert interval([]) is None


def test_differences_are_paired_by_the_seeds_that_both_have() -> None:
    found = paired({0: 3.0, 1: 50.0, 2: 5.0, 3: 4.0}, {3: 1.0, 2: 4.0, 1: 48.0, 9: 100.0})
    assert found is not None
    # 48 -> 50, 4 -> 5, 1 -> 4: the spread of the figures themselves is not in it.
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(T2 / math.sqrt(3))
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_the_gap_is_a_ratio_of_mean_gains() -> None:
    none = {0: 2.0, 1: 2.2, 2: 1.8}
    best = {0: 1.0, 1: 1.1, 2: 0.9}  # gains 1.0, 1.1, 0.9: mean 1, standard error 0.058
    assert gap_closed({0: 1.25, 1: 1.45, 2: 1.05}, none, best) == pytest.approx(0.75)
    assert gap_closed(none, none, best) == 0.0
    assert gap_closed(best, none, best) == 1.0
    assert gap_closed({seed: value + 0.5 for seed, value in none.items()}, none, best) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("best", "why"),
    [
        ({0: 1.0, 1: 2.3, 2: 1.7}, "gains 1, -0.1, 0.1: mean 0.33, standard error 0.33"),
        ({0: 3.0, 1: 3.2, 2: 2.8}, "unstructured is clearly worse than none"),
        ({0: 2.0, 1: 2.2, 2: 1.8}, "there is no gap at all"),
        ({0: 1.0}, "one seed shows no error"),
        ({}, "nothing to compare"),
    ],
)
def test_a_gap_that_is_not_clear_is_not_told(best: dict[int, float], why: str) -> None:
    none = {0: 2.0, 1: 2.2, 2: 1.8}
    assert gap_closed(dict.fromkeys(none, 1.5), none, best) is None, why


def test_three_standard_errors_are_the_border() -> None:
    none = {0: 0.0, 1: 0.0, 2: 0.0}
    # Gains m - d, m, m + d have the standard error d / sqrt(3): clear where m > sqrt(3) d.
    clear = {0: -(1.74 - 1.0), 1: -1.74, 2: -(1.74 + 1.0)}
    unclear = {0: -(1.73 - 1.0), 1: -1.73, 2: -(1.73 + 1.0)}
    assert gap_closed(clear, none, clear) == pytest.approx(1.0)
    assert gap_closed(unclear, none, unclear) is None
