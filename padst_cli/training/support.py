"""Moving the support: every few steps a cosine-decaying fraction of each layer's active units is dropped and regrown.

One mechanism serves all structures: a structure only says what its units are and how to sum a score over them
(`structures/base.py`). The methods differ in the two scores. RigL (Evci et al., ICML 2020): drop by |w|, grow by |dense
gradient|. SET (Mocanu et al., 2018): drop by |w|, grow at random. MEST (Yuan et al., NeurIPS 2021): drop by |w| + gamma
|gradient|, grow at random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from padst_cli.recipe import SupportRecipe
from padst_cli.structures import Structure
from padst_cli.training.sparse_linear import SparseLinear


def is_due(recipe: SupportRecipe, done: int, steps: int) -> bool:
    """Whether the support moves in the step that follows `done` finished ones."""
    moving = recipe.method != "static" and 0 < done < recipe.until * steps
    return moving and done % recipe.every == 0


def fraction_at(recipe: SupportRecipe, done: int, steps: int) -> float:
    """The fraction of active units to move: `fraction / 2 (1 + cos(pi t / t_end))` (RigL, equation 1)."""
    return recipe.fraction / 2 * (1 + math.cos(math.pi * done / (recipe.until * steps)))


def at_rest(
    layers: Mapping[str, SparseLinear], recipe: SupportRecipe, steps: int, done: int = 0
) -> tuple[list[str], str]:
    """(names of layers whose support no update after `done` steps will move, why); none where all is as asked.

    The next update moves most: where it comes too late, or its share of a layer's units rounds to none, none will.
    """
    chosen_anew = recipe.method == "dynadiag" or recipe.start_density is not None
    if recipe.method == "static" or chosen_anew or not steps:
        return [], ""
    following = recipe.every * max(1, math.ceil(done / recipe.every))
    if not is_due(recipe, following, steps):
        last = math.ceil(recipe.until * steps)
        return list(layers), f"updates come every {recipe.every} steps and end before step {last}"
    fraction = fraction_at(recipe, following, steps)
    few = [name for name, layer in layers.items() if _count(layer.structure.units_of(layer.mask), fraction) == 0]
    return few, f"the share {fraction:.3g} of its units, which an update moves at most, rounds to none"


def _count(active: Tensor, fraction: float) -> int:
    """How many of the active units an update moves."""
    return round(fraction * int(active.sum()))


def move_units(active: Tensor, drop_score: Tensor, grow_score: Tensor, fraction: float) -> Tensor:
    """The next active units, bool `[groups, candidates]`, with as many in every group as before.

    Of all active units of the layer the `fraction` with the lowest `drop_score` goes; in each group as many inactive
    units with the highest `grow_score` come, those just dropped among them, as in RigL. A grow score of -inf marks what
    can never be a unit.
    """
    count = _count(active, fraction)
    if count == 0:
        return active
    order = torch.where(active, drop_score, torch.inf).flatten().argsort(stable=True)
    kept = active.flatten().clone()
    kept[order[:count]] = False
    kept = kept.view_as(active)
    wanted = (active & ~kept).sum(dim=1, keepdim=True)
    rank = torch.where(kept, -torch.inf, grow_score).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return kept | ((rank < wanted) & ~kept)


@torch.no_grad()
def next_mask(
    layer: SparseLinear,
    recipe: SupportRecipe,
    fraction: float,
    generator: torch.Generator,
    narrowed: Structure | None = None,
) -> Tensor:
    """The mask `[out, in]` that `layer` moves to, from its weight and its dense gradient.

    Where the density falls, `narrowed` is the structure at the density of this step: its units are the best of those
    that are active, and drop and growth follow among them. `generator` is a CPU generator, so that random growth is the
    same on every device and process.
    """
    if layer.gates is not None:
        return layer.gates.support()
    structure = layer.structure
    gradient = layer.weight.grad
    magnitude = torch.where(layer.mask, layer.weight, 0.0).abs()
    drop = structure.unit_scores(magnitude)
    if recipe.method == "mest" and gradient is not None:
        drop = structure.unit_scores(magnitude + recipe.mest_gamma * gradient.abs())
    active = structure.units_of(layer.mask)
    if narrowed is not None:
        active = narrowed.select(torch.where(active, drop, -torch.inf))
    if gradient is None or fraction == 0.0:
        # A layer that took no part in the step (an unused branch) has nothing to grow by.
        return structure.expand(active)
    grow = structure.unit_scores(gradient.abs())
    if recipe.method in ("set", "mest"):
        draw = torch.rand(grow.shape, generator=generator).to(grow)
        grow = torch.where(grow.isfinite(), draw, -torch.inf)
    return structure.expand(move_units(active, drop, grow, fraction))


@torch.no_grad()
def move_support(layer: SparseLinear, mask: Tensor, optimizer: Optimizer) -> int:
    """Make `mask` the layer's support; returns how many entries are newly in it.

    What left becomes zero, so that it comes back from zero (DynaDiag keeps it: there it is a latent value), and the
    optimizer forgets its moments of every entry that moved.
    """
    changed = mask ^ layer.mask
    grown = int((changed & mask).sum())
    if layer.gates is None:
        layer.weight.masked_fill_(changed, 0.0)
    for moment in optimizer.state.get(layer.weight, {}).values():
        if isinstance(moment, Tensor) and moment.shape == changed.shape:
            moment.masked_fill_(changed, 0.0)
    layer.mask.copy_(mask)
    return grown
