"""Densities that follow the data: how the budget of nonzeros is split once the layers' inputs are known.

`owl`: blocks with more outliers stay denser, after outlier weighed layerwise sparsity (Yin et al., 2023, arXiv
2310.05175). `error`: the budget goes where it lowers the summed relative refit error the most. Both look at the dense
model alone and keep the number of nonzeros of a uniform density.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from padst_cli.errors import PadstError
from padst_cli.events import Message, OnEvent
from padst_cli.initialise.blocks import find_block, find_units
from padst_cli.initialise.calibrate import dense_layer, evaluating, kept_tokens
from padst_cli.initialise.layer import start_layers
from padst_cli.initialise.statistics import InputStatistics
from padst_cli.initialise.streams import Stream
from padst_cli.plan import LayerPlan, Plan, fit
from padst_cli.recipe import Recipe
from padst_cli.structures import DoesNotFit

OUTLIER = 5.0
"""An entry of |W| |x| is an outlier from so many times its block's mean on (M of the paper)."""
SPREAD = 0.08
"""The most by which a block's density departs from the mean (lambda of the paper)."""
DENSITIES = (0.5, 0.75, 1.0, 1.5, 2.0)
"""The refit error is measured at the requested density times these."""


@torch.no_grad()
def allocate(
    teacher: nn.Module, plan: Plan, batches: Sequence[dict[str, Tensor]], recipe: Recipe, on_event: OnEvent
) -> dict[str, float]:
    """The density of every planned layer by name, after `recipe.allocation` ("owl" or "error").

    `plan` is that of a uniform density. Layers of which the data say nothing (no calibration input, zero weights) keep
    it, and the others share what is left. Raises `PadstError` where `--nm` leaves nothing to split, and as `initialise`
    does.
    """
    if recipe.nm is not None:
        raise PadstError(f"--allocation {recipe.allocation} needs freedom: leave out --nm {recipe.nm}")
    density = 1.0 - recipe.sparsity
    layers = {layer.name: layer for layer in plan.layers}
    with evaluating(teacher):
        seen = _inputs_of(teacher, layers, batches)
        if recipe.allocation == "owl":
            found = _by_outliers(teacher, layers, seen, density)
        else:
            curves = {layer.name: _curve(teacher, layer, statistics, recipe) for layer, statistics in seen}
            found = split_budget({name: curve for name, curve in curves.items() if curve.points}, density)
    densities = {name: found.get(name, density) for name in layers}
    low, high = min(densities, key=densities.__getitem__), max(densities, key=densities.__getitem__)
    on_event(
        Message(
            f"{recipe.allocation} gives densities from {densities[low]:.3f} ({low}) to {densities[high]:.3f} ({high})"
        )
    )
    return densities


def _inputs_of(
    model: nn.Module, layers: Mapping[str, LayerPlan], batches: Sequence[dict[str, Tensor]]
) -> Iterator[tuple[LayerPlan, InputStatistics]]:
    """Every layer with the second moments of its inputs in the dense model, one input in memory at a time."""
    device = next(model.parameters()).device
    inputs = [{key: value.to(device) for key, value in batch.items() if key != "labels"} for batch in batches]
    units = find_units(model, list(layers), inputs[0])
    stream = Stream(model, units, inputs)
    for unit in units:
        stream.advance()
        for group in unit.groups:
            statistics = InputStatistics(layers[group.layers[0]].in_features, device)
            for index, batch in enumerate(inputs):
                read = stream.layer_inputs(group, index)
                statistics.add(read, read, kept_tokens(batch))
            for name in group.layers:
                yield layers[name], statistics


# -- outliers ----------------------------------------------------------------------------------------------------------


