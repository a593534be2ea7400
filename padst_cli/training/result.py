"""What a run has behind it while it lasts, and its figures once it is finished."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from padst_cli.training.hardening import HardenedRecord


@dataclass
class Progress:
    """What a run has behind it; part of the resumable state."""

    step: int = 0
    seconds: float = 0.0
    items_seen: int = 0
    loss: float = math.nan
    support_moved: int = 0
    hardened: list[HardenedRecord] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """The figures of a finished run.

    `loss` is that of the last step; `support_moved` counts newly grown entries over all updates; `permutations` has the
    keys learned, hardened_by_penalty, hardened_at_deadline (all others: that of a schedule, or the start of training
    where nothing is learned later), learned_before_training (those of the latter), moved_from_start (entries of all of
    them that left the assignment) and moved_in_training (those that left where training began).
    A permutation that several layers share counts once, and so do its entries.
    """

    steps: int
    seconds: float
    items_seen: int
    loss: float
    permutations: dict[str, int]
    support_moved: int


def result_of(progress: Progress) -> TrainResult:
    """The figures of a run that has come to its end."""
    causes = [record.cause for record in progress.hardened]
    return TrainResult(
        steps=progress.step,
        seconds=progress.seconds,
        items_seen=progress.items_seen,
        loss=progress.loss,
        permutations={
            "learned": len(causes),
            "hardened_by_penalty": causes.count("penalty"),
            "hardened_at_deadline": len(causes) - causes.count("penalty"),
            "learned_before_training": causes.count("start"),
            "moved_from_start": sum(record.moved for record in progress.hardened),
            "moved_in_training": sum(record.moved_in_training for record in progress.hardened),
        },
        support_moved=progress.support_moved,
    )
