"""The learner `projected`: hard in every step, latent behind it, and updates that carry everything along."""

import copy

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.events import Hardened, Message, Step, SupportUpdated
from padst_cli.permutation.apply import from_structure, identity, random_permutation, to_structure
from padst_cli.permutation.assignment import kept_share
from padst_cli.plan import make_plan
from padst_cli.recipe import PermutationRecipe, Recipe
from padst_cli.structures import StructureOptions, structure_class
from padst_cli.training import trainer
from padst_cli.training.latent import Latent
from padst_cli.training.permutation import Permutation
from padst_cli.training.projected import Projection, choose, saliency
from padst_cli.training.sparse_linear import DENSE_PRODUCT, SparseLinear, sparse_layers
from padst_cli.training.swap import finished_layers, sparsify_modules

OUT, IN = 48, 32
STRUCTURES = ["diag", "nm", "block", "unstructured"]
SIDES = [("input",), ("output",), ("input", "output")]


def make(name, sides=("input",), tokens=16, perm_in=None, seed=5):
    """A latent layer in training mode that has seen `tokens` inputs, some features of which are far larger."""
    generator = torch.Generator().manual_seed(seed)
    structure = structure_class(name).for_density(OUT, IN, 0.25, StructureOptions())
    weight = torch.randn(OUT, IN, generator=generator)
    perms = {
        "input": Permutation(random_permutation(IN, generator), mixing=None),
        "output": Permutation(random_permutation(OUT, generator), mixing=None),
    }
    chosen = {side: perms[side] for side in sides if name != "unstructured"}
    if perm_in is not None:
        chosen["input"] = perm_in
    layer = SparseLinear(
        structure, weight, structure.project(weight.square()), torch.randn(OUT, generator=generator),
        chosen.get("input"), chosen.get("output"), latent=Latent(IN, torch.float32),
    ).train()  # fmt: skip
    x = torch.randn(tokens, IN, generator=generator) * torch.logspace(-1, 1, IN)
    layer.latent.see(x)
    return layer


def in_model_order(layer, matrix):
    perms = {side: perm.index for side, perm in layer.permutations()}
    return from_structure(matrix, perms.get("input"), perms.get("output")).clone()


def recipe_of(**changes):
    return Recipe().updated({"permutation.learner": "projected", "permutation.margin": 0.0, **changes})


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("tokens", [5, 600])
def test_forward_is_the_support_and_the_gradient_is_dense(name, sides, tokens):
    layer = make(name, sides)
    x = torch.randn(tokens, IN, requires_grad=True)
    effective = in_model_order(layer, torch.where(layer.mask, layer.weight, 0.0)).detach().requires_grad_()
    expected = torch.nn.functional.linear(x, effective, layer.bias)
    target = torch.randn_like(expected)
    dx, dw = torch.autograd.grad((expected * target).sum(), [x, effective])
    y = layer(x)
    assert (layer.computed_by == DENSE_PRODUCT) == (tokens == 5)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (y * target).sum().backward()
    torch.testing.assert_close(x.grad, dx, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_model_order(layer, layer.weight.grad), dw, rtol=1e-4, atol=1e-3)
    assert layer.weight.grad[~layer.mask].abs().min() > 0.0


def test_saliency_is_the_squared_weight_times_the_mean_squares_of_its_input():
    layer = make("diag", ("input", "output"), tokens=0)
    assert not layer.latent.has_seen
    first, second = torch.randn(2, 3, IN), torch.randn(5, IN)
    layer(first)
    layer(second)
    layer.eval()(torch.randn(9, IN))
    squares = torch.cat([first.flatten(0, 1), second]).square().mean(0)
    expected = in_model_order(layer, layer.weight.detach()).square() * squares
    torch.testing.assert_close(in_model_order(layer, saliency(layer)), expected)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_updates_never_lose_saliency_and_carry_everything_along(name, sides):
    layer = make(name, sides)
    optimizer = torch.optim.AdamW([layer.weight], lr=1e-3)
    layer.weight.grad = torch.randn(OUT, IN)
    optimizer.step()
    # Twice the same number in every entry: weight, gradient and moments must go the same way.
    with torch.no_grad():
        layer.weight.grad.copy_(layer.weight)
        optimizer.state[layer.weight]["exp_avg"].copy_(layer.weight)
    dense, old_mask = in_model_order(layer, layer.weight.detach()), in_model_order(layer, layer.mask)
    score = in_model_order(layer, saliency(layer))
    before = kept_share(score, old_mask)
    grown = Projection({"layer": layer}, recipe_of()).update(3, optimizer)
    mask = in_model_order(layer, layer.mask)
    assert layer.structure.is_feasible(layer.structure.units_of(layer.mask))
    assert kept_share(score, mask) > before
    assert grown == {"layer": int((mask & ~old_mask).sum())}
    assert grown["layer"] > 0
    moment = optimizer.state[layer.weight]["exp_avg"]
    for carried in (layer.weight.detach(), layer.weight.grad, moment):
        assert torch.equal(in_model_order(layer, carried), dense)
    for side, perm in layer.permutations():
        assert torch.equal(perm.index.sort().values, identity(len(perm.index)))
        assert perm.moved == int((perm.index != perm.start).sum())
        # The order of the outputs changes nothing for N:M.
        assert (perm.moved > 0) == ((name, side) != ("nm", "output"))
    assert not layer.latent.has_seen


