"""Moving the support: counts, feasibility, which units go and come, and what the optimizer forgets."""

import pytest
import torch

from padst_cli.recipe import SupportRecipe
from padst_cli.structures import StructureOptions, structure_class, structure_names
from padst_cli.training.seeds import seeded
from padst_cli.training.sparse_linear import SparseLinear, sparse_layers
from padst_cli.training.support import at_rest, fraction_at, is_due, move_support, move_units, next_mask


def layer_of(name, out=168, inp=132, density=0.25, **options):
    structure = structure_class(name).for_density(out, inp, density, StructureOptions(**options))
    dense = torch.randn(out, inp, generator=torch.Generator().manual_seed(7))
    mask = structure.project(dense.square())
    layer = SparseLinear(structure, torch.where(mask, dense, 0.0), mask, None)
    layer.weight.grad = torch.randn(out, inp, generator=torch.Generator().manual_seed(8))
    return layer


STRUCTURES = [(name, {}) for name in structure_names()] + [("diag", {"band": 4}), ("block", {"block_rows": "free"})]


@pytest.mark.parametrize("method", ["rigl", "set", "mest"])
@pytest.mark.parametrize(("name", "options"), STRUCTURES)
def test_every_method_keeps_every_structure_feasible_and_its_groups_full(name, options, method):
    layer = layer_of(name, **options)
    structure = layer.structure
    before = structure.units_of(layer.mask)
    mask = next_mask(layer, SupportRecipe(method=method), 0.5, seeded(0, 1, 2))
    after = structure.units_of(mask)
    assert structure.is_feasible(after)
    assert torch.equal(after.sum(1), before.sum(1))
    assert not torch.equal(after, before)
    assert torch.equal(structure.expand(after), mask)


def test_rigl_drops_the_smallest_and_grows_the_largest_gradient():
    active = torch.tensor([[True, True, True, True, False, False, False, False]])
    drop = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    grow = torch.tensor([[0.0, 0.1, 0.0, 0.2, 0.9, 0.3, 0.8, -torch.inf]])
    moved = move_units(active, drop, grow, 0.5)
    assert moved.tolist() == [[True, False, True, False, True, False, True, False]]


def test_a_dropped_unit_comes_back_where_its_gradient_is_the_largest():
    active = torch.tensor([[True, True, False]])
    moved = move_units(active, torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[5.0, 0.0, 1.0]]), 0.5)
    assert torch.equal(moved, active)


def test_what_is_dropped_in_a_group_is_grown_in_that_group():
    active = torch.tensor([[True, False, False, False], [True, False, False, False]])
    drop = torch.tensor([[9.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    grow = torch.tensor([[0.0, 9.0, 9.0, 9.0], [0.0, 1.0, 3.0, 2.0]])
    moved = move_units(active, drop, grow, 0.5)
    assert moved.tolist() == [[True, False, False, False], [False, False, True, False]]


def test_padding_is_never_grown():
    layer = layer_of("nm", out=20, inp=33, nm=(1, 4))
    layer.weight.grad.zero_()
    for step in range(20):
        mask = next_mask(layer, SupportRecipe(method="set"), 1.0, seeded(0, step, 0))
        assert layer.structure.is_feasible(layer.structure.units_of(mask))


def test_random_growth_is_a_function_of_seed_step_and_layer():
    layer = layer_of("unstructured")
    recipe = SupportRecipe(method="set")
    masks = [next_mask(layer, recipe, 0.5, seeded(*key)) for key in [(0, 1, 2), (0, 1, 2), (0, 2, 1), (1, 1, 2)]]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])


def test_mest_spares_small_weights_with_large_gradients():
    layer = layer_of("unstructured")
    layer.weight.grad.zero_()
    smallest = torch.where(layer.mask, layer.weight.abs(), torch.inf).argmin()
    kept = SupportRecipe(method="mest", mest_gamma=1.0)
    layer.weight.grad.view(-1)[smallest] = 100.0
    few = 2 / int(layer.mask.sum())
    assert next_mask(layer, kept, few, seeded(0, 0, 0)).view(-1)[smallest]
    assert not next_mask(layer, SupportRecipe(method="set"), few, seeded(0, 0, 1)).view(-1)[smallest]


def test_moving_zeroes_weights_and_forgets_moments_of_moved_entries_only():
    layer = layer_of("nm")
    optimizer = torch.optim.AdamW([layer.weight], lr=1e-2, weight_decay=0.0)
    layer.weight.grad.masked_fill_(~layer.mask, 0.0)
    optimizer.step()
    moments = {key: value.clone() for key, value in optimizer.state[layer.weight].items()}
    old_mask, old_weight = layer.mask.clone(), layer.weight.detach().clone()
    layer.weight.grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(9))
    mask = next_mask(layer, SupportRecipe(), 0.4, seeded(0))
    grown = move_support(layer, mask, optimizer)
    assert grown == int((mask & ~old_mask).sum()) > 0
    stayed, moved = mask & old_mask, mask ^ old_mask
    assert torch.equal(layer.weight[stayed], old_weight[stayed])
    assert not layer.weight[moved].any()
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[layer.weight][key][stayed], moments[key][stayed])
        assert not optimizer.state[layer.weight][key][moved].any()


