"""The GPU table: that every row runs (on a CPU, tiny), and that one which does not stands in it all the same."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from padst_cli.bench import gpu_table
from padst_cli.bench.gpu_rows import FULL, TINY, Figures, Group, Row, Setting, groups
from padst_cli.stopwatch import Timing

QUICK = Timing(repeats=1, run_seconds=1e-4, rotate_bytes=2**12, max_copies=2)
CPU = Setting(torch.device("cpu"), torch.float32, TINY, QUICK)
ROWS = {group.name: group for group in groups(TINY)}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def given(**changes):
    parsed = gpu_table._parser().parse_args(["--device", "cpu", "--tiny", "--dtype", "float32"])
    return argparse.Namespace(**{**vars(parsed), **changes})


@pytest.mark.parametrize("name", ROWS)
def test_every_row_runs(name, tmp_path):
    group, results = ROWS[name], tmp_path / "rows"
    gpu_table.measure(group, CPU, results)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["row"] for line in lines] == [row.name for row in group.rows]
    for line in lines:
        assert "error" not in line, line
        assert line["speedup"] > 0
        assert line["kernels"]


def test_the_goals_are_all_there():
    goals = {row.name: row.goal for group in groups(FULL) for row in group.rows}
    for tokens in (1, 16):
        for variant, goal in (("diag", 5.0), ("block 32", 5.0), ("block 64", 5.0), ("nm", 4.5)):
            assert goals[f"4096 -> 11008, T={tokens}, {variant}"] == goal
    assert goals["4096 -> 11008, T=4096, block 64"] == 5.0
    assert goals["4096 -> 11008, T=4096, diag, bands of 64"] == 2.0
    assert goals["Llama-2-7B, decoding, batch 1, block 32"] == 3.0
    assert goals["ViT-B/16, batch 256, block 64"] == 1.8
    assert goals["GPT-2 small, prefill 16 x 1024, block 64"] == 2.0
    assert goals["GPT-2 small, prefill 16 x 1024, diag in bands of 64"] == 1.5
    assert goals["GPT-2 small, fine-tuning step, 8 x 1024, block 64"] == 1.21
    assert sum(group.budget for group in groups(FULL)) <= gpu_table.BUDGET < 480


def test_a_failing_row_costs_itself_only(tmp_path):
    def fail(_):
        raise ValueError("no such kernel\nand more")

    def work(_):
        return Figures(2.0, 1.0, "us", 2.0, "a-kernel")

    group = Group("g", 1, (Row("bad", 2.0, fail), Row("good", 2.0, work)))
    results = tmp_path / "rows"
    gpu_table.measure(group, CPU, results)
    bad, good = (json.loads(line) for line in results.read_text().splitlines())
    assert bad == {"row": "bad", "error": "ValueError: no such kernel"}
    assert good["speedup"] == 2.0


def test_the_page():
    rows = (Row("a", 2.0, None), Row("b", 3.0, None), Row("c", None, None), Row("d", 1.0, None))
    figures = {"dense": 1234.56, "sparse": 617.0, "unit": "us", "speedup": 2.001, "kernels": "k", "notes": ["n"]}
    found = {"a": figures, "b": {**figures, "notes": []}, "c": {"error": "RuntimeError: a | b"}}
    text = gpu_table.page([Group("g", 1, rows)], found, "cpu", "bfloat16")
    lines = text.splitlines()
    assert "| a | 2x | 1,234.6 us | 617.0 us | 2.00x | yes | k |" in lines
    assert "| b | 3x | 1,234.6 us | 617.0 us | 2.00x | no | k |" in lines
    assert "| c | - | error: RuntimeError: a / b | | | | |" in lines
    assert "| d | 1x | not measured: it did not fit the time | | | | |" in lines
    assert lines[0] == "## GPU kernels"
    assert lines[-1] == "- n"
    assert "make bench-gpu" in text


class _Process:
    """A process of a group that writes what it is told, and ends or not."""

    def __init__(self, command, lines, code):
        self.results, self.code, self.pid = Path(command[command.index("--results") + 1]), code, 0
        there = self.results.read_text()
        new = [line for line in lines if line["row"] not in gpu_table._rows_of(there)]
        self.results.write_text(there + "".join(json.dumps(line) + "\n" for line in new) + '{"row": "c", "spee')

    def wait(self, timeout=None):
        if self.code is None:
            raise subprocess.TimeoutExpired("group", timeout)
        return self.code

    def poll(self):
        return self.code


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, {"a": {"speedup": 2}}),
        (None, {"a": {"speedup": 2}}),
        (1, {"a": {"speedup": 2}, "b": {"error": "its process ended with code 1"}}),
        (-11, {"a": {"speedup": 2}, **{row: {"error": "its process ended with code -11"} for row in "bc"}}),
    ],
)
def test_what_a_process_measured_before_its_end_counts(monkeypatch, code, expected):
    ended = []
    process = lambda command, **_: _Process(command, [{"row": "a", "speedup": 2}], code)  # noqa: E731
    monkeypatch.setattr(gpu_table.subprocess, "Popen", process)
    monkeypatch.setattr(gpu_table, "_end", ended.append)
    group = Group("g", 1, tuple(Row(name, None, None) for name in "abc"))
    assert gpu_table._run_group(group, given(), 5.0) == expected
    assert len(ended) == (2 if code == -11 else 1)


def test_behind_a_row_that_loses_the_device_another_process_goes_on(monkeypatch):
    calls, lost = [], []

    def row(name):
        def work(_):
            calls.append(name)
            if name == "b":
                lost.append(name)
                raise RuntimeError("CUDA error: misaligned address")
            return Figures(2.0, 1.0, "us", 2.0, "a-kernel")

        return Row(name, 2.0, work)

    def run(command, _):
        lost.clear()
        try:
            gpu_table.measure(group, CPU, Path(command[command.index("--results") + 1]))
        except SystemExit as end:
            return end.code
        return 0

    group = Group("g", 1, tuple(map(row, "abc")))
    monkeypatch.setattr(gpu_table, "is_lost", lambda _: bool(lost))
    monkeypatch.setattr(gpu_table, "_run", run)
    found = gpu_table._run_group(group, given(), 5.0)
    assert calls == ["a", "b", "c"]
    assert found["b"] == {"error": "RuntimeError: CUDA error: misaligned address"}
    assert found["a"]["speedup"] == found["c"]["speedup"] == 2.0


def test_a_device_is_lost_where_it_cannot_be_waited_for(monkeypatch):
    def refused(_):
        raise RuntimeError("CUDA error: misaligned address")

    assert not gpu_table.is_lost(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    assert not gpu_table.is_lost(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", refused)
    assert gpu_table.is_lost(torch.device("cuda"))


def test_what_a_group_does_not_use_those_after_it_may(monkeypatch):
    now, seen = iter((0.0, 0.0, 4.0, 93.0)), []
    monkeypatch.setattr(gpu_table.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(gpu_table, "_run_group", lambda group, _, allowed: seen.append((group.name, allowed)) or {})
    table = [Group(name, gpu_table.BUDGET / 3, ()) for name in "abc"]
    assert list(gpu_table.collect(table, given(budget=90.0))) == [{}, {}, {}]
    assert seen == [("a", pytest.approx(30.0)), ("b", pytest.approx(56.0))]


def test_a_process_that_does_not_end_is_ended_with_what_it_started():
    code = "import os, time; os.fork(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    gpu_table._end(process)
    assert process.returncode == -9
    gpu_table._end(process)


@pytest.mark.parametrize(("complete", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_every_row_was_measured(monkeypatch, tmp_path, capsys, complete, code):
    figures = {"dense": 1.0, "sparse": 1.0, "unit": "us", "speedup": 1.0, "kernels": "k"}
    names = [row.name for group in groups(TINY) for row in group.rows]
    found = dict.fromkeys(names if complete else names[:-1], figures)
    monkeypatch.setattr(gpu_table, "collect", lambda *_: iter([found]))
    assert gpu_table.main(["--device", "cpu", "--tiny", "--output", str(tmp_path / "page.md")]) == code
    assert capsys.readouterr().out.strip() == (tmp_path / "page.md").read_text().strip()


def test_rows_that_are_there_outlive_the_run(monkeypatch, tmp_path, capsys):
    name = groups(TINY)[0].rows[0].name
    figures = {"dense": 2.0, "sparse": 1.0, "unit": "us", "speedup": 2.0, "kernels": "k"}

    def collect(*_):
        yield {name: figures}
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_table, "collect", collect)
    with pytest.raises(KeyboardInterrupt):
        gpu_table.main(["--device", "cpu", "--tiny", "--output", str(tmp_path / "page.md")])
    assert "2.00x" in (tmp_path / "page.md").read_text()
    assert "2.00x" in capsys.readouterr().out


def test_ended_by_a_signal_it_ends_what_it_started(monkeypatch):
    code = "import os, signal, time; time.sleep(0.5); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    popen, started, before = subprocess.Popen, [], signal.getsignal(signal.SIGTERM)

    def start(_, **options):
        started.append(popen([sys.executable, "-c", code], **{**options, "stdout": None}))
        return started[-1]

    monkeypatch.setattr(gpu_table.subprocess, "Popen", start)
    with pytest.raises(SystemExit, match="143"):
        gpu_table.main(["--device", "cpu", "--tiny"])
    assert [process.returncode for process in started] == [-9]
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_table.main([]) == 2
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_one_group_in_its_own_process(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(gpu_table, "measure", lambda *arguments: seen.append(arguments))
    results = str(tmp_path / "rows")
    assert gpu_table.main(["--device", "cpu", "--tiny", "--group", "vit", "--results", results, "--deadline", "7"]) == 0
    ((group, setting, file),) = seen
    assert (group.name, str(file)) == ("vit", results)
    assert (setting.device.type, setting.dtype, setting.deadline, setting.sizes) == ("cpu", torch.bfloat16, 7.0, TINY)
