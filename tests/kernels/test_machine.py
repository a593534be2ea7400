"""The costs of a machine: measured when they must be, kept, found again, and measured anew when damaged."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from padst_kernels.cost import TOKENS, Costs
from padst_kernels.cpu import calibrate, machine
from padst_kernels.cpu.library import TYPES

from tests.costs import SPARSE_ONLY, costs

REAL_COSTS = machine.costs


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and how often was measured with how many threads."""
    measured = []

    def measure(threads):
        measured.append(threads)
        return costs(kernel=1e-9 * threads, dense=1e-9, unpack=1e-9)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "costs", REAL_COSTS)
    monkeypatch.setattr(calibrate, "measure", measure)
    machine._known.cache_clear()
    yield measured
    machine._known.cache_clear()


def forget() -> None:
    """As in a new process."""
    machine._known.cache_clear()


def test_measured_once_and_found_again(cache, tmp_path, caplog):
    first = machine.costs(1)
    assert "measuring how fast this machine is" in caplog.text
    assert machine.costs(1) is first
    forget()
    assert machine.costs(1) == first
    assert cache == [1]
    machine.costs(2)
    assert cache == [1, 2]
    assert {file.name for file in (tmp_path / "padst").iterdir()} == {
        machine.cache_file(machine.machine_key(threads)).name for threads in (1, 2)
    }


@pytest.mark.parametrize("kept", [True, False])
def test_threads_that_start_at_once_measure_once(cache, monkeypatch, kept):
    def measure(threads):
        cache.append(threads)
        time.sleep(0.05)
        return SPARSE_ONLY

    monkeypatch.setattr(calibrate, "measure", measure)
    if not kept:
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(machine.costs, [1] * 4))
    assert cache == [1]
    assert all(one is found[0] for one in found)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": {}, "costs": {}}', "\x00\x01"])
def test_a_damaged_file_is_measured_anew(cache, damage):
    first = machine.costs(1)
    path = machine.cache_file(machine.machine_key(1))
    path.write_text(damage)
    forget()
    assert machine.costs(1) == first
    assert cache == [1, 1]
    assert Costs.from_json(json.loads(path.read_text())["costs"]) == first


def test_costs_of_another_machine_are_not_used(cache, monkeypatch):
    machine.costs(1)
    path = machine.cache_file(machine.machine_key(1))
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "key": {**raw["key"], "cpu": "another"}}))
    forget()
    machine.costs(1)
    assert cache == [1, 1]
    monkeypatch.setattr(machine, "_cpu_name", lambda: "another")
    assert machine.cache_file(machine.machine_key(1)) != path


def test_without_a_folder_to_write_to_all_goes_on(cache, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine.costs(1) == machine.costs(1)
    assert cache == [1]
    assert "could not be kept" in caplog.text


@pytest.mark.usefixtures("cache")
def test_recalibrating_replaces_what_is_kept(monkeypatch):
    machine.costs(1)
    monkeypatch.setattr(calibrate, "measure", lambda _: SPARSE_ONLY)
    assert machine.recalibrate(1) == SPARSE_ONLY
    assert machine.costs(1) == SPARSE_ONLY
    forget()
    assert machine.costs(1) == SPARSE_ONLY


def test_the_cache_folder(monkeypatch, tmp_path):
    key = machine.machine_key(1)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.cache_file(key).parent == tmp_path / ".cache" / "padst"
    assert set(key) == {"cpu", "isa", "threads", "torch", "kernels"}
    assert all(key.values())


def test_importing_measures_nothing(tmp_path):
    code = "import padst_kernels.dispatch, padst_cli.runtime.packed_linear"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "measuring" not in done.stderr
    assert not (tmp_path / "padst").exists()


def test_a_measurement_is_complete_and_leaves_torch_as_it_was(monkeypatch):
    monkeypatch.setattr(calibrate, "OUT", 128)
    monkeypatch.setattr(calibrate, "IN", 128)
    monkeypatch.setattr(calibrate, "ENOUGH", 1e-5)
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    before, state = torch.get_num_threads(), torch.random.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        found = calibrate.measure(2)
    assert torch.get_num_threads() == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert Costs.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert set(found.kernels) == {
        f"{family} {dtype}" for family in calibrate.SIZES for dtype in ("float32", "bfloat16")
    }
    assert set(found.dense) == {str(dtype).removeprefix("torch.") for dtype in TYPES}
    assert all(len(curve.rates) == len(TOKENS) for curve in (*found.kernels.values(), *found.dense.values()))


def test_the_cells_of_a_group_take_their_times_from_one_round(monkeypatch):
    monkeypatch.setattr(calibrate, "ROUNDS", 2)
    cells = calibrate._Cells()
    one, two, other = (cells.add(group, lambda: None) for group in (1, 1, 2))
    for cell, rounds in ((one, [1.0, 2.0]), (two, [9.0, 5.0]), (other, [3.0, 4.0])):
        monkeypatch.setattr(cell, "run", lambda cell=cell, rounds=iter(rounds): cell.rounds.append(next(rounds)))
    cells.run()
    assert (one.seconds, two.seconds, other.seconds) == (2.0, 5.0, 3.0)


def test_a_long_call_is_made_once():
    calls = []
    cell = calibrate._Cell(lambda: calls.append(time.sleep(1.1 * calibrate.LONG)))
    cell.run()
    cell.run()
    assert len(calls) == 1
    assert cell.rounds[0] == cell.rounds[1] > calibrate.LONG


def test_what_only_the_first_call_takes_does_not_count():
    calls = []
    cell = calibrate._Cell(lambda: calls.append(time.sleep(0 if calls else 0.6 * calibrate.LONG)))
    cell.run()
    assert len(calls) > 1
    assert cell.rounds[0] < 0.3 * calibrate.LONG
