"""The resumable state: whole or not there, tensors and plain values only, and the same weights after a resume."""

import random
import signal

import numpy as np
import pytest
import torch

from padst_cli.errors import Interrupted, PadstError
from padst_cli.events import Saved, Step
from padst_cli.training.sparse_linear import sparse_layers
from padst_cli.training.state import STATE_VERSION, StateStore, random_state, restore_random_state, stop_on_signals


def interrupt_at(step, events):
    """An event callback that raises SIGINT once the given step is reported."""

    def on_event(event):
        events.append(event)
        if isinstance(event, Step) and event.step == step:
            signal.raise_signal(signal.SIGINT)

    return on_event


PROJECTED = {"permutation.learner": "projected"}


# Step 4 lies in the soft phase, between two support updates; step 8 after the deadline, step 10 after the last update.
@pytest.mark.parametrize("stop", [4, 8, 10])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"permutation.learner": "refined"},
        {"support.method": "dynadiag"},
        {"structure": "nm", "support.method": "set"},
        PROJECTED,
        {"structure": "block", "permutation.side": "both", **PROJECTED},
        {"training.average": 0.25, "support.method": "dynadiag"},
        {"structure": "nm", "support.start_density": 1.0, "support.density_until": 0.8},
        {"permutation.learner": "straight-through", "permutation.group": 12, "permutation.resolve_every": 3},
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(bench, tmp_path, events, stop, changes):
    recipe = bench.recipe(**changes)
    whole, whole_result = bench.train(recipe, dropout=0.2)
    store = StateStore(tmp_path)
    with pytest.raises(Interrupted, match="--resume"):
        bench.train(recipe, dropout=0.2, store=store, on_event=interrupt_at(stop, events))
    stopped = [event.step for event in events if isinstance(event, Saved)]
    assert stopped == [store.step()]
    assert stop <= store.step() <= stop + 1
    torch.manual_seed(99)
    resumed, result = bench.train(recipe, dropout=0.2, store=store, resume=True, on_event=events.append)
    steps = [event.step for event in events if isinstance(event, Step)]
    assert steps == list(range(1, 13))
    expected = whole.state_dict()
    assert list(resumed.state_dict()) == list(expected)
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert result.permutations == whole_result.permutations
    assert (result.loss, result.items_seen, result.support_moved) == (
        whole_result.loss,
        whole_result.items_seen,
        whole_result.support_moved,
    )


def test_a_finished_run_resumes_to_its_result(bench, tmp_path):
    store = StateStore(tmp_path)
    recipe = bench.recipe()
    first, result = bench.train(recipe, store=store)
    again, repeated = bench.train(recipe, store=store, resume=True)
    assert repeated == result
    for key, value in again.state_dict().items():
        assert torch.equal(value, first.state_dict()[key])


def test_the_state_is_readable_without_running_code(bench, tmp_path):
    store = StateStore(tmp_path)
    bench.train(bench.recipe(), store=store)
    state = torch.load(store.path, weights_only=True)
    assert state["step"] == 12
    assert len(state["progress"]["hardened"]) == 16


def test_a_kill_while_writing_leaves_the_last_state(tmp_path, monkeypatch):
    store = StateStore(tmp_path)
    store.save({"version": STATE_VERSION, "step": 1})

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"padst_cli.training.state.os.{name}", die)
            with pytest.raises(Killed):
                store.save({"version": STATE_VERSION, "step": 2})
        assert store.step() == 1
    assert store.path.with_suffix(".pt.partial").exists()
    store.save({"version": STATE_VERSION, "step": 3})
    assert store.step() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    store.clear()
    assert not store.exists()


def test_a_full_disk_is_said_and_the_last_state_stays(tmp_path, monkeypatch):
    store = StateStore(tmp_path)
    store.save({"version": STATE_VERSION, "step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("padst_cli.training.state.os.fsync", full)
    with pytest.raises(PadstError, match="free some space"):
        store.save({"version": STATE_VERSION, "step": 2})
    assert store.step() == 1


def test_missing_damaged_and_foreign_states_are_refused(bench, tmp_path):
    store = StateStore(tmp_path)
    with pytest.raises(PadstError, match="no state"):
        store.load()
    store.path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(PadstError, match="cannot be read"):
        store.load()
    torch.save({"version": 99}, store.path)
    with pytest.raises(PadstError, match="another version"):
        store.load()
    bench.train(bench.recipe(), store=store)
    with pytest.raises(PadstError, match=r"training\.learning_rate = 0\.001"):
        bench.train(bench.recipe(**{"training.learning_rate": 0.01}), store=store, resume=True)
    bench.dataset.ids = bench.dataset.ids[:-1]
    with pytest.raises(PadstError, match="23"):
        bench.train(bench.recipe(), store=store, resume=True)


def test_what_is_only_shown_may_change_on_resume(bench, tmp_path, events):
    store = StateStore(tmp_path)
    with pytest.raises(Interrupted):
        bench.train(bench.recipe(), store=store, on_event=interrupt_at(3, events))
    student, _ = bench.train(bench.recipe(**{"training.log_every": 5}), store=store, resume=True)
    assert not any(perm.is_soft for layer in sparse_layers(student).values() for _, perm in layer.permutations())


def test_without_a_store_an_interrupt_still_ends_the_run(bench, events):
    with pytest.raises(Interrupted, match="nothing was saved"):
        bench.train(bench.recipe(), on_event=interrupt_at(2, events))


def test_random_generators_come_back_where_they_were():
    state = random_state()
    draws = [random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1)]
    restore_random_state(state)
    assert [random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1)] == draws


@pytest.mark.usefixtures("ctrl_c")
def test_signals_are_caught_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before
    with stop_on_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
