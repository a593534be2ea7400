"""Running a grid: what is skipped, resumed, recorded and stopped. A script that takes no time stands in for a run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from padst_cli.checkpoint.writer import write_atomically
from padst_cli.errors import PadstError
from padst_cli.events import CellFinished, Event, Message
from padst_cli.study import StudyRecipe, StudyResult, runner, study
from padst_cli.study.folder import LOCK, CellFolder, locked

# What a run leaves, and how one ends whose folder's name is in fates.json.
RUN = r"""
import json, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)  # as padst does
cell, resume = pathlib.Path(sys.argv[1]), sys.argv[2] == "True"
home = cell.parent.parent.parent
with (home / "calls.txt").open("a") as calls:
    calls.write(f"{cell.name} {'resumed' if resume else 'begun'}\n")
fate = json.loads((home / "fates.json").read_text()).get(cell.name, "well") if not resume else "well"
run = cell / "run"
if fate == "bad input":
    print(json.dumps({"error": "the loss is nan at step 3", "exit_code": 2}))
    sys.exit(2)
if fate == "crash":
    raise RuntimeError("out of something")
if fate == "killed":
    signal.raise_signal(signal.SIGKILL)
if fate == "half-made":
    (run / "state").mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    signal.raise_signal(signal.SIGKILL)
