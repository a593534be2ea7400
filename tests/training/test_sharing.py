"""One soft permutation for several layers: one module, one penalty, hardened once, and a resume that finds it again."""

import copy

import pytest
import torch
from accelerate import Accelerator

from padst_cli.errors import Interrupted
from padst_cli.events import Hardened, Step
from padst_cli.initialise import initialise
from padst_cli.permutation.soft import normalised_penalty
from padst_cli.plan import make_plan
from padst_cli.recipe import Recipe
from padst_cli.training.hardening import Hardener
from padst_cli.training.objective import build_objective
from padst_cli.training.sparse_linear import sparse_layers
from padst_cli.training.state import StateStore
from padst_cli.training.swap import finished_layers, sparsify_modules
from padst_cli.training.trainer import train
from tests import models
from tests.training.conftest import LENGTH, VOCABULARY, RandomWindows


def recipe(**changes):
    base = {
        "sparsity": 0.75,
        "permutation.share": True,
        "permutation.side": "input",
        "permutation.learner": "soft",
        "permutation.deadline": 0.75,
        "permutation.earliest": 0.0,
        "training.steps": 4,
        "training.learning_rate": 1e-3,
        "training.batch_size": 4,
        "training.max_seq_length": LENGTH,
        "training.log_every": 1,
        "support.every": 2,
    }
    return Recipe().updated({**base, **changes})


def built(chosen):
    teacher = models.build("llama", vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
    plan, student = make_plan(teacher, chosen), copy.deepcopy(teacher)
    batches = [{"input_ids": RandomWindows().ids[:8]}]
    starts = initialise(teacher, student, plan, batches, chosen, [].append)
    sparsify_modules(student, starts, plan, chosen, teacher)
    return teacher, student, plan


def trained(chosen, student, teacher, **options):
    objective = build_objective("causal-lm", chosen.training, teacher)
    return train(student, objective, RandomWindows(), chosen, Accelerator(cpu=True), **options)


def test_one_module_counted_once():
    _, student, plan = built(recipe())
    layers = sparse_layers(student)
    for layer in plan.layers:
        assert layers[layer.name].perm_in is layers[(layer.shared or (layer.name,))[0]].perm_in
    hardener = Hardener(layers, recipe())
    leaders = [layer.name for layer in plan.layers if layer.leads]
    assert list(hardener.soft) == leaders
    assert len(plan.layers) - len(leaders) == 2 * 2 + 2 * 1
    alone = [normalised_penalty(perm.matrix()) for perm in hardener.soft.values()]
    torch.testing.assert_close(hardener.penalty(), torch.stack(alone).sum())


def test_gradient_is_the_sum_over_the_layers():
    _, student, plan = built(recipe())
    shared = next(layer.shared for layer in plan.layers if layer.shared)
    layers = [student.get_submodule(name) for name in shared]
    x = torch.randn(6, layers[0].in_features)
    sum(layer(x).square().sum() for layer in layers).backward()
    together = layers[0].perm_in.log_matrix.grad.clone()
    parts = []
    for layer in layers:
        layers[0].perm_in.log_matrix.grad = None
        layer(x).square().sum().backward()
        parts.append(layers[0].perm_in.log_matrix.grad.clone())
    torch.testing.assert_close(together, sum(parts))


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_hardened_once_and_equal_in_every_layer(structure):
    chosen, events = recipe(structure=structure), []
    teacher, student, plan = built(chosen)
    result = trained(chosen, student, teacher, on_event=events.append)
    leaders = [layer.name for layer in plan.layers if layer.leads]
    hardened = [event for event in events if isinstance(event, Hardened)]
    assert sorted(event.layer for event in hardened) == sorted(leaders)
    assert result.permutations["learned"] == len(leaders)
    assert result.permutations["moved_from_start"] == sum(event.moved for event in hardened)
    first = next(event for event in events if isinstance(event, Step))
    assert set(first.penalties) <= set(leaders)
    finished = finished_layers(student)
    for group in {layer.shared for layer in plan.layers if layer.shared}:
        assert all(torch.equal(finished[name].perm_in, finished[group[0]].perm_in) for name in group)


@pytest.mark.parametrize("learner", ["refined", "soft", "projected", "straight-through"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_ends_the_same(tmp_path, stop_after, learner):
    chosen = recipe(**{"training.save_every": 1, "permutation.learner": learner, "permutation.margin": 0.0})
    teacher, whole, _ = built(chosen)
    trained(chosen, whole, teacher)

    class Stopped(Exception):
        """Ends the run right after a state was saved, as a kill would."""

    def stop(event):
        if type(event).__name__ == "Saved" and event.step == stop_after:
            raise Stopped

    store = StateStore(tmp_path)
    teacher, student, _ = built(chosen)
    with pytest.raises((Stopped, Interrupted)):
        trained(chosen, student, teacher, store=store, on_event=stop)
    teacher, student, _ = built(chosen)
    trained(chosen, student, teacher, store=store, resume=True)
    for name, state in finished_layers(whole).items():
        again = finished_layers(student)[name]
        assert torch.equal(state.weight, again.weight)
        assert state.perm_in is None or torch.equal(state.perm_in, again.perm_in)
