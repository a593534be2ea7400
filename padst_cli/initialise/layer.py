"""The start of one layer: its permutation, its support and the weights that survive."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from padst_cli.errors import PadstError
from padst_cli.events import Message, OnEvent, ignore
from padst_cli.initialise.one_shot import METHODS
from padst_cli.initialise.refine import Problem, refine
from padst_cli.initialise.refit import refit
from padst_cli.initialise.saliency import plain_saliency, refit_saliency
from padst_cli.initialise.start import LayerStart
from padst_cli.initialise.statistics import InputStatistics
from padst_cli.permutation.apply import from_structure, permute_columns, random_permutation, to_structure
from padst_cli.permutation.assignment import SearchResult, kept_share, search, search_shared
from padst_cli.plan import LayerPlan
from padst_cli.recipe import Recipe
from padst_cli.structures import Structure


def layer_seed(seed: int, name: str) -> int:
    """A seed of its own for every layer, whatever the order in which layers are taken."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def choose_order(score: Tensor, layer: LayerPlan, recipe: Recipe, perm_in: Tensor | None = None) -> SearchResult:
    """The permutations of `layer.sides` that the recipe's kind begins with, and the support that keeps most of `score`.

    `perm_in` is the input permutation where it was found before, for several layers together.
    """
    sides = tuple(side for side in layer.sides if side != "input" or perm_in is None)
    ordered = permute_columns(score, perm_in)
    seed = layer_seed(recipe.seed, layer.name)
    if recipe.permutation.kind in ("learned", "assignment"):
        found = search(ordered, layer.structure, sides, recipe.permutation.assignment_rounds, seed)
        return found if perm_in is None else replace(found, perm_in=perm_in)
    generator = torch.Generator().manual_seed(seed)
    perms: dict[str, Tensor] = {}
    if recipe.permutation.kind == "random":
        sizes = {"input": layer.in_features, "output": layer.out_features}
        perms = {side: random_permutation(sizes[side], generator).to(score.device) for side in sides}
    ordered = to_structure(ordered, perms.get("input"), perms.get("output"))
    mask = layer.structure.project(ordered)
    return SearchResult(perms.get("input", perm_in), perms.get("output"), mask, kept_share(ordered, mask), 0)


def choose_orders(scores: Sequence[Tensor], layers: Sequence[LayerPlan], recipe: Recipe) -> list[SearchResult]:
    """`choose_order` of layers that have one input permutation together: it comes first, then each layer's own part."""
    perm_in = None
    if len(layers) > 1:
        seed = layer_seed(recipe.seed, layers[0].shared[0])
        if recipe.permutation.kind == "random":
            generator = torch.Generator().manual_seed(seed)
            perm_in = random_permutation(layers[0].in_features, generator).to(scores[0].device)
        else:
            structures = [layer.structure for layer in layers]
            perm_in = search_shared(scores, structures, recipe.permutation.assignment_rounds, seed)
    return [choose_order(score, layer, recipe, perm_in) for score, layer in zip(scores, layers, strict=True)]


@dataclass(frozen=True)
class DenseLayer:
    """A layer as it was: its weight `[out, in]` in coordinates of W, its bias `[out]` or None, and how much each of its
    outputs counts in the choice of the support, `[out]`, None where all count alike."""

    weight: Tensor
    bias: Tensor | None
    output_weights: Tensor | None = None


def _saliency(dense: DenseLayer, aim: Tensor, statistics: InputStatistics, recipe: Recipe) -> Tensor:
    weight = dense.weight.detach().float()
    if recipe.calibration.refit:
        score = refit_saliency(weight, aim, statistics, recipe.calibration.damping)
    else:
        score = plain_saliency(weight, statistics)
    return score if dense.output_weights is None else score * dense.output_weights[:, None]


def start_layers(
    layers: Sequence[LayerPlan],
    dense: Sequence[DenseLayer],
    statistics: InputStatistics,
    recipe: Recipe,
    on_event: OnEvent = ignore,
) -> list[tuple[LayerStart, int]]:
    """The start of one layer, or of several that share their input permutation and read the same input.

    Also gives for each how many of its rows needed more damping. Raises `PadstError` that names the layer when the
    calibration inputs are not finite.
    """
    weights = [one.weight.detach().float() for one in dense]
    try:
        statistics.check_finite()
        aims = [statistics.aim(weight) for weight in weights]
        if recipe.calibration.start != "saliency":
            return [
                _one_shot(layer, weight, one.bias, aim, statistics, recipe)
                for layer, weight, one, aim in zip(layers, weights, dense, aims, strict=True)
            ]
        scores = [_saliency(one, aim, statistics, recipe) for one, aim in zip(dense, aims, strict=True)]
        assigned = choose_orders(scores, layers, recipe)
        orders = _refined(assigned, scores, layers, dense, aims, statistics, recipe, on_event)
        orders = [_opened(*each, recipe) for each in zip(orders, scores, layers, strict=True)]
        del scores
        return [
            _fill(layer, weight, one.bias, aim, order, first, statistics, recipe)
            for layer, weight, one, aim, order, first in zip(
                layers, weights, dense, aims, orders, assigned, strict=True
            )
        ]
    except PadstError as error:
        raise PadstError(f"{layers[0].name}: {error}") from None


