"""What `padst bench` reports; the fields are its JSON keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from padst_cli.bench.device import DeviceFacts
from padst_cli.stopwatch import Rate


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best with the run's threads: bytes read and multiply-adds done a second."""

    read_bytes_per_s: float
    fma_per_s: float


@dataclass(frozen=True)
class Roofline:
    """What bounds a layer, the share of that limit it reached, and the time a call would take at the limit."""

    bound: Literal["bytes", "fma"]
    fraction: float
    limit_us: float


@dataclass(frozen=True)
class TimedRow:
    """One layer shape with one structure at one token count, timed; microseconds, bias and permutation included.

    `count` layers of the model are like it, `name` is the first. `dense_spread` and `sparse_spread` are interquartile
    ranges over medians. `density` is the achieved one, `kernel` what computed the sparse side.
    """

    name: str
    count: int
    out_features: int
    in_features: int
    structure: str
    density: float
    tokens: int
    dense_us: float
    sparse_us: float
    speedup: float
    kernel: str
    dense_spread: float
    sparse_spread: float


@dataclass(frozen=True)
class LayerRow(TimedRow):
    """A layer's product; `resident_bytes` are those of the weight after the runs in all its forms, `resident_bound` the
    most it may take.
    """

    parameters: Mapping[str, Any]
    resident_bytes: int
    resident_bound: float
    roofline: Roofline


@dataclass(frozen=True)
class FasterDense:
    """Layers like `name` that a dense weight beside the packed one would make faster at these token counts.

    `extra_bytes` is what it would take for all `count` of them.
    """

    name: str
    count: int
    tokens: tuple[int, ...]
    extra_bytes: int

    @property
    def sentence(self) -> str:
        """The same in words."""
        counts = ", ".join(map(str, self.tokens))
        layers = self.name if self.count == 1 else f"the {self.count} layers like {self.name}"
        return (
            f"{layers} would be faster dense at {counts} tokens; keeping dense weights beside the packed ones would "
            f"take {self.extra_bytes / 1e6:.1f} MB more"
        )


@dataclass(frozen=True)
class ModelRates:
    """Whole-model figures; `decode` is None for models that generate nothing. `resident_bytes` has the keys dense and
    sparse.
    """

    prefill: Rate
    decode: Rate | None
    resident_bytes: Mapping[str, int]


@dataclass(frozen=True)
class TrainRow(TimedRow):
    """A layer's training step: forward, and the gradients of input, weight and bias."""


@dataclass(frozen=True)
class TrainRates:
    """Training steps: layers, and the whole model's optimizer step, None where it was not measured."""

    layers: tuple[TrainRow, ...]
    step: Rate | None


@dataclass(frozen=True)
class BenchResult:
    """What `padst bench` reports; the fields are its JSON keys. `model` is None where only layers were measured.

    `break_even_density`: token count -> density at which sparse layers take as long as dense ones, None where they do
    at every density tried; the whole field is None where it was not asked for. `scratch_bytes`: of the one dense weight
    that all layers of a thread share where unpacking pays. `faster_dense`: layers that stay packed for the memory's
    sake. `train` is None where training steps were not asked for. On a GPU: `gpu` are its facts, `compiled` and
    `cuda_graphs` how both sides were run, `notes` what a reader must know besides.
    """

    device: str
    threads: int
    dtype: str
    value_dtype: str
    layers: tuple[LayerRow, ...]
    model: ModelRates | None
    break_even_density: Mapping[int, float | None] | None
    limits: Limits
    scratch_bytes: int
    faster_dense: tuple[FasterDense, ...]
    train: TrainRates | None = None
    gpu: DeviceFacts | None = None
    compiled: bool = False
    cuda_graphs: bool = False
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values (token counts as text keys)."""
        raw = asdict(self)
        raw["layers"], raw["notes"] = list(raw["layers"]), list(raw["notes"])
        if raw["train"] is not None:
            raw["train"]["layers"] = list(raw["train"]["layers"])
        raw["faster_dense"] = [{**asdict(one), "tokens": list(one.tokens)} for one in self.faster_dense]
        if self.break_even_density is not None:
            raw["break_even_density"] = {str(tokens): value for tokens, value in self.break_even_density.items()}
        return raw
