"""Densities that follow the data keep the budget and go where the numbers say."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from padst_cli.errors import PadstError
from padst_cli.events import Message, ignore
from padst_cli.initialise import allocate
from padst_cli.initialise.allocation import SPREAD, Curve, bounded_shifts, outlier_share, split_budget
from padst_cli.plan import make_plan
from padst_cli.recipe import Recipe


def run(make_model, make_batches, name="llama", **changes):
    recipe = Recipe(structure="diag", sparsity=0.6).updated(
        {"permutation.kind": "none", **{key.replace("__", "."): value for key, value in changes.items()}}
    )
    model, events = make_model(name), []
    plan = make_plan(model, recipe)
    return model, recipe, plan, allocate(model, plan, make_batches(name), recipe, events.append), events


def budget(plan, densities):
    entries = [layer.out_features * layer.in_features for layer in plan.layers]
    mean = sum(densities[layer.name] * size for layer, size in zip(plan.layers, entries, strict=True)) / sum(entries)
    return float(mean)


@pytest.mark.parametrize("allocation", ["owl", "error"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_the_budget_is_kept(name, allocation, make_model, make_batches):
    model, recipe, plan, densities, events = run(make_model, make_batches, name, allocation=allocation)
    assert list(densities) == [layer.name for layer in plan.layers]
    assert budget(plan, densities) == pytest.approx(0.4, abs=1e-6)
    assert len({round(density, 6) for density in densities.values()}) > 1
    assert all(0.0 < density < 1.0 for density in densities.values())
    remade = make_plan(model, recipe, densities)
    assert remade.sparsity_achieved == pytest.approx(0.6, abs=0.02)
    assert [layer.structure for layer in remade.layers] != [layer.structure for layer in plan.layers]
    assert any(f"{allocation} gives densities from" in event.text for event in events if isinstance(event, Message))


def test_a_block_with_outliers_stays_denser(make_model, make_batches):
    model, batches = make_model("llama"), make_batches("llama")
    with torch.no_grad():
        for name, weight in model.model.layers[1].named_parameters():
            if name.endswith("proj.weight"):
                weight.view(-1)[::25] *= 8.0
    recipe = Recipe(structure="diag", sparsity=0.6, allocation="owl")
    densities = allocate(model, make_plan(model, recipe), batches, recipe, [].append)
    of = [{densities[name] for name in densities if f".layers.{block}." in name} for block in range(3)]
    assert [len(values) for values in of] == [1, 1, 1]  # one density a block
    assert max(of[1]) == max(densities.values())
    assert all(abs(density - 0.4) <= SPREAD + 1e-9 for density in densities.values())
    sparse = recipe.updated({"sparsity": 0.95})
    tight = allocate(model, make_plan(model, sparse), batches, sparse, [].append)
    assert min(tight.values()) >= 0.025 - 1e-9


def test_outlier_share_and_shifts():
    scores = torch.ones(10, 10)
    scores[0, :3] = 100.0
    assert outlier_share([scores]) == pytest.approx(0.03)
    assert outlier_share([scores, torch.ones(100)]) == pytest.approx(0.015)
    shifts = bounded_shifts({"a": 0.1, "b": 0.2}, {"a": 300, "b": 100}, 0.08)
    assert shifts["b"] == pytest.approx(0.08)
    assert 300 * shifts["a"] + 100 * shifts["b"] == pytest.approx(0.0)
    assert bounded_shifts({"a": 0.1, "b": 0.1}, {"a": 1, "b": 1}, 0.08) == {"a": 0.0, "b": 0.0}


def test_the_split_is_the_best_of_all():
    curves = {
        "steep": Curve(100, ((10, 0.9), (20, 0.4), (40, 0.2), (60, 0.15))),
        "flat": Curve(100, ((10, 0.5), (20, 0.45), (40, 0.4), (60, 0.38))),
        "dented": Curve(200, ((20, 0.8), (40, 0.79), (80, 0.3), (120, 0.29))),
    }
    density = 0.25
    found = split_budget(curves, density)
    assert sum(found[name] * curve.entries for name, curve in curves.items()) == pytest.approx(density * 400)

    def error(densities):
        total = 0.0
        for name, curve in curves.items():
            points = list(curve.points)
            if name == "dented":
                points.remove((40, 0.79))  # above the line from 20 to 80
            count = densities[name] * curve.entries
            if not points[0][0] - 1e-9 <= count <= points[-1][0] + 1e-9:
                return math.inf
            for (x, y), (u, v) in pairwise(points):
                if x - 1e-9 <= count <= u + 1e-9:
                    total += y + (v - y) * (count - x) / (u - x)
                    break
        return total

    steps = [index / 200 for index in range(10, 121)]
    best = min(
        error({"steep": a, "flat": b, "dented": (density * 400 - 100 * a - 100 * b) / 200})
        for a in steps
        for b in steps
    )
    assert error(found) == pytest.approx(best, abs=1e-6)


def test_error_allocation_lowers_the_summed_error(make_model, make_batches):
    from padst_cli.initialise.allocation import _curve, _inputs_of

    model, recipe, plan, densities, _ = run(make_model, make_batches, allocation="error")
    layers = {layer.name: layer for layer in plan.layers}
    with torch.no_grad():
        curves = {
            layer.name: dict(_curve(model, layer, statistics, recipe).points)
            for layer, statistics in _inputs_of(model, layers, make_batches("llama"))
        }
    at_uniform = sum(curves[layer.name][layer.structure.nonzeros] for layer in plan.layers)

    def interpolated(name):
        count = densities[name] * layers[name].out_features * layers[name].in_features
        points = sorted(curves[name].items())
        for (x, y), (u, v) in pairwise(points):
            if x - 1e-6 <= count <= u + 1e-6:
                return y + (v - y) * (count - x) / (u - x)
        raise AssertionError(name)

    assert sum(interpolated(name) for name in layers) < at_uniform


@pytest.mark.parametrize("allocation", ["owl", "error"])
def test_a_layer_that_says_nothing_keeps_its_density_and_misleads_no_other(allocation, make_model, make_batches):
    model, batches = make_model("llama"), make_batches("llama")
    model.model.layers[1].mlp.idle_proj = nn.Linear(32, 48)  # an expert that no calibration token was sent to
    recipe = Recipe(structure="diag", sparsity=0.6).updated({"permutation.kind": "none", "allocation": allocation})
    plan = make_plan(model, recipe)
    idle = "model.layers.1.mlp.idle_proj"
    dead = {plan.layers[0].name, idle, plan.layers[-1].name}
    with torch.no_grad():
        for name in dead:
            model.get_submodule(name).weight.zero_()
    densities = allocate(model, plan, batches, recipe, ignore)
    assert [densities[name] for name in dead] == pytest.approx([0.4, 0.4, 0.4])
    assert len({round(density, 6) for density in densities.values()}) > 2
    assert budget(plan, densities) == pytest.approx(0.4, abs=1e-6)
    # Without them the others get the same: they were told nothing by what they cannot be compared with.
    others = replace(plan, layers=tuple(layer for layer in plan.layers if layer.name not in dead))
    assert allocate(model, others, batches, recipe, ignore) == pytest.approx(
        {name: density for name, density in densities.items() if name not in dead}
    )


def test_where_no_layer_says_anything_all_keep_their_density(make_model, make_batches):
    model, batches = make_model("llama"), make_batches("llama")
    recipe = Recipe(structure="diag", sparsity=0.6, allocation="owl")
    plan = make_plan(model, recipe)
    with torch.no_grad():
        for layer in plan.layers:
            model.get_submodule(layer.name).weight.zero_()
    found = allocate(model, plan, batches, recipe, ignore)
    assert found == pytest.approx({layer.name: 0.4 for layer in plan.layers})


def test_a_fixed_nm_leaves_nothing_to_split(make_model, make_batches):
    with pytest.raises(PadstError, match=r"leave out --nm 2:4"):
        run(make_model, make_batches, structure="nm", nm="2:4", sparsity=0.5, allocation="owl")
