"""The loop: schedules, events, hardening, refusals, and several processes that agree with one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from padst_cli.errors import PadstError
from padst_cli.events import Evaluated, Hardened, Message, Saved, Step, SupportUpdated
from padst_cli.training.hardening import Hardener
from padst_cli.training.objective import build_objective
from padst_cli.training.sparse_linear import sparse_layers
from padst_cli.training.state import StateStore
from padst_cli.training.swap import finished_layers
from padst_cli.training.trainer import Trainer, make_accelerator, train


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def test_the_loss_falls_and_every_permutation_ends_hard(bench, events):
    changes = {"training.steps": 40, "training.learning_rate": 0.01, "training.distill": False}
    student, result = bench.train(bench.recipe(**changes), on_event=events.append)
    steps = of(Step, events)
    assert steps[-1].loss < 0.8 * steps[0].loss
    assert result.loss == steps[-1].loss
    assert (result.steps, result.items_seen) == (40, 160)
    assert result.permutations["learned"] == 16 == len(of(Hardened, events))
    assert result.permutations["hardened_by_penalty"] + result.permutations["hardened_at_deadline"] == 16
    assert result.permutations["learned_before_training"] == 8, "those of the larger sides"
    assert (steps[0].hardened, steps[0].layers) == (8, 16)
    assert steps[-1].hardened == 16
    assert steps[-1].penalties == {}
    assert not student.training
    assert all(state.perm_in is not None or state.perm_out is not None for state in finished_layers(student).values())


def test_what_cannot_harden_by_penalty_hardens_at_the_deadline(bench, events):
    changes = {"permutation.penalty_weight": 0.0, "permutation.mixing": 0.6, "permutation.learning_rate": 1e-6}
    _, result = bench.train(bench.recipe(**changes), on_event=events.append)
    late = [event for event in of(Hardened, events) if event.cause == "deadline"]
    assert (
        result.permutations["hardened_at_deadline"] - result.permutations["learned_before_training"] == 8 == len(late)
    )
    assert {event.step for event in late} == {6}
    assert all(event.penalty > 0.22 for event in late)


def test_frozen_permutations_keep_the_schedule_and_never_move(bench, events):
    student, result = bench.train(bench.recipe(**{"permutation.frozen": True}), on_event=events.append)
    assert result.permutations == {
        "learned": 16, "hardened_by_penalty": 0, "hardened_at_deadline": 16, "learned_before_training": 8,
        "moved_from_start": 0, "moved_in_training": 0,
    }  # fmt: skip
    soft = [event for event in of(Step, events) if event.penalties]
    assert {event.step for event in soft} == {1, 2, 3, 4, 5}
    assert all(event.penalties == soft[0].penalties for event in soft), "the matrices are what they were"
    moving, moved = bench.train(bench.recipe())
    assert moved.permutations["learned"] == 16
    fixed, other = (next(iter(sparse_layers(model).values())) for model in (student, moving))
    assert not torch.equal(fixed.weight, other.weight), "where they do learn, the weights train around other matrices"


def test_what_was_learned_before_training_stays_and_is_told_at_its_start(bench, events):
    recipe = bench.recipe(**{"permutation.learner": "refined", "calibration.refine_rounds": 8})
    student = bench.student(recipe)[1]
    perms = [perm for layer in sparse_layers(student).values() for _, perm in layer.permutations()]
    for perm in perms:
        perm.assigned.copy_(perm.assigned.roll(1))
    before = [perm.index.clone() for perm in perms]
    moved = sum(int((perm.index != perm.assigned).sum()) for perm in perms)
    _, result = bench.train(recipe, student=student, on_event=events.append)
    assert all(torch.equal(perm.index, index) for perm, index in zip(perms, before, strict=True))
    assert result.permutations == {
        "learned": 16, "hardened_by_penalty": 0, "hardened_at_deadline": 16, "learned_before_training": 16,
        "moved_from_start": moved, "moved_in_training": 0,
    }  # fmt: skip
    assert moved > 0
    assert {(event.step, event.cause) for event in of(Hardened, events)} == {(0, "start")}
    assert next(event.text for event in of(Message, events)) == (
        f"16 permutations learned on the calibration data: {moved:,} entries moved from the assignment"
    )
    assert all(not event.penalties and event.hardened == event.layers == 16 for event in of(Step, events))


def test_frozen_lookups_never_move(bench):
    changes = {"permutation.frozen": True, "permutation.learner": "straight-through"}
    _, result = bench.train(bench.recipe(**changes))
    assert result.permutations["learned"] - result.permutations["learned_before_training"] == 8
    assert result.permutations["moved_from_start"] == 0


def test_nothing_hardens_before_its_time_and_lambda_ramps_from_there(bench, events):
    changes = {"permutation.mixing": 0.1, "permutation.earliest": 0.25}
    recipe = bench.recipe(**changes)
    bench.train(recipe, on_event=events.append)
    assert {(event.step, event.cause) for event in of(Hardened, events)} == {(0, "start"), (3, "penalty")}
    hardener = Hardener(sparse_layers(bench.student(recipe)[1]), recipe)
    weights = [hardener.penalty_weight(done) / recipe.permutation.penalty_weight for done in range(9)]
    assert weights == pytest.approx([0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1])


def test_no_steps_is_a_complete_result(bench):
    student, result = bench.train(bench.recipe(**{"training.steps": 0}))
    assert result.steps == 0
    assert result.permutations["moved_from_start"] == 0
    for layer in sparse_layers(student).values():
        for _, perm in layer.permutations():
            assert torch.equal(perm.index, perm.start)


def test_events_come_when_they_should(bench, tmp_path, events):
    changes = {"training.log_every": 5, "training.eval_every": 4, "training.save_every": 6}
    seen = []

    def evaluate(model):
        seen.append(model.training)
        torch.rand(3)
        return "perplexity", 7.0

    store = StateStore(tmp_path)
    student, _ = bench.train(
        bench.recipe(**changes), dropout=0.2, store=store, on_event=events.append, evaluate=evaluate
    )
    assert [event.step for event in of(Step, events)] == [5, 10, 12]
    assert [(event.step, event.metric, event.value, event.phase) for event in of(Evaluated, events)] == [
        (4, "perplexity", 7.0, "during"),
        (8, "perplexity", 7.0, "during"),
    ]
    assert seen == [False, False]
    assert [event.step for event in of(Saved, events)] == [6, 12]
    assert [event.step for event in of(SupportUpdated, events)] == [4, 7]
    # Looking on does not change what is learned.
    unseen, _ = bench.train(bench.recipe(**{**changes, "training.eval_every": 0}), dropout=0.2)
    for key, value in unseen.state_dict().items():
        assert torch.equal(value, student.state_dict()[key])


def test_the_dense_control_runs_through_the_same_loop(bench, events):
    model = bench.teacher()
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    recipe = bench.recipe()
    objective = build_objective("causal-lm", recipe.training, None)
    options = {"on_event": events.append, "control": True}
    result = train(model, objective, bench.dataset, recipe, make_accelerator("cpu"), **options)
    assert result.permutations == {
        "learned": 0, "hardened_by_penalty": 0, "hardened_at_deadline": 0, "learned_before_training": 0,
        "moved_from_start": 0, "moved_in_training": 0,
    }  # fmt: skip
    assert all(event.control for event in of(Step, events))
    assert not of(SupportUpdated, events)
    assert not torch.equal(before, model.transformer.h[0].mlp.c_fc.weight)


def test_accumulated_parts_make_the_same_step_as_one_batch(bench):
    one, _ = bench.train(bench.recipe(), dtype=torch.float64)
    parts, _ = bench.train(bench.recipe(**{"training.accumulation": 2}), dtype=torch.float64)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, parts.state_dict()[key], rtol=0, atol=1e-9)


def test_a_batch_that_does_not_divide_is_refused(bench):
    class Three:
        num_processes = 3

    teacher, student = bench.student(bench.recipe())
    objective = build_objective("causal-lm", bench.recipe().training, teacher)
    with pytest.raises(PadstError, match="multiple of 3"):
        train(student, objective, bench.dataset, bench.recipe(), Three())


def test_what_only_another_process_used_is_averaged_all_the_same(bench):
    """Every process must ask for the same sums, or they wait for each other for ever."""
    asked = []

    class OneOfTwo(Accelerator):
        num_processes = 2

        def reduce(self, tensor, how):
            asked.append(tensor.shape)
            if how == "sum":  # the other process used the first and the last
                return tensor + torch.tensor([1.0, 0.0, 0.0, 1.0])
            return (tensor + 2.0) / 2.0

    model = nn.ParameterList([torch.zeros(3), torch.zeros(2), torch.zeros(1), torch.zeros(4)])
    model[1].grad, model[3].grad = torch.ones(2), torch.ones(4)
    objective = build_objective("causal-lm", bench.recipe().training, bench.teacher())
    Trainer(model, objective, bench.dataset, bench.recipe(), OneOfTwo(cpu=True))._average_gradients()
    found = [None if each.grad is None else each.grad.tolist() for each in model]
    assert found == [[1.0] * 3, [1.5] * 2, None, [1.5] * 4]
    assert asked == [(4,), (3,), (2,), (4,)]


def test_a_loss_that_is_not_finite_names_the_step_and_the_way_out(bench):
    recipe = bench.recipe()
    _, student = bench.student(recipe)
    with torch.no_grad():
        student.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(PadstError, match=r"loss is nan at step 1 of 12; .*--learning-rate"):
        bench.train(recipe, student=student)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PadstError, match="--device cuda"):
        make_accelerator("cuda")


WORKER = """
import json
import sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import Bench

bench = Bench()
from accelerate import PartialState
for number, changes in enumerate(json.loads(sys.argv[3])):
    student, result = bench.train(bench.recipe(**changes), dtype=torch.float64)
    assert result.permutations["learned"] == 16 and result.support_moved > 0
    torch.save(student.state_dict(), f"{sys.argv[2]}/{number}-{PartialState().process_index}.pt")
"""
LEARNERS = [
    {"permutation.mixing": 0.3},
    {"permutation.learner": "projected"},
    {"permutation.learner": "straight-through"},
]


def test_two_processes_agree_with_each_other_and_with_one(bench, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "yes", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(here), str(tmp_path), json.dumps(LEARNERS)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    for number, changes in enumerate(LEARNERS):
        events = []
        alone, _ = bench.train(bench.recipe(**changes), dtype=torch.float64, on_event=events.append)
        assert len(of(SupportUpdated, events)) == 2
        assert of(Hardened, events)
        first, second = (torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True) for rank in range(2))
        for key, value in alone.state_dict().items():
            assert torch.equal(first[key], second[key]), key
            if value.is_floating_point():
                torch.testing.assert_close(first[key], value, rtol=0, atol=1e-9)
            else:
                assert torch.equal(first[key], value), key
