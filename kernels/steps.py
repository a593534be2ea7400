"""Values that hold for ranges of token counts.

Figures are measured at token counts of `GRID` and hold down to the next smaller one that was measured: between two
powers of two the larger one says what to do, which favours the dense product, for few tokens alone take it the same
time at half of them. The last one of the grid holds for all that are more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

Value = TypeVar("Value")

GRID = tuple(2**power for power in range(15))
"""Token counts that are measured: 1 to 16,384."""


def bucket(tokens: int) -> int:
    """The token count of the grid whose figures hold for `tokens`."""
    return min(GRID[-1], 1 << max(0, tokens - 1).bit_length())


def octave(entries: int) -> int:
    """Counts of stored values that are alike: eighths of an octave, nine percent."""
    fraction = entries.bit_length() - 1
    return 8 * fraction + (8 * entries >> fraction) - 8 if entries else -1


@dataclass(frozen=True)
class Steps(Generic[Value]):
    """A value for every range of token counts: `values[i]` up to `limits[i]`; None beyond the last one, unless the grid
    ends there. Counts are compared with the limits alone, so that a traced graph depends on them alone.
    """

    limits: tuple[int, ...]
    values: tuple[Value, ...]

    @classmethod
    def of(cls, figures: Mapping[int, Value]) -> Steps[Value]:
        """Ranges whose values are equal become one."""
        rising = sorted(figures)
        changes = [one for one, after in pairwise(rising) if figures[one] != figures[after]]
        kept = (*changes, *rising[-1:])
        return cls(kept, tuple(figures[limit] for limit in kept))

    def at(self, tokens: int) -> Value | None:
        """What holds for so many tokens."""
        for limit, value in zip(self.limits, self.values, strict=True):
            if limit == GRID[-1] or tokens <= limit:
                return value
        return None