def _by_outliers(
    model: nn.Module,
    layers: Mapping[str, LayerPlan],
    seen: Iterator[tuple[LayerPlan, InputStatistics]],
    density: float,
) -> dict[str, float]:
    """Densities of the layers that have an entry |W| |x| other than zero; the rest cannot have outliers, nor say what
    a mean is.
    """
    scores: dict[str, list[Tensor]] = {}
    shares: dict[str, float] = {}
    blocks: dict[str, str] = {}
    last = ""
    for layer, statistics in seen:
        score = dense_layer(model, layer).weight.float().abs() * statistics.gram.diagonal().sqrt()
        if not bool(score.any()):
            continue
        block = blocks[layer.name] = find_block(model, layer.name) or layer.name
        if last not in ("", block):
            shares[last] = outlier_share(scores.pop(last))
        last = block
        scores.setdefault(block, []).append(score)
    shares |= {block: outlier_share(parts) for block, parts in scores.items()}
    sizes = dict.fromkeys(shares, 0)
    for name, block in blocks.items():
        sizes[block] += layers[name].out_features * layers[name].in_features
    shifts = bounded_shifts(shares, sizes, min(SPREAD, density / 2, (1.0 - density) / 2)) if shares else {}
    return {name: density + shifts[block] for name, block in blocks.items()}


def outlier_share(scores: Sequence[Tensor]) -> float:
    """The share of entries above `OUTLIER` times the mean of all tensors together."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > OUTLIER * mean).sum()) for score in scores) / count


def bounded_shifts(shares: Mapping[str, float], sizes: Mapping[str, int], bound: float) -> dict[str, float]:
    """Shifts proportional to the distance from the mean share, at most `bound`, whose mean weighted by size is zero."""
    mean = sum(shares[name] * sizes[name] for name in shares) / sum(sizes.values())
    widest = max(abs(share - mean) for share in shares.values())
    return {name: bound * (share - mean) / widest if widest > 0.0 else 0.0 for name, share in shares.items()}


# -- refit errors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Relative errors of one layer of `entries` weights: (nonzeros, error) pairs, none where all outputs are zero."""

    entries: int
    points: tuple[tuple[int, float], ...] = field(default=())


def _curve(model: nn.Module, layer: LayerPlan, statistics: InputStatistics, recipe: Recipe) -> Curve:
    entries = layer.out_features * layer.in_features
    # What matters is how the densities compare; refining each of them would cost many times the start itself.
    recipe = recipe.updated({"support.start_density": None, "calibration.refine_rounds": 0})
    points: dict[int, float] = {}
    for factor in DENSITIES if statistics.tokens else ():
        density = min(0.95, factor * (1.0 - recipe.sparsity))
        try:
            structure = fit(layer.out_features, layer.in_features, density, recipe)
        except DoesNotFit:
            continue
        if structure.nonzeros not in points:
            alone = replace(layer, structure=structure, shared=())
            ((start, _),) = start_layers([alone], [dense_layer(model, layer)], statistics, recipe)
            # Of outputs that are all zero no share is missing or kept: the error is NaN at every density.
            if math.isfinite(start.error):
                points[structure.nonzeros] = start.error
    return Curve(entries, tuple(sorted(points.items())))


def split_budget(curves: Mapping[str, Curve], density: float) -> dict[str, float]:
    """Densities that minimise the summed error of convex `curves` under the nonzeros of a uniform `density`.

    Greedy, and exact on the lower convex hulls: from the sparsest point of every layer on, the step that lowers the
    error the most for each nonzero comes first; the last one is taken as far as the budget goes.
    """
    hulls = {name: _hull(curve.points) for name, curve in curves.items()}
    nonzeros: dict[str, float] = {name: float(hull[0][0]) for name, hull in hulls.items()}
    left = density * sum(curve.entries for curve in curves.values()) - sum(nonzeros.values())
    steps = [
        ((after[1] - before[1]) / (after[0] - before[0]), name, after[0] - before[0])
        for name, hull in hulls.items()
        for before, after in pairwise(hull)
    ]
    for _, name, width in sorted(steps):
        taken = min(float(width), max(0.0, left))
        nonzeros[name] += taken
        left -= taken
    return {name: count / curves[name].entries for name, count in nonzeros.items()}


def _hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of points in order of nonzeros."""
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