def test_the_fraction_falls_along_a_cosine_to_zero_and_updates_end():
    recipe = SupportRecipe(every=10, fraction=0.3, until=0.5)
    assert fraction_at(recipe, 0, 200) == pytest.approx(0.3)
    assert fraction_at(recipe, 50, 200) == pytest.approx(0.15)
    assert fraction_at(recipe, 100, 200) == pytest.approx(0.0)
    assert [step for step in range(200) if is_due(recipe, step, 200)] == list(range(10, 100, 10))
    assert not is_due(SupportRecipe(method="static"), 10, 200)


@pytest.mark.parametrize("structure", ["diag", "nm", "unstructured"])
def test_nothing_outside_the_support_moves_in_training(bench, structure):
    changes = {"structure": structure, "support.method": "rigl", "training.weight_decay": 0.1}
    student, result = bench.train(bench.recipe(**changes))
    assert result.support_moved > 0
    for layer in sparse_layers(student).values():
        assert not layer.weight[~layer.mask].any()
        assert layer.structure.is_feasible(layer.structure.units_of(layer.mask))


@pytest.mark.parametrize(
    ("fraction", "every", "done", "resting"),
    [
        (0.05, 5, 0, ["small"]),
        (0.3, 5, 0, []),
        (0.3, 80, 0, ["small", "large"]),
        (0.3, 5, 60, ["small"]),
        (0.3, 30, 60, ["small"]),
        (0.3, 30, 61, ["small", "large"]),
    ],
)
def test_supports_that_no_update_will_move_are_known_beforehand(fraction, every, done, resting):
    layers = {"small": layer_of("block", 64, 48), "large": layer_of("unstructured")}
    recipe = SupportRecipe(fraction=fraction, every=every)
    found, why = at_rest(layers, recipe, 100, done)
    assert (found, bool(why)) == (resting, True)
    updates = [step for step in range(done, 100) if is_due(recipe, step, 100)]
    for name, layer in layers.items():
        layer.weight.grad = (~layer.mask).float()  # whatever is dropped, others come in its place
        masks = [next_mask(layer, recipe, fraction_at(recipe, step, 100), seeded(0, 1, 2)) for step in updates]
        assert any(not torch.equal(mask, layer.mask) for mask in masks) == (name not in found)


@pytest.mark.parametrize("asked", [{"method": "static"}, {"method": "dynadiag"}, {"start_density": 0.9}])
def test_supports_that_rest_as_asked_or_are_chosen_anew_are_no_news(asked):
    assert at_rest({"small": layer_of("diag")}, SupportRecipe(every=200, **asked), 100)[0] == []