(run / "state").mkdir(parents=True, exist_ok=resume)
(run / "state" / "progress.json").write_text("{}")
if fate == "slow":
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
seed = int(cell.name.rpartition("seed")[2])
metric = {"name": "perplexity", "dense": 8.0, "dense_finetuned": None, "initial": 90.0, "final": 20.0 + seed}
results = {
    "sparsity_achieved": 0.9, "task": "causal-lm", "metric": metric, "kl_to_dense": 1.0 + seed / 10,
    "dense_finetuned_kl_to_dense": None, "steps": 10, "seconds": 9.0, "eval_data": "h.txt", "eval_digest": "d",
    "permutations": {"learned": 4, "moved_from_start": 17, "moved_in_training": 3},
    "environment": {"hardware": "some CPU"},
}
events = [
    {"event": "Step", "step": 2, "seconds": 0.8, "hardened": 0, "layers": 4, "control": False},
    {"event": "Step", "step": 10, "seconds": 2.0, "hardened": 4, "layers": 4, "control": False},
    {"event": "Step", "step": 10, "seconds": 3.0, "hardened": 0, "layers": 0, "control": True},
]
(run / "results.json").write_text(json.dumps(results))
(run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
(run / "model.safetensors").write_text("weights")
(run / "config.json").write_text("{}")
(run / "state" / "progress.json").unlink()
(run / "state").rmdir()
"""


class Bench:
    """A study of four cells over the stand-in."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.output = home / "out"
        self.events: list[Event] = []
        self.fates({})

    def fates(self, fates: dict[str, str]) -> None:
        (self.home / "fates.json").write_text(json.dumps(fates))

    def recipe(self, **changes: Any) -> StudyRecipe:
        raw = {
            "models": [{"model": "tiny", "data": "t.txt", "eval_data": "h.txt"}],
            "structures": ["diag"],
            "sparsities": [0.9],
            "permutations": ["learned"],
            "controls": ["rigl"],
            "seeds": [0, 1],
            "steps": 10,
        }
        return StudyRecipe.from_dict({**raw, **changes})

    def run(
        self, overwrite: bool = False, on_event: Callable[[Event], None] | None = None, **changes: Any
    ) -> StudyResult:
        """The study, and with it the calls it made."""
        (self.home / "calls.txt").write_text("")
        return study(self.recipe(**changes), self.output, overwrite=overwrite, on_event=on_event or self.events.append)

    @property
    def calls(self) -> list[str]:
        return (self.home / "calls.txt").read_text().splitlines()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    def command(folder: CellFolder, device: str, resume: bool) -> list[str]:
        assert device == "auto"
        return [sys.executable, "-S", "-E", "-c", RUN, str(folder.path), str(resume)]

    monkeypatch.setattr(runner, "command", command)
    monkeypatch.setattr("padst_cli.study.run.study_chart", lambda summary: f"<svg>{summary.model}</svg>")
    return Bench(tmp_path)


CELLS = [f"tiny-{place}-0.9-seed{seed}" for seed in (0, 1) for place in ("unstructured-rigl", "diag-learned")]


def test_all_cells_are_run_once(bench: Bench) -> None:
    result = bench.run()
    assert bench.calls == [f"{name} begun" for name in CELLS]
    assert [(cell.seed, cell.final, cell.kl_to_dense) for cell in result.cells] == [
        (0, 20.0, 1.0), (0, 20.0, 1.0), (1, 21.0, 1.1), (1, 21.0, 1.1),
    ]  # fmt: skip
    first = result.cells[0]
    assert (first.seconds, first.step_seconds, first.soft_step_seconds) == (6.0, 0.2, 0.4), "without the dense control"
    assert (first.learned, first.moved, first.moved_in_training) == (4, 17, 3)
    assert first.peak_bytes is not None
    assert first.peak_bytes > 1_000_000
    assert (result.failures, result.unfinished) == ({}, ())
    assert [event.done for event in bench.events if isinstance(event, CellFinished)] == [1, 2, 3, 4]
    said = json.loads((bench.output / "study.json").read_text())
    assert [cell["final"] for cell in said["cells"]] == [20.0, 20.0, 21.0, 21.0]
    assert {"STUDY.md", "study.json", "tiny.svg"} == set(result.files) <= {file.name for file in bench.output.iterdir()}


def test_what_is_done_is_skipped_and_a_larger_grid_runs_the_rest(bench: Bench) -> None:
    bench.run()
    assert bench.run().cells == bench.run().cells
    assert bench.calls == []
    assert any("4 of 4 cells are done" in event.text for event in bench.events if isinstance(event, Message))
    assert len(bench.run(seeds=[0, 1, 2]).cells) == 6
    assert bench.calls == [name.replace("seed1", "seed2") + " begun" for name in CELLS[2:]]


@pytest.mark.parametrize(
    ("fate", "sentence"),
    [
        ("bad input", "the loss is nan at step 3"),
        ("crash", "exit code 1: RuntimeError: out of something"),
        ("killed", "killed by signal 9"),
        ("half-made", "killed by signal 9"),
    ],
)
def test_a_failing_cell_is_recorded_and_stops_nothing(bench: Bench, fate: str, sentence: str) -> None:
    bench.fates({CELLS[1]: fate})
    result = bench.run()
    assert len(bench.calls) == 4
    assert result.failures == {CELLS[1]: sentence}
    assert len(result.cells) == 3
    page = (bench.output / "STUDY.md").read_text()
    assert f"- `{CELLS[1]}`: {sentence}" in page
    assert "3 of 4 cells done, 1 failed" in page

    bench.fates({})
    again = bench.run()
    assert bench.calls == [f"{CELLS[1]} begun"], "what failed is tried again"
    assert (again.failures, len(again.cells)) == ({}, 4)


def test_an_interrupt_lets_runs_save_and_the_next_call_resumes_them(bench: Bench) -> None:
    bench.fates({CELLS[1]: "slow"})
    state = bench.output / "cells" / CELLS[1] / "run" / "state" / "progress.json"

    def interrupt_after_one(event: Event) -> None:
        if isinstance(event, CellFinished):
            # The other must be at work, so that there is something to resume.
            deadline = time.monotonic() + 30
            while not state.is_file() and time.monotonic() < deadline:
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(jobs=2, on_event=interrupt_after_one)
    assert sorted(bench.calls) == sorted(f"{name} begun" for name in CELLS[:2])
    page = (bench.output / "STUDY.md").read_text()
    assert "1 of 4 cells done, 0 failed, 3 still to run" in page
    assert state.is_file()

    result = bench.run(jobs=2)
    assert sorted(bench.calls) == sorted([f"{CELLS[1]} resumed", *(f"{name} begun" for name in CELLS[2:])])
    assert len(result.cells) == 4


def test_a_run_that_ended_after_the_study_was_killed_is_taken_as_it_is(bench: Bench) -> None:
    before = bench.run()
    (bench.output / "cells" / CELLS[2] / "figures.json").unlink()
    assert bench.run().cells == before.cells
    assert bench.calls == []


@pytest.mark.parametrize(
    ("file", "wrong", "words"),
    [
        ("run/results.json", {"metric": []}, "metric should be an object"),
        ("run/results.json", {"seconds": "9"}, "seconds should be a valid number"),
        ("run/results.json", {"environment": {}}, "it lacks environment.hardware"),
        ("run/results.json", None, "it is not there"),
        ("figures.json", {"final": "20"}, "final should be a valid number"),
        ("peak.json", {"bytes": None}, "bytes should be a valid integer"),
    ],
)
def test_figures_of_a_wrong_type_are_said(bench: Bench, file: str, wrong: dict[str, Any] | None, words: str) -> None:
    bench.run()
    cell = bench.output / "cells" / CELLS[0]
    if file != "figures.json":
        (cell / "figures.json").unlink()  # as where a study was stopped before it had taken them
    path = cell / file
    if wrong is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(PadstError, match=f"'{re.escape(str(path))}' is damaged \\({words}\\); remove"):
        bench.run()


def test_another_recipe_is_refused_until_all_is_dropped(bench: Bench) -> None:
    bench.run()
    with pytest.raises(
        PadstError, match=r"'tiny-unstructured-rigl-0.9-seed0' was run with training.steps = 10, not 11"
    ):
        bench.run(steps=11)
    assert bench.calls == []
    assert len(bench.run(steps=11, overwrite=True).cells) == 4
    assert len(bench.calls) == 4


def test_weights_go_where_they_are_not_wanted(bench: Bench) -> None:
    bench.run(checkpoints=False)
    left = {file.name for file in (bench.output / "cells" / CELLS[0] / "run").iterdir()}
    assert left == {"results.json", "log.jsonl"}
    assert len(bench.run(checkpoints=False).cells) == 4
    assert bench.calls == []


def test_folders_that_are_in_the_way(bench: Bench) -> None:
    bench.output.mkdir()
    (bench.output / "thesis.tex").write_text("")
    with pytest.raises(PadstError, match="something other than a study"):
        bench.run(overwrite=True)
    (bench.output / "thesis.tex").unlink()
    with (bench.output / LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(PadstError, match="at work in another process"):
            bench.run()
    assert bench.calls == []
    assert len(bench.run().cells) == 4


def test_a_run_that_was_left_alone_holds_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "out") as lock:
        left = subprocess.Popen([sys.executable, "-S", "-E", "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
    try:
        with pytest.raises(PadstError, match="a run of it that was left alone"), locked(tmp_path / "out"):
            pytest.fail("two at work")
    finally:
        left.kill()
        left.wait()
    with locked(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).is_file()


def test_the_command_of_a_cell(tmp_path: Path) -> None:
    from padst_cli.study import expand

    cell = expand(Bench(tmp_path).recipe())[0]
    folder = CellFolder(tmp_path / "cell", cell)
    words = runner.command(folder, "cpu", resume=True)
    assert words[:5] == [sys.executable, "-m", "padst_cli", "sparsify", "tiny"]
    assert words[-4:] == ["--device", "cpu", "--json", "--resume"]
    assert words[5:9] == [
        "--recipe",
        str(tmp_path / "cell" / "recipe.yaml"),
        "--output",
        str(tmp_path / "cell" / "run"),
    ]


@pytest.mark.parametrize("name", ["peak.json", "failure.json", "STUDY.md"])
def test_a_full_disk_is_one_sentence_and_loses_no_cell(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bench.fates({CELLS[1]: "bad input"})

    def full(path: Path, content: str) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomically(path, content)

    with monkeypatch.context() as patched:
        for module in ("folder", "run"):
            patched.setattr(f"padst_cli.study.{module}.write_atomically", full)
        if name == "peak.json":
            assert [cell.peak_bytes for cell in bench.run().cells] == [None] * 3, "only these figures are lost"
        else:
            with pytest.raises(PadstError, match=r"no space left on device for .*; free some, then start"):
                bench.run()
    bench.fates({})
    assert len(bench.run().cells) == 4
    assert CELLS[0] not in "".join(bench.calls), "it was done"
