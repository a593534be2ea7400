"""Gradual density: the cubic, its last step, and supports that narrow in every structure and method."""

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.events import SupportUpdated
from padst_cli.recipe import Recipe, SupportRecipe
from padst_cli.training.density import density_at, narrows
from padst_cli.training.sparse_linear import sparse_layers
from padst_cli.training.swap import finished_layers

WIDE = SupportRecipe(start_density=0.9, density_until=0.5, every=10)


def test_the_density_falls_along_a_cubic_to_the_target():
    found = [density_at(WIDE, 0.1, done, 100) for done in (0, 10, 25, 40, 50, 99)]
    assert found == pytest.approx([0.9, 0.1 + 0.8 * 0.8**3, 0.2, 0.1 + 0.8 * 0.2**3, 0.1, 0.1])
    assert density_at(SupportRecipe(), 0.1, 3, 100) == 0.1


def test_it_falls_with_the_updates_and_at_the_last_step_in_any_case():
    assert [done for done in range(100) if narrows(WIDE, done, 100)] == [10, 20, 30, 40, 50]
    assert [done for done in range(90) if narrows(WIDE, done, 90)] == [10, 20, 30, 40, 45]
    assert [done for done in range(4) if narrows(WIDE, done, 4)] == [2]
    assert [done for done in range(1) if narrows(WIDE, done, 1)] == [0], "within the run, however short"
    assert not any(narrows(SupportRecipe(), done, 100) for done in range(100))


@pytest.mark.parametrize("method", ["rigl", "set", "mest", "static"])
@pytest.mark.parametrize("structure", ["diag", "nm", "block", "unstructured"])
def test_every_structure_ends_at_its_own_density(bench, events, structure, method):
    changes = {"structure": structure, "support.method": method, "support.start_density": 1.0, "support.every": 2}
    student, result = bench.train(bench.recipe(**changes), on_event=events.append)
    densities = [event.density for event in events if isinstance(event, SupportUpdated)]
    assert len(densities) == (3 if method == "static" else 4), "updates go on once the density has fallen"
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > densities[2] + 0.05
    assert (result.support_moved > 0) == (method != "static")
    for layer in sparse_layers(student).values():
        assert layer.density == pytest.approx(densities[-1], abs=0.03)
        assert layer.structure.is_feasible(layer.structure.units_of(layer.mask))
        assert not layer.weight[~layer.mask].any()
    for state in finished_layers(student).values():
        assert torch.equal(state.structure.units_of(state.mask), state.structure.units_of(state.weight != 0))


def test_what_narrows_keeps_the_largest(bench, events):
    changes = {"structure": "unstructured", "support.method": "static", "support.start_density": 0.5}
    recipe = bench.recipe(**{**changes, "training.learning_rate": 1e-9, "training.weight_decay": 0.0})
    student, _ = bench.train(recipe, on_event=events.append)
    before = bench.student(recipe)[1]
    for one, other in zip(sparse_layers(student).values(), sparse_layers(before).values(), strict=True):
        expected = one.structure.project(other.weight.detach().abs())
        assert torch.equal(one.mask, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"support.start_density": 0.1}, "not above the target density 0.1"),
        ({"support.start_density": 0.5, "training.steps": 0}, "needs training.steps"),
        ({"support.start_density": 0.5, "permutation.learner": "projected"}, "learner 'projected' chooses it anew"),
        ({"support.start_density": 0.5, "support.method": "dynadiag"}, "dst method 'dynadiag' chooses it anew"),
    ],
)
def test_what_cannot_narrow_is_refused(changes, words):
    with pytest.raises(PadstError, match=words):
        Recipe().updated(changes)