@pytest.mark.parametrize("name", ["diag", "nm", "block"])
def test_a_new_order_must_gain_the_margin(name):
    layer = make(name)
    score = saliency(layer)
    stay = kept_share(score, layer.structure.project(score))
    move = choose([layer], PermutationRecipe(learner="projected", margin=0.0), 0)[0]
    gain = move.kept - stay
    assert gain > 0.0
    assert not torch.equal(move.perm_in, identity(IN))
    ordered = to_structure(score, move.perm_in, move.perm_out)
    assert kept_share(ordered, move.mask) == pytest.approx(move.kept)
    below = choose([layer], PermutationRecipe(learner="projected", margin=gain * 0.99), 0)[0]
    assert torch.equal(below.perm_in, move.perm_in)
    above = choose([layer], PermutationRecipe(learner="projected", margin=gain * 1.01), 0)[0]
    assert torch.equal(above.perm_in, identity(IN))
    assert torch.equal(above.mask, layer.structure.project(score))


@pytest.mark.parametrize("name", ["diag", "nm", "block"])
def test_layers_with_one_permutation_move_together(name):
    first = make(name)
    second = make(name, perm_in=first.perm_in, seed=6)
    layers = {"first": first, "second": second}
    dense = {key: in_model_order(layer, layer.weight.detach()) for key, layer in layers.items()}
    projection = Projection(layers, recipe_of())
    assert list(projection.permutations) == ["first"]
    projection.update(3, torch.optim.AdamW([first.weight, second.weight]))
    assert first.perm_in is second.perm_in
    assert first.perm_in.moved > 0
    for key, layer in layers.items():
        assert torch.equal(in_model_order(layer, layer.weight.detach()), dense[key])
    assert len(projection.settle(4, torch.optim.AdamW([first.weight]))) == 1


def test_a_layer_that_saw_nothing_stays():
    layer = make("diag", tokens=0)
    before = copy.deepcopy(layer.state_dict())
    assert Projection({"layer": layer}, recipe_of()).update(3, torch.optim.AdamW([layer.weight])) == {"layer": 0}
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_settling_drops_what_is_latent_and_its_moments():
    layer = make("block")
    optimizer = torch.optim.AdamW([layer.weight], lr=1e-2, weight_decay=0.0)
    layer.weight.grad = torch.ones(OUT, IN)
    optimizer.step()
    kept = layer.weight.detach().clone()[layer.mask]
    x = torch.randn(4, IN)
    before = layer(x)
    record = Projection({"layer": layer}, recipe_of()).settle(7, optimizer)[0]
    assert (record.step, record.layer, record.penalty, record.moved) == (7, "layer", 0.0, 0)
    assert layer.latent is None
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.weight[layer.mask], kept)
    # No moment is left that would move a weight outside the support.
    layer.weight.grad = torch.zeros(OUT, IN)
    optimizer.step()
    assert not layer.weight[~layer.mask].any()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_run_ends_with_ordinary_sparse_layers(bench, events, structure):
    recipe = bench.recipe(**{"structure": structure, "permutation.learner": "projected"})
    teacher, student = bench.student(recipe)
    for name, layer in sparse_layers(student).items():
        dense = teacher.get_submodule(name).weight.detach().T
        assert torch.equal(in_model_order(layer, layer.weight.detach()), dense)
    student, result = bench.train(recipe, student=student, on_event=events.append)
    permuted = {"unstructured": 0, "nm": 8}.get(structure, 16)
    assert result.permutations["learned"] == result.permutations["hardened_at_deadline"] == permuted
    moved = sum(perm.moved for layer in sparse_layers(student).values() for _, perm in layer.permutations())
    assert result.permutations["moved_from_start"] == moved
    assert (moved > 0) == (permuted > 0)
    updates = [event for event in events if isinstance(event, SupportUpdated)]
    assert [event.step for event in updates] == [4, 7]
    assert result.support_moved == sum(sum(event.moved.values()) for event in updates) > 0
    assert {event.step for event in events if isinstance(event, Hardened)} == ({6} if permuted else set())
    steps = [event for event in events if isinstance(event, Step)]
    assert all(step.layers == permuted and not step.penalties for step in steps)
    assert [step.hardened for step in steps] == [0] * 6 + [permuted] * 6
    for layer in sparse_layers(student).values():
        assert layer.latent is None
        assert not layer.weight[~layer.mask].any()
        assert layer.structure.is_feasible(layer.structure.units_of(layer.mask))


