"""The learner `projected`: hard at every step, with a latent dense weight behind the support and its order.

The forward pass uses the latent weight on the present support alone, in the present order; the gradient of the whole
dense weight reaches the latent one (straight through the projection, as in Bengio et al., 2013, arXiv 1308.3432, and
for supports in Jayakumar et al., "Top-KAST", NeurIPS 2020), so that an entry can grow before it counts. At each update
of the support, order and support are chosen anew for the saliency W^2 E[x^2] of the latent weight: the search by
assignment (`permutation/assignment.py`) starts from the present order, and a new one is taken only where it keeps more
of the saliency by a margin, because every jump costs what training had built on the old order.

Both halves are made cheap: values outside the support hear the gradient of every `GRADIENT_EVERY`th step alone, and an
update goes `SEARCH_ROUNDS` further from the present order, where the assignment at the start goes on until it rests.
Like the matrices of the soft learner, latent weights are gone at the deadline: most of the run must belong to weights
that know their final order. From there on supports move as the recipe's method has it.

The latent weight is held in the coordinates of S, like every sparse layer's, so that nothing but an update knows of it;
whoever takes a new order carries the weight, its gradient and its moments along. A layer without a permutation (the
unstructured control) has its support chosen anew just the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor
from torch.optim import Optimizer

from padst_cli.permutation.apply import compose, from_structure, identity, to_structure
from padst_cli.permutation.assignment import kept_share, search_together
from padst_cli.recipe import PermutationRecipe, Recipe
from padst_cli.training.hardening import HardenedRecord, labelled, record_of
from padst_cli.training.seeds import seeded
from padst_cli.training.sparse_linear import SparseLinear

GRADIENT_EVERY: Final = 4
"""Steps from one dense gradient of a latent weight to the next; in between its support alone is trained."""
SEARCH_ROUNDS: Final = 1
"""Rounds of the search for an order at each update: it begins at an order that was searched before."""


@dataclass(frozen=True)
class Change:
    """How a layer's present order changes and the support `mask` `[out, in]` in the new one.

    `perm_in` int32 `[in]` and `perm_out` int32 `[out]` permute S itself (the identity where the order stays), None on a
    side without a permutation. `kept` is the share of the saliency on the support.
    """

    perm_in: Tensor | None
    perm_out: Tensor | None
    mask: Tensor
    kept: float


def saliency(layer: SparseLinear) -> Tensor:
    """W^2 E[x^2] of the latent weight, `[out, in]` in the coordinates of S; only once the layer has seen inputs."""
    assert layer.latent is not None
    squares = layer.latent.mean_squares()
    if layer.perm_in is not None:
        squares = squares[layer.perm_in.rounded().long()]
    return layer.weight.detach().square() * squares


@torch.no_grad()
def choose(layers: Sequence[SparseLinear], recipe: PermutationRecipe, seed: int) -> list[Change]:
    """The next order and support of one layer, or of several that have one input permutation together.

    A new order must keep more of the saliency than the present one by `recipe.margin`, in the mean over the layers,
    each with the best support for it.
    """
    scores = [saliency(layer) for layer in layers]
    stays = [_stay(layer, score) for layer, score in zip(layers, scores, strict=True)]
    moves = _search(layers, scores, seed)
    gain = sum(move.kept - stay.kept for move, stay in zip(moves, stays, strict=True)) / len(layers)
    return moves if gain > recipe.margin else stays


def _stay(layer: SparseLinear, score: Tensor) -> Change:
    mask = layer.structure.project(score)
    perms = {side: identity(len(perm.start), score.device) for side, perm in layer.permutations()}
    return Change(perms.get("input"), perms.get("output"), mask, kept_share(score, mask))


def _search(layers: Sequence[SparseLinear], scores: Sequence[Tensor], seed: int) -> list[Change]:
    """The best order met from the present one: in the coordinates of S, that is from the identity."""
    sides = [tuple(side for side, _ in layer.permutations()) for layer in layers]
    found = search_together(scores, [layer.structure for layer in layers], sides, SEARCH_ROUNDS, seed)
    return [Change(each.perm_in, each.perm_out, each.mask, each.kept) for each in found]


class Projection:
    """The layers of a model whose weight is latent (`layers`, by name) and their updates until the deadline.

    `permutations` are theirs by label, one that several layers share once.
    """

    def __init__(self, layers: Mapping[str, SparseLinear], recipe: Recipe) -> None:
        self.recipe = recipe
        self.layers = {name: layer for name, layer in layers.items() if layer.latent is not None}
        self.permutations = labelled(self.layers)

    def is_due(self, done: int) -> bool:
        """Whether orders and supports are chosen anew in the step that follows `done` finished ones."""
        return done > 0 and done % self.recipe.support.every == 0

    def is_over(self, done: int) -> bool:
        """Whether latent values have had their share of the run after `done` steps."""
        return bool(self.layers) and done >= self.recipe.permutation.deadline * self.recipe.training.steps

    def average(self) -> None:
        """Make the mean squares those of all processes' inputs: they must find, and resume with, the same."""
        for layer in self.layers.values():
            assert layer.latent is not None
            for total in layer.latent.buffers():
                total.copy_(reduce(total, "mean"))

    def update(self, index: int, optimizer: Optimizer) -> dict[str, int]:
        """Choose every order and support anew in step `index`; returns how many entries of W are new in each support.

        Process 0 decides for all. A layer that took no part since the last update (an unused branch) stays as it is.
        """
        grown = dict.fromkeys(self.layers, 0)
        for number, names in enumerate(self._groups()):
            group = [self.layers[name] for name in names]
            if not all(layer.latent is not None and layer.latent.has_seen for layer in group):
                continue
            seed = seeded(self.recipe.seed, index, number).initial_seed()
            changes = [_agreed(change) for change in choose(group, self.recipe.permutation, seed)]
            for name, count in zip(names, _apply(group, changes, optimizer), strict=True):
                grown[name] = count
        return grown

    def _groups(self) -> list[list[str]]:
        """Names of layers that have one input permutation together; every other layer alone."""
        groups: dict[int, list[str]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(id(layer if layer.perm_in is None else layer.perm_in), []).append(name)
        return list(groups.values())

    def settle(self, done: int, optimizer: Optimizer) -> list[HardenedRecord]:
        """Drop all latent values after `done` steps: from here on these are ordinary sparse layers.

        The records say how far each permutation came; as it was an index all along, its penalty is 0.
        """
        for layer in self.layers.values():
            for moment in _moments(layer, optimizer):
                moment.masked_fill_(~layer.mask, 0.0)
            layer.drop_latent()
        records = [record_of(label, perm, done, 0.0, "deadline") for label, perm in self.permutations.items()]
        self.layers, self.permutations = {}, {}
        return records


def _agreed(change: Change) -> Change:
    perm_in, perm_out = (None if perm is None else broadcast(perm) for perm in (change.perm_in, change.perm_out))
    return Change(perm_in, perm_out, broadcast(change.mask.view(torch.uint8)).view(torch.bool), change.kept)


def _moments(layer: SparseLinear, optimizer: Optimizer) -> list[Tensor]:
    """What the optimizer holds of every entry of the layer's weight."""
    state = optimizer.state.get(layer.weight, {}).values()
    return [each for each in state if isinstance(each, Tensor) and each.shape == layer.weight.shape]


@torch.no_grad()
def _apply(layers: Sequence[SparseLinear], changes: Sequence[Change], optimizer: Optimizer) -> list[int]:
    """Take the new order and supports of layers with one input permutation; returns the entries new in each support."""
    before = [_in_model_order(layer).clone() for layer in layers]
    for layer, change in zip(layers, changes, strict=True):
        gradient = [] if layer.weight.grad is None else [layer.weight.grad]
        for tensor in (layer.weight, *gradient, *_moments(layer, optimizer)):
            tensor.copy_(to_structure(tensor, change.perm_in, change.perm_out))
        layer.mask.copy_(change.mask)
        assert layer.latent is not None
        layer.latent.forget()
        if layer.perm_out is not None and change.perm_out is not None:
            layer.perm_out.set_index(compose(change.perm_out, layer.perm_out.rounded()))
    shared, turn = layers[0].perm_in, changes[0].perm_in
    if shared is not None and turn is not None:
        shared.set_index(compose(shared.rounded(), turn))
    return [int((_in_model_order(layer) & ~old).sum()) for layer, old in zip(layers, before, strict=True)]


def _in_model_order(layer: SparseLinear) -> Tensor:
    """The mask `[out, in]` in the coordinates of W."""
    perms = {side: perm.rounded() for side, perm in layer.permutations()}
    return from_structure(layer.mask, perms.get("input"), perms.get("output"))
