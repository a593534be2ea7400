"""The start of one layer: its permutation, its support and the weights that survive."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from padst_cli.errors import PadstError
from padst_cli.initialise.refit import refit
from padst_cli.initialise.saliency import plain_saliency, refit_saliency
from padst_cli.initialise.start import LayerStart
from padst_cli.initialise.statistics import InputStatistics
from padst_cli.permutation.apply import from_structure, random_permutation, to_structure
from padst_cli.permutation.assignment import SearchResult, kept_share, search
from padst_cli.plan import LayerPlan
from padst_cli.recipe import Recipe


def layer_seed(seed: int, name: str) -> int:
    """A seed of its own for every layer, whatever the order in which layers are taken."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def choose_order(score: Tensor, layer: LayerPlan, recipe: Recipe) -> SearchResult:
    """The permutations of `layer.sides` after the recipe's kind, and the support that keeps the most of `score`."""
    seed = layer_seed(recipe.seed, layer.name)
    if recipe.permutation.kind in ("learned", "assignment"):
        return search(score, layer.structure, layer.sides, recipe.permutation.assignment_rounds, seed)
    generator = torch.Generator().manual_seed(seed)
    perms: dict[str, Tensor] = {}
    if recipe.permutation.kind == "random":
        sizes = {"input": layer.in_features, "output": layer.out_features}
        perms = {side: random_permutation(sizes[side], generator).to(score.device) for side in layer.sides}
    perm_in, perm_out = perms.get("input"), perms.get("output")
    ordered = to_structure(score, perm_in, perm_out)
    mask = layer.structure.project(ordered)
    return SearchResult(perm_in, perm_out, mask, kept_share(ordered, mask), 0)


def _saliency(weight: Tensor, aim: Tensor, statistics: InputStatistics, recipe: Recipe) -> Tensor:
    if recipe.calibration.refit:
        return refit_saliency(weight, aim, statistics, recipe.calibration.damping)
    return plain_saliency(weight, statistics)


def start_layer(
    layer: LayerPlan, weight: Tensor, bias: Tensor | None, statistics: InputStatistics, recipe: Recipe
) -> tuple[LayerStart, int]:
    """Make one layer's start from its dense `weight` `[out, in]`; also returns how many rows needed more damping.

    Raises `PadstError` that names the layer when its calibration inputs are not finite.
    """
    weight = weight.detach().float()
    final, escalated = None, 0
    try:
        statistics.check_finite()
        aim = statistics.aim(weight)
        order = choose_order(_saliency(weight, aim, statistics, recipe), layer, recipe)
        mask = from_structure(order.mask, order.perm_in, order.perm_out)
        masked = torch.where(mask, weight, 0.0)
        if recipe.calibration.refit and statistics.tokens:
            result = refit(weight, mask, statistics.gram, aim, recipe.calibration.damping)
            final, escalated = result.weight, result.escalated_rows
    except PadstError as error:
        raise PadstError(f"{layer.name}: {error}") from None
    final = masked if final is None else final
    before, after = statistics.relative_errors(weight, aim, (masked, final))
    start = LayerStart(
        name=layer.name,
        structure=layer.structure,
        weight=to_structure(final, order.perm_in, order.perm_out).contiguous(),
        mask=order.mask,
        bias=None if bias is None else bias.detach().clone(),
        perm_in=order.perm_in,
        perm_out=order.perm_out,
        error_mask=before,
        error=after,
        kept=order.kept,
    )
    return start, escalated
