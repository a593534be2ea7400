"""What each way to compute a layer costs on this machine, and which is the fastest: numbers only, nothing is run here.

A product of T tokens takes call + features * edge(T) + entries * rate(T) seconds: `features` (inputs and outputs) pay
for moving activations, `entries` (stored values, or all entries of a dense weight) for the arithmetic. Edges and rates
are known on a grid of T and linear in between.
"""

from __future__ import annotations

import functools
import sys
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""The grid of token counts; past its end costs grow in proportion."""

NEVER = sys.maxsize

WORTH = 0.97
"""Leave the compiled kernel only where the other way is predicted to take this share of its time or less."""

FEW = 8
"""Up to so many tokens the compiled kernel runs in any case: writing a weight takes longer than reading it."""

_QUARTERS = 4
_LONGEST = 8 * TOKENS[-1]


@dataclass(frozen=True)
class Work:
    """What the cost of a layer depends on: its kernel's family, the dtype of its values by name, shape, stored values.

    Families are the structures, N:M by the bits of an index (`nm2`, `nm4`, `nm8`).
    """

    family: str
    value_dtype: str
    out_features: int
    in_features: int
    entries: int

    @classmethod
    def of(cls, structure: str, m: int, value_dtype: str, out_features: int, in_features: int, entries: int) -> Self:
        """The work of a layer of this structure; `m` counts for N:M only."""
        family = f"nm{index_bits(m)}" if structure == "nm" else structure
        return cls(family, value_dtype, out_features, in_features, entries)

    @property
    def dense_entries(self) -> int:
        """Entries of the dense weight."""
        return self.out_features * self.in_features

    @property
    def features(self) -> int:
        """Inputs and outputs."""
        return self.out_features + self.in_features


@dataclass(frozen=True)
class Curve:
    """The seconds of a product, see above; `edges` and `rates` are those of `TOKENS`."""

    call: float
    edges: tuple[float, ...]
    rates: tuple[float, ...]

    def seconds(self, tokens: int, features: int, entries: int) -> float:
        """Seconds of one call."""
        return self.call + features * _at(self.edges, tokens) + entries * _at(self.rates, tokens)


@dataclass(frozen=True)
class Unpack:
    """Seconds to write a dense weight from an image: a call, each entry of the weight, each stored value."""

    call: float
    entry: float
    value: float

    def seconds(self, work: Work) -> float:
        """Seconds of one call."""
        return self.call + self.entry * work.dense_entries + self.value * work.entries


@dataclass(frozen=True)
class Costs:
    """One machine with one number of threads: kernels and unpacking by `family dtype-of-values`, dense products by the
    dtype of the activations.
    """

    kernels: Mapping[str, Curve]
    unpacks: Mapping[str, Unpack]
    dense: Mapping[str, Curve]

    def kernel_seconds(self, work: Work, tokens: int) -> float:
        """The compiled kernel."""
        return self.kernels[_key(work)].seconds(tokens, work.features, work.entries)

    def dense_seconds(self, work: Work, tokens: int, dtype: str) -> float:
        """The dense product with activations of `dtype`, its weight at hand."""
        return self.dense[dtype].seconds(tokens, work.features, work.dense_entries)

    def transient_seconds(self, work: Work, tokens: int, dtype: str) -> float:
        """Unpacking the image into a dense weight, and the dense product."""
        return self.unpacks[_key(work)].seconds(work) + self.dense_seconds(work, tokens, dtype)

    def transient_from(self, work: Work, dtype: str) -> int:
        """The token count from which on unpacking pays, `NEVER` where it does not."""
        first = NEVER
        for tokens in reversed(_steps()):
            if tokens <= FEW or self.transient_seconds(work, tokens, dtype) > WORTH * self.kernel_seconds(work, tokens):
                break
            first = tokens
        return first

    def dense_gains(self, work: Work, dtype: str) -> bool:
        """Whether a dense weight at hand would be faster than the kernel and unpacking at some token count."""
        return any(
            self.dense_seconds(work, tokens, dtype)
            < WORTH * min(self.kernel_seconds(work, tokens), self.transient_seconds(work, tokens, dtype))
            for tokens in _steps()
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """The inverse of `to_json`; raises KeyError, TypeError, ValueError or AttributeError for anything else."""
        costs = cls(
            {key: _curve(value) for key, value in raw["kernels"].items()},
            {key: Unpack(**_numbers(value)) for key, value in raw["unpacks"].items()},
            {key: _curve(value) for key, value in raw["dense"].items()},
        )
        if not costs.kernels or costs.kernels.keys() != costs.unpacks.keys() or not costs.dense:
            raise ValueError("costs are incomplete")
        return costs


def index_bits(m: int) -> int:
    """Bits of an N:M index in an image (`nm_index_bits` of csrc/layout.h)."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


def resident_bound(structure: str, m: int, nonzeros: float, value_bytes: int) -> float:
    """The most bytes that a layer's weight may take in all its forms.

    Its nonzeros and 15 % for indices and permutations; of N:M 3 % and an index for each.
    """
    share = 1.03 + index_bits(m) / (8 * value_bytes) if structure == "nm" else 1.15
    return share * nonzeros * value_bytes


@functools.cache
def _steps() -> tuple[int, ...]:
    """Token counts to compare at: the grid, what follows it, and quarters in between."""
    steps, tokens = {1}, 1
    while tokens < _LONGEST:
        steps.update(tokens + tokens * quarter // _QUARTERS for quarter in range(_QUARTERS + 1))
        tokens *= 2
    return tuple(sorted(steps))


def _at(values: tuple[float, ...], tokens: int) -> float:
    if tokens >= TOKENS[-1]:
        return values[-1] * tokens / TOKENS[-1]
    place = bisect_left(TOKENS, tokens)
    if TOKENS[place] == tokens:
        return values[place]
    low, high = TOKENS[place - 1], TOKENS[place]
    return values[place - 1] + (values[place] - values[place - 1]) * (tokens - low) / (high - low)


def _key(work: Work) -> str:
    # What 16-bit values cost beside float32 ones is their width; bfloat16 stands for both kinds.
    return f"{work.family} {'float32' if work.value_dtype == 'float32' else 'bfloat16'}"


def _curve(raw: Mapping[str, Any]) -> Curve:
    edges, rates = (tuple(_numbers(dict(enumerate(raw[name]))).values()) for name in ("edges", "rates"))
    if len(edges) != len(TOKENS) or len(rates) != len(TOKENS):
        raise ValueError("a curve has another grid")
    return Curve(_numbers({"call": raw["call"]})["call"], edges, rates)


def _numbers(raw: Mapping[Any, Any]) -> dict[Any, float]:
    found = {key: float(value) for key, value in raw.items()}
    if not all(0 <= value < float("inf") for value in found.values()):
        raise ValueError("a cost is not a number of seconds")
    return found
