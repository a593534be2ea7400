"""The average of the last weights: which steps count, where it lies, and when it would be too early."""

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.events import Step
from padst_cli.recipe import Recipe, TrainingRecipe
from padst_cli.training.averaging import Average
from padst_cli.training.sparse_linear import sparse_layers


def test_the_mean_of_the_last_steps_survives_a_resume():
    recipe = TrainingRecipe(steps=10, average=0.39)  # three whole steps
    weight = torch.zeros(2)
    average = Average([weight], recipe)
    for done in range(1, 11):
        weight.fill_(float(done))
        average.see(done)
        if done == 8:
            state = average.state_dict()
            average = Average([weight], recipe)
            average.load_state_dict(state)
    average.take()
    assert weight.tolist() == pytest.approx([9.0, 9.0])


def test_without_it_nothing_is_kept():
    weight = torch.ones(2)
    average = Average([weight], TrainingRecipe(steps=4))
    for done in range(1, 5):
        average.see(done)
    average.take()
    assert (average.means, average.count, weight.tolist()) == ([], 0, [1.0, 1.0])


@pytest.mark.parametrize("changes", [{}, {"support.method": "dynadiag"}, {"permutation.learner": "projected"}])
def test_a_run_ends_at_the_mean_of_its_last_weights_on_their_support(bench, changes):
    recipe = bench.recipe(**{"training.average": 0.25, **changes})
    student, seen = bench.student(recipe)[1], []

    def watch(event):
        if isinstance(event, Step) and event.step > 9:
            seen.append({key: value.detach().clone() for key, value in student.named_parameters()})

    bench.train(recipe, student=student, on_event=watch)
    assert len(seen) == 3
    for key, value in student.named_parameters():
        torch.testing.assert_close(value, torch.stack([each[key] for each in seen]).mean(0))
    for layer in sparse_layers(student).values():
        assert not layer.weight[~layer.mask].any()
    assert not torch.equal(seen[0][key], seen[2][key]), "there was something to average"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "before support.until 0.75"),
        (
            {"support.until": 0.5, "permutation.deadline": 0.9, "permutation.learner": "soft"},
            "before permutation.deadline 0.9",
        ),
        ({"support.method": "static", "support.start_density": 0.8, "support.density_until": 0.7}, "density_until 0.7"),
    ],
)
def test_it_waits_for_supports_and_permutations(changes, words):
    with pytest.raises(PadstError, match=words):
        Recipe().updated({"training.average": 0.4, **changes})
    rest = {"support.method": "static", "permutation.kind": "assignment"}
    assert Recipe().updated({"training.average": 0.4, **rest}).training.average == 0.4