def test_values_outside_the_support_hear_every_fourth_gradient_whatever_computes(bench, monkeypatch):
    recipe = bench.recipe(**{"permutation.learner": "projected", "permutation.deadline": 0.75, "support.every": 100})
    heard = []

    class Watching(trainer.AdamW):
        def step(self, *args, **kwargs):
            layers = sparse_layers(student).values()
            latent = [layer for layer in layers if layer.latent is not None]
            heard.append([bool(layer.weight.grad[~layer.mask].any()) for layer in latent])
            assert all(layer.weight.grad[layer.mask].any() for layer in layers)
            return super().step(*args, **kwargs)

    monkeypatch.setattr(trainer, "AdamW", Watching)
    _, student = bench.student(recipe)
    bench.train(recipe, student=student)
    layers = len(sparse_layers(student))
    settled = [[]] * 3  # the last quarter of twelve steps
    assert heard == [[index % 4 == 0] * layers for index in range(9)] + settled


def test_a_margin_out_of_reach_leaves_the_start_in_place(bench):
    recipe = bench.recipe(**{"permutation.learner": "projected", "permutation.margin": 0.99})
    student, result = bench.train(recipe)
    assert result.permutations["moved_from_start"] == 0
    assert result.support_moved > 0
    for layer in sparse_layers(student).values():
        assert all(torch.equal(perm.index, perm.start) for _, perm in layer.permutations())


def test_a_side_without_an_order_begins_at_the_identity(bench):
    recipe = bench.recipe(**{"permutation.learner": "projected"})
    plain = bench.recipe(**{"permutation.kind": "none"})
    teacher, student = bench.teacher(), bench.teacher()
    starts = bench.starts(teacher, make_plan(teacher, plain), plain)
    sparsify_modules(student, starts, make_plan(teacher, recipe), recipe, teacher)
    for layer in sparse_layers(student).values():
        assert [len(perm.start) for _, perm in layer.permutations()] == [layer.in_features, layer.out_features]
        assert all(torch.equal(perm.index, identity(len(perm.start))) for _, perm in layer.permutations())
    _, result = bench.train(recipe, student=student)
    assert result.permutations["moved_from_start"] > 0


@pytest.mark.parametrize("kind", ["none", "assignment", "random"])
def test_permutations_that_are_not_learned_have_no_learner(bench, kind):
    changes = {"permutation.kind": kind}
    student, result = bench.train(bench.recipe(**changes, **{"permutation.learner": "projected"}))
    assert result.permutations["learned"] == 0
    plain, _ = bench.train(bench.recipe(**changes))
    for name, state in finished_layers(plain).items():
        assert torch.equal(state.weight, finished_layers(student)[name].weight)


@pytest.mark.parametrize("method", ["rigl", "set", "mest", "static"])
def test_the_dst_method_takes_over_at_the_deadline(bench, events, method):
    changes = {"support.method": method, "support.every": 2, "support.until": 0.9}
    recipe = bench.recipe(**{"permutation.learner": "projected", "permutation.margin": 0.0, **changes})
    student, _ = bench.train(recipe, on_event=events.append)
    updates = [event.step for event in events if isinstance(event, SupportUpdated)]
    assert updates == ([3, 5] if method == "static" else [3, 5, 7, 9, 11])
    for layer in sparse_layers(student).values():
        assert not layer.weight[~layer.mask].any()
        assert layer.structure.is_feasible(layer.structure.units_of(layer.mask))


@pytest.mark.parametrize(("until", "rests"), [(0.9, False), (0.6, True)])
def test_a_method_that_takes_over_too_late_to_move_anything_says_so(bench, events, until, rests):
    changes = {"support.method": "rigl", "support.every": 4, "support.until": until}
    bench.train(bench.recipe(**{"permutation.learner": "projected", **changes}), on_event=events.append)
    said = [event.text for event in events if isinstance(event, Message) and "will not move the support" in event.text]
    assert len(said) == rests
    assert [event.step for event in events if isinstance(event, SupportUpdated)] == ([5] if rests else [5, 9])


def test_two_kinds_of_latent_values_are_refused():
    with pytest.raises(PadstError, match="'projected' and dst method 'dynadiag' both keep latent values"):
        recipe_of(**{"structure": "diag", "support.method": "dynadiag"})
    assert recipe_of(**{"support.method": "dynadiag", "permutation.kind": "none"}).support.method == "dynadiag"


def test_latent_values_need_the_dense_model(bench):
    recipe = bench.recipe(**{"permutation.learner": "projected"})
    teacher = bench.teacher()
    plan = make_plan(teacher, recipe)
    with pytest.raises(ValueError, match="dense model"):
        sparsify_modules(bench.teacher(), bench.starts(teacher, plan, recipe), plan, recipe)