def _refined(
    orders: Sequence[SearchResult],
    scores: Sequence[Tensor],
    layers: Sequence[LayerPlan],
    dense: Sequence[DenseLayer],
    aims: Sequence[Tensor],
    statistics: InputStatistics,
    recipe: Recipe,
    on_event: OnEvent,
) -> list[SearchResult]:
    """Supports refined for what the refit makes of them, where there is one, and with them orders to be learned."""
    calibration = recipe.calibration
    if not (calibration.refine_rounds and calibration.refit and statistics.tokens):
        return list(orders)
    learned = recipe.permutation.kind == "learned"
    problems = [
        Problem(
            one.weight.detach().float(),
            aim,
            statistics.gram,
            calibration.damping,
            layer.structure,
            layer.sides if learned else (),
            one.output_weights,
        )
        for layer, one, aim in zip(layers, dense, aims, strict=True)
    ]
    names, rounds = " and ".join(layer.name for layer in layers), calibration.refine_rounds

    def tell(done: int) -> None:
        on_event(Message(f"{names}: refined for {done} of {rounds} rounds, more would take too long at this width"))

    seed = layer_seed(recipe.seed, layers[0].name)
    refined = refine(problems, orders, rounds, seed, tell)
    ordered = [to_structure(score, one.perm_in, one.perm_out) for score, one in zip(scores, refined, strict=True)]
    return [replace(one, kept=kept_share(score, one.mask)) for one, score in zip(refined, ordered, strict=True)]


def opening(layer: LayerPlan, recipe: Recipe) -> Structure:
    """The structure at the density that training begins with."""
    start = recipe.support.start_density
    return layer.structure if start is None else layer.structure.at_density(start)


def _opened(order: SearchResult, score: Tensor, layer: LayerPlan, recipe: Recipe) -> SearchResult:
    """An order found for the structure as it will be, with the support that training begins with."""
    wide = opening(layer, recipe)
    if wide == layer.structure:
        return order
    ordered = to_structure(score, order.perm_in, order.perm_out)
    mask = wide.project(ordered)
    return replace(order, mask=mask, kept=kept_share(ordered, mask))


def _one_shot(
    layer: LayerPlan, weight: Tensor, bias: Tensor | None, aim: Tensor, statistics: InputStatistics, recipe: Recipe
) -> tuple[LayerStart, int]:
    """The layer as the one-shot method of the recipe leaves it, in its own order."""
    method = METHODS[recipe.calibration.start]
    pruned = method(weight, opening(layer, recipe), statistics, recipe.calibration.damping)
    before, after = statistics.relative_errors(weight, aim, (torch.where(pruned.mask, weight, 0.0), pruned.weight))
    start = LayerStart(
        name=layer.name,
        structure=layer.structure,
        weight=pruned.weight,
        mask=pruned.mask,
        bias=None if bias is None else bias.detach().clone(),
        perm_in=None,
        perm_out=None,
        error_mask=before,
        error=after,
        kept=kept_share(plain_saliency(weight, statistics), pruned.mask),
    )
    return start, pruned.escalated_rows


def _fill(
    layer: LayerPlan,
    weight: Tensor,
    bias: Tensor | None,
    aim: Tensor,
    order: SearchResult,
    assigned: SearchResult,
    statistics: InputStatistics,
    recipe: Recipe,
) -> tuple[LayerStart, int]:
    """The surviving weights of a layer whose permutations and support are known, as are those first `assigned`."""
    mask = from_structure(order.mask, order.perm_in, order.perm_out)
    masked = torch.where(mask, weight, 0.0)
    final, escalated = masked, 0
    if recipe.calibration.refit and statistics.tokens:
        result = refit(weight, mask, statistics.gram, aim, recipe.calibration.damping)
        final, escalated = result.weight, result.escalated_rows
    before, after = statistics.relative_errors(weight, aim, (masked, final))
    start = LayerStart(
        name=layer.name,
        structure=layer.structure,
        weight=to_structure(final, order.perm_in, order.perm_out).contiguous(),
        mask=order.mask,
        bias=None if bias is None else bias.detach().clone(),
        perm_in=order.perm_in,
        perm_out=order.perm_out,
        assigned_in=assigned.perm_in,
        assigned_out=assigned.perm_out,
        error_mask=before,
        error=after,
        kept=order.kept,
    )
    return start, escalated
