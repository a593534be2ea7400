"""The teacher's logits of all items, computed once where training sees each item several times.

The dense model answers alike whenever an item comes, so a second pass over it is wasted: DeiT-Tiny as a teacher takes
a quarter of a step of a dense student, and more of a sparse one's. Kept only where it pays (`worth_remembering`) and
fits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from accelerate import Accelerator
from torch import Tensor

from padst_cli.data.items import Items, collate
from padst_cli.events import Message, OnEvent, ignore
from padst_cli.training.objective import Objective

if TYPE_CHECKING:
    from padst_cli.recipe import TrainingRecipe

BUDGET_BYTES: Final = 2**28
"""The most that all logits together may take: 67 thousand images of a thousand classes, or a few hundred short windows
of text with a vocabulary of thousands."""
_LEAST_VISITS: Final = 2
"""How often training must see every item."""


def worth_remembering(objective: Objective, items: int, recipe: TrainingRecipe) -> bool:
    """Whether there is a teacher who answers alike each time, and training asks about every item at least twice."""
    visits = recipe.steps * recipe.batch_size / max(items, 1)
    return objective.answers_alike and visits >= _LEAST_VISITS


@torch.no_grad()
def remember(
    objective: Objective, dataset: Items, rows: int, accelerator: Accelerator, on_event: OnEvent = ignore
) -> Tensor | None:
    """The teacher's logits `[items, ...]` on the device that trains; None where they would not fit.

    It is asked about `rows` items at a time in the data's own order, which makes what is remembered the same for a run
    that goes on as for one that was never stopped.
    """
    logits: Tensor | None = None
    for first in range(0, len(dataset), rows):
        numbers = range(first, min(first + rows, len(dataset)))
        batch = collate([dataset[number] for number in numbers])
        with accelerator.autocast():
            answer = objective.ask({key: value.to(accelerator.device) for key, value in batch.items()})
        if logits is None:
            size = len(dataset) * math.prod(answer.shape[1:]) * answer.element_size()
            if size > BUDGET_BYTES:
                return None
            megabytes = f"{size / 1e6:.3g} MB"
            on_event(Message(f"asking the dense model once about each of {len(dataset)} items, to keep ({megabytes})"))
            logits = answer.new_empty(len(dataset), *answer.shape[1:])
        logits[first : first + len(answer)] = answer
    return logits
