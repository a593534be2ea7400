"""The logged events of a run, sorted into the curves that the report draws."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from padst_cli.errors import PadstError

Points = tuple[tuple[float, float], ...]
"""(step, value) pairs in order of steps."""

MOST_POINTS: Final = 400
"""A curve of more points than a chart has pixels only makes the page heavy."""


@dataclass(frozen=True)
class Hardening:
    """When, at what normalised penalty and why one permutation became its last index, and how many entries had moved.

    The penalty is 0 where it was an index all along.
    """

    label: str
    step: int
    penalty: float
    cause: Literal["penalty", "deadline", "start"]
    moved: int


@dataclass(frozen=True)
class History:
    """The curves of a run; those that did not happen are empty.

    `metric` holds the held-out values of the sparse model over the steps, `control_metric` those of the dense control.
    `moved` is the number of entries that each support update grew, `fraction` what share it was asked to move.
    """

    loss: Points
    task_loss: Points
    control_loss: Points
    learning_rate: Points
    metric: Points
    control_metric: Points
    dense_metric: float | None
    penalties: Mapping[str, Points]
    hardenings: tuple[Hardening, ...]
    moved: Points
    fraction: Points


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a `log.jsonl`, in order; raises `PadstError` where a line is not a JSON object."""
    events = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            event = None
        if not isinstance(event, dict) or "event" not in event:
            raise PadstError(f"line {number} of log '{path}' is not an event; the file is damaged")
        events.append(event)
    return events


def history(events: Sequence[Mapping[str, Any]]) -> History:
    """Sort logged events into curves of at most `MOST_POINTS` points each."""
    steps = [event for event in events if event["event"] == "Step"]
    own = [event for event in steps if not event.get("control")]
    control = [event for event in steps if event.get("control")]
    evaluated = [event for event in events if event["event"] == "Evaluated"]
    updates = [event for event in events if event["event"] == "SupportUpdated"]
    hardenings = tuple(
        Hardening(event["layer"], event["step"], event["penalty"], event["cause"], event["moved"])
        for event in events
        if event["event"] == "Hardened"
    )
    dense = [event["value"] for event in evaluated if event["phase"] == "dense"]
    return History(
        loss=thin((event["step"], event["loss"]) for event in own),
        task_loss=thin((event["step"], event["terms"]["task"]) for event in own if _is_mixed(event)),
        control_loss=thin((event["step"], event["loss"]) for event in control),
        learning_rate=thin((event["step"], event["learning_rate"]) for event in own),
        metric=_metric(evaluated, ("initial", "during", "final")),
        control_metric=_metric(evaluated, ("dense", "dense_finetuned")),
        dense_metric=dense[-1] if dense else None,
        penalties=_penalties(own, hardenings),
        hardenings=hardenings,
        moved=thin((event["step"], sum(event["moved"].values())) for event in updates),
        fraction=thin((event["step"], event["fraction"]) for event in updates),
    )


def _is_mixed(step: Mapping[str, Any]) -> bool:
    """Whether the loss of a step had a task's part beside others (an encoder without a head has none)."""
    terms = step.get("terms", {})
    return "task" in terms and len(terms) > 1


def thin(points: Iterable[tuple[float, float | None]], most: int = MOST_POINTS) -> Points:
    """Finite points only, of which every k-th and the last are kept when there are more than `most`."""
    finite = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    every = math.ceil(len(finite) / most)
    if every <= 1:
        return tuple(finite)
    kept = finite[::every]
    return tuple(kept if kept[-1] == finite[-1] else [*kept, finite[-1]])


def layer_of(label: str) -> str:
    """The layer's name from a permutation's label: `NAME` or, where both sides are permuted, `NAME:SIDE`."""
    name, _, side = label.rpartition(":")
    return name if side in ("input", "output") else label


def _metric(evaluated: Sequence[Mapping[str, Any]], phases: tuple[str, ...]) -> Points:
    chosen = sorted(
        (event for event in evaluated if event["phase"] in phases),
        key=lambda event: (event["step"], phases.index(event["phase"])),
    )
    return thin((event["step"], event["value"]) for event in chosen)


def _penalties(steps: Sequence[Mapping[str, Any]], hardenings: Sequence[Hardening]) -> dict[str, Points]:
    curves: dict[str, list[tuple[float, float | None]]] = {}
    for event in steps:
        for label, penalty in event.get("penalties", {}).items():
            curves.setdefault(label, []).append((event["step"], penalty))
    for done in hardenings:
        if done.label not in curves and done.penalty == 0.0:
            continue
        # The curve runs up to its mark, also where the log's steps are coarser than the schedule.
        curve = [point for point in curves.get(done.label, []) if point[0] < done.step]
        curves[done.label] = [*curve, (done.step, done.penalty)]
    return {label: thin(points, most=150) for label, points in curves.items()}
