"""What long work reports while it runs: the pipeline's functions print nothing, they call back with these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """Base of all events; `to_json` is one line of `log.jsonl`."""

    def to_json(self) -> dict[str, Any]:
        """The event's fields under its class name, as JSON values."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Message(Event):
    """Something the user should read once."""

    text: str


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A phase of the run begins: `total` units of work (steps, layers, batches), None where unknown."""

    phase: str
    total: int | None = None


@dataclass(frozen=True)
class CalibrationProgress(Event):
    """One layer has its start: relative output error with the old weights on the support, and after the refit."""

    layer: str
    done: int
    total: int
    error_mask: float
    error: float


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step: mean loss and its terms, per-layer normalised penalty of what is still soft."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    hardened: int
    layers: int
    seconds: float
    items_seen: int
    terms: Mapping[str, float] = field(default_factory=dict)
    penalties: Mapping[str, float] = field(default_factory=dict)
    control: bool = False


@dataclass(frozen=True)
class Hardened(Event):
    """A learned permutation became its last index; `moved` of its entries differ from the assignment,
    `moved_in_training` from where training began.

    `penalty` is the normalised one it had as a matrix, 0 where it was an index all along (all learners but `soft`).
    """

    step: int
    layer: str
    penalty: float
    cause: Literal["penalty", "deadline", "start"]
    moved: int
    moved_in_training: int = 0


@dataclass(frozen=True)
class SupportUpdated(Event):
    """The support moved: how many entries of each layer were newly grown, and the density of all of them now."""

    step: int
    fraction: float
    moved: Mapping[str, int]
    density: float


@dataclass(frozen=True)
class Evaluated(Event):
    """A held-out evaluation: phase is dense, initial, during, final or dense_finetuned."""

    step: int
    metric: str
    value: float
    phase: str


@dataclass(frozen=True)
class Saved(Event):
    """A state from which the run can be resumed is whole on disk."""

    step: int
    path: str


@dataclass(frozen=True)
class CellFinished(Event):
    """One run of a study has ended, well or not: `done` of `total` are behind it."""

    cell: str
    done: int
    total: int


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The callback of those who do not listen."""
    del event
