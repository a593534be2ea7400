"""What was measured on a GPU, kept for the processes to come: cuts of kernels, and seconds of the paths of a layer.

There is one file for every device, version of torch and triton, and build of these kernels (../cache.py); without it,
and for what it does not know, defaults and rules hold.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import cache

KIND = "gpu"

Value = TypeVar("Value")
Cut = Mapping[str, int]
"""A kernel's Config by the names of its fields."""


@dataclass
class Measured:
    """`cuts`: kernel and layer -> tokens -> the fastest Config; `paths`: layer -> tokens -> path -> seconds a call."""

    cuts: dict[str, dict[int, Cut]] = field(default_factory=dict)
    paths: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {"cuts": self.cuts, "paths": self.paths}

    @classmethod
    def from_json(cls, raw: Any) -> Measured:
        """The inverse of `to_json`; raises KeyError, TypeError, ValueError or AttributeError for anything else."""
        return cls(_table(raw["cuts"], _whole), _table(raw["paths"], _seconds))

    def updated(self, newer: Measured) -> Measured:
        """The figures of both, the newer ones where both have some."""
        return Measured(_joined(self.cuts, newer.cuts), _joined(self.paths, newer.paths))


def device_key(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    facts = torch.cuda.get_device_properties(device)
    return {
        "gpu": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "processors": str(facts.multi_processor_count),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "kernels": _build(),
    }


def of(device: torch.device) -> Measured:
    """What is known of a device; nothing where it is not a GPU at hand."""
    if device.type != "cuda":
        return Measured()
    if device.index is None:
        return _known(torch.cuda.current_device()) if torch.cuda.is_available() else Measured()
    return _known(device.index)


def keep(device: torch.device, newer: Measured) -> None:
    """Add figures, for this process and those to come; what others kept meanwhile stays."""
    known, key = of(device), device_key(device)
    with cache.changing(KIND, key):
        joined = (cache.read(KIND, key, Measured.from_json) or Measured()).updated(known).updated(newer)
        cache.write(KIND, key, joined.to_json())
    known.cuts, known.paths = joined.cuts, joined.paths


@functools.cache
def _known(index: int) -> Measured:
    if not torch.cuda.is_available():
        return Measured()
    return cache.read(KIND, device_key(torch.device("cuda", index)), Measured.from_json) or Measured()


def forget() -> None:
    """Read the files anew when next asked, as in a new process."""
    _known.cache_clear()


@functools.cache
def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _build() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _table(raw: Mapping[str, Any], parse: Callable[[Any], Value]) -> dict[str, dict[int, Value]]:
    return {name: {int(tokens): parse(value) for tokens, value in by_tokens.items()} for name, by_tokens in raw.items()}


def _whole(raw: Mapping[str, Any]) -> Cut:
    if not raw or not all(type(value) is int and value >= 0 for value in raw.values()):
        raise ValueError(f"{raw} is not how a kernel is cut")
    return dict(raw)


def _seconds(raw: Mapping[str, Any]) -> dict[str, float]:
    found = {name: float(value) for name, value in raw.items()}
    if not found or not all(0 <= value < float("inf") for value in found.values()):
        raise ValueError("a cost is not a number of seconds")
    return found


def _joined(old: dict[str, dict[int, Value]], new: dict[str, dict[int, Value]]) -> dict[str, dict[int, Value]]:
    return {name: {**old.get(name, {}), **new.get(name, {})} for name in (*old, *(set(new) - set(old)))}
