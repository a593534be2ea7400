"""From soft to hard, layer by layer: the penalty's schedule, and when a soft permutation becomes an index.

PA-DST (Tyagi et al., 2025, arXiv 2510.14812): the loss gains lambda times the l1-l2 penalty of every soft matrix; a
layer whose normalised penalty falls under delta is rounded and from then on costs an index lookup. The deadline is
ours: a run has an end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.optim import Optimizer

from padst_cli.permutation.soft import normalised_penalty
from padst_cli.recipe import Recipe
from padst_cli.training.permutation import Permutation
from padst_cli.training.sparse_linear import SparseLinear

Cause = Literal["penalty", "deadline", "start"]


@dataclass(frozen=True)
class HardenedRecord:
    """One permutation that became its last index: after which step, at which normalised penalty (0 where it was an
    index all along), why ("start": before training), how many entries had moved, since the assignment and in training
    alone."""

    step: int
    layer: str
    penalty: float
    cause: Cause
    moved: int
    moved_in_training: int = 0


def labelled(layers: Mapping[str, SparseLinear]) -> dict[str, Permutation]:
    """The permutations of layers by label: the layer's name, with the side where both have one.

    One that several layers share is there once, under the name of the first of them.
    """
    found: dict[str, Permutation] = {}
    for name, layer in layers.items():
        sides = list(layer.permutations())
        for side, perm in sides:
            if all(perm is not other for other in found.values()):
                found[name if len(sides) == 1 else f"{name}:{side}"] = perm
    return found


def record_of(label: str, perm: Permutation, done: int, penalty: float, cause: Cause) -> HardenedRecord:
    """What there is to say of a permutation that has become its last index."""
    return HardenedRecord(done, label, penalty, cause, perm.moved, perm.moved_in_training)


def learned_before(layers: Mapping[str, SparseLinear], recipe: Recipe) -> list[HardenedRecord]:
    """The learned permutations that are indices when training begins and stay what they are."""
    if recipe.permutation.kind != "learned" or recipe.permutation.is_projected:
        return []
    found = labelled(layers).items()
    return [record_of(label, perm, 0, 0.0, "start") for label, perm in found if not perm.is_soft]


class Hardener:
    """The soft permutations of a model by label and their schedule."""

    def __init__(self, layers: Mapping[str, SparseLinear], recipe: Recipe) -> None:
        self.recipe = recipe.permutation
        self.steps = recipe.training.steps
        self.soft = {label: perm for label, perm in labelled(layers).items() if perm.is_soft}

    def penalty_weight(self, done: int) -> float:
        """Lambda after `done` steps: a line from 0 at `earliest` to its full value at `deadline`."""
        begin, end = self.recipe.earliest * self.steps, self.recipe.deadline * self.steps
        if end <= begin:
            return self.recipe.penalty_weight
        return self.recipe.penalty_weight * min(1.0, max(0.0, (done - begin) / (end - begin)))

    @property
    def penalised(self) -> dict[str, Permutation]:
        """Those that the forward pass multiplies by; what is only looked up is a permutation already."""
        return {label: perm for label, perm in self.soft.items() if perm.lookup is None}

    def penalty(self) -> Tensor:
        """The sum of the normalised penalties of all `penalised` permutations, a scalar.

        Normalised, because what a row of M does to the loss falls as one over its width; a sum, because layers do not
        share M.
        """
        return torch.stack([normalised_penalty(perm.matrix()) for perm in self.penalised.values()]).sum()

    @torch.no_grad()
    def penalties(self) -> dict[str, float]:
        """The normalised penalty of every `penalised` permutation, as the last projection left it."""
        soft = self.penalised
        if not soft:
            return {}
        found = torch.stack([normalised_penalty(perm.projected()) for perm in soft.values()])
        return dict(zip(soft, found.tolist(), strict=True))  # one wait for the device

    def project(self, done: int) -> None:
        """Bring all matrices back into the Birkhoff polytope after optimizer step `done`, and renew indices in use.

        Indices follow their matrices every `resolve_every` steps; process 0 decides for all.
        """
        for perm in self.soft.values():
            perm.project()
            if perm.lookup is not None and done % self.recipe.resolve_every == 0:
                perm.lookup.index.copy_(broadcast(perm.lookup.nearest(perm.start)))

    def due(self, done: int, final: bool = False) -> dict[str, tuple[float, Cause]]:
        """The permutations to harden after `done` steps, with their penalty and why; all of them where `final`."""
        if final or done >= self.recipe.deadline * self.steps:
            penalties = self.penalties()
            return {label: (penalties.get(label, 0.0), "deadline") for label in self.soft}
        if done < self.recipe.earliest * self.steps:
            return {}
        return {label: (value, "penalty") for label, value in self.penalties().items() if value < self.recipe.delta}

    def harden(self, label: str, done: int, penalty: float, cause: Cause, optimizer: Optimizer) -> HardenedRecord:
        """Round one permutation (process 0 does for all), take its matrix out of the optimizer and keep the index."""
        perm = self.soft.pop(label)
        (matrix,) = perm.parameters()
        perm.harden(broadcast(perm.rounded()))
        forget_parameter(optimizer, matrix)
        return record_of(label, perm, done, penalty, cause)


def forget_parameter(optimizer: Optimizer, parameter: Tensor) -> None:
    """Take a parameter and its moments out of an optimizer; the others keep their order, so that states still match."""
    optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        group["params"] = [each for each in group["params"] if each is not parameter]
