"""A run's folder, stopped at the moments that matter: it never looks whole before it is, nor unfinished after."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from padst_cli.checkpoint.output import is_own
from padst_cli.checkpoint.run_folder import RunFolder
from padst_cli.checkpoint.writer import write_atomically
from padst_cli.errors import PadstError
from padst_cli.events import Evaluated, Event, PhaseStarted, Step


@pytest.fixture
def stop_at_removal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After this call the removal of a folder is where the kill comes."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    return lambda: monkeypatch.setattr(shutil, "rmtree", stop)


def finished(path: Path) -> RunFolder:
    """A folder whose run has come to its end, with the checkpoint it is about to move in."""
    folder = RunFolder(path)
    folder.begin("structure: diag\n")
    built = folder.state / "checkpoint"
    built.mkdir()
    for name in ("config.json", "model.safetensors"):
        (built / name).write_text(name)
    return folder


def step(number: int, control: bool) -> Step:
    return Step(number, 30, 1.0, 1e-3, 0, 0, 1.0, number, {}, {}, control)


def test_a_control_that_goes_on_keeps_what_was_logged_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.begin("structure: diag\n")
    training: list[Event] = [PhaseStarted("train", 30), *(step(number, False) for number in (10, 20, 30))]
    control: list[Event] = [PhaseStarted("dense control", 30), *(step(number, True) for number in (10, 20))]
    for event in (*training, Evaluated(30, "perplexity", 2.0, "final"), *control):
        folder.log(event)
    before = folder.events()
    folder.rewind_log(30, control=False)  # training is taken up again at its end, then the control in its middle
    folder.rewind_log(20, control=True)
    assert folder.events() == before
    folder.rewind_log(10, control=True)
    assert folder.events() == before[:-1]
    folder.rewind_log(30, control=False)
    assert folder.events() == before[:-1]


def test_a_line_cut_off_by_a_kill_does_not_spoil_what_follows(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.begin("structure: diag\n")
    folder.mend_log()
    assert folder.events() == []
    folder.log(PhaseStarted("calibrate", 8))
    with (folder.path / "log.jsonl").open("a") as log:
        log.write('{"event": "Phas')
    folder.mend_log()
    folder.log(PhaseStarted("train", 30))
    assert [event["phase"] for event in folder.events()] == ["calibrate", "train"]


@pytest.mark.parametrize("line", [b"5", b"[]", b'{"step": 3}'])
def test_a_line_that_is_no_event_is_said(tmp_path: Path, line: bytes) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.begin("structure: diag\n")
    folder.log(PhaseStarted("train", 30))
    with (folder.path / "log.jsonl").open("ab") as log:
        log.write(line + b"\n")
    with pytest.raises(PadstError, match=r"line 2 of '.*log\.jsonl' is not an event; remove it"):
        folder.mend_log()
    (folder.path / "log.jsonl").write_bytes(b'{"event": "Saved"}\n\xff\xfe')
    assert folder.events() == [{"event": "Saved"}]


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_damaged_progress_file_is_said(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.begin("structure: diag\n")
    (folder.state / "progress.json").write_text(content)
    with pytest.raises(PadstError, match=r"progress\.json' is damaged.*--overwrite"):
        folder.load_progress()


def test_a_finished_run_leaves_no_state(tmp_path: Path) -> None:
    folder = finished(tmp_path / "out")
    assert folder.is_unfinished
    folder.finish(folder.state / "checkpoint", {"steps": 1})
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "results.json",
    ]
    with pytest.raises(PadstError, match="finished: nothing to resume"):
        folder.check_resumable()


def test_stopped_at_the_very_end_it_is_whole(tmp_path: Path, stop_at_removal: Callable[[], None]) -> None:
    folder = finished(tmp_path / "out")
    stop_at_removal()
    with pytest.raises(KeyboardInterrupt):
        folder.finish(folder.state / "checkpoint", {"steps": 1})
    assert (folder.path / "config.json").is_file()
    assert not folder.is_unfinished, "with half of its state a run could not go on"


def test_stopped_while_an_old_result_is_replaced_it_is_neither_whole_nor_unfinished(
    tmp_path: Path, stop_at_removal: Callable[[], None]
) -> None:
    folder = finished(tmp_path / "out")
    (folder.path / "config.json").write_text("old")
    stop_at_removal()
    with pytest.raises(KeyboardInterrupt):
        folder.begin("structure: nm\n")
    assert not (folder.path / "config.json").exists()
    assert not folder.is_unfinished
    (folder.path / "results.json").touch()
    assert is_own(folder.path), "what a kill leaves may be overwritten"


@pytest.mark.parametrize("way", ["folder", "link", "."])
def test_a_run_begins_in_the_folder_that_is_there(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    monkeypatch.chdir(tmp_path / ("folder" if way == "." else ""))
    RunFolder(Path(way)).begin("structure: nm\n")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["recipe.yaml", "state"]
    assert (tmp_path / "link").is_symlink()


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path: Path) -> None:
    gone = next(number for number in range(4_000_000, 5_000_000) if not Path(f"/proc/{number}").exists())
    (tmp_path / f".log.jsonl.writing-{gone}").write_text("half")
    mine = tmp_path / f".log.jsonl.writing-{os.getppid()}"
    mine.write_text("another process that still writes")
    write_atomically(tmp_path / "log.jsonl", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "log.jsonl"]
    assert (tmp_path / "log.jsonl").read_text() == "whole"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "log.jsonl", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device", "log.jsonl")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "log.jsonl", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert (tmp_path / "log.jsonl").read_text() == "old"


def test_a_beginning_that_fails_leaves_the_place_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    written: list[int] = []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 2:  # the recipe and its folder are on the disk
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        RunFolder(tmp_path / "out").begin("structure: nm\n")
    assert list((tmp_path / "out").iterdir()) == []
