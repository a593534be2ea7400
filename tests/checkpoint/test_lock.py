"""One process at a time works in a folder, and none is kept out by one that is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from fnmatch import fnmatch
from pathlib import Path

import pytest

from padst_cli.checkpoint.lock import at_work, check_idle, holding
from padst_cli.checkpoint.output import check_output, is_own
from padst_cli.checkpoint.run_folder import RunFolder
from padst_cli.checkpoint.writer import LOCK, atomic_folder
from padst_cli.errors import PadstError
from padst_cli.hub import UPLOADED

BUSY = r"another process is at work in '.*out'; wait for it or stop it, or name another folder with --output"


def test_the_second_is_refused_and_the_first_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_idle(out)
    with at_work(out):
        (out / "recipe.yaml").write_text("mine")
        with pytest.raises(PadstError, match=BUSY):
            check_idle(out)
        with pytest.raises(PadstError, match=BUSY), at_work(out):
            pytest.fail("two at work")
        with pytest.raises(PadstError, match=BUSY):
            check_idle(out)
    assert [file.name for file in out.iterdir()] == ["recipe.yaml"]
    check_idle(out)
    with at_work(out):
        pass


def test_what_was_made_and_stayed_empty_goes_again(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with pytest.raises(KeyboardInterrupt), at_work(out):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    with at_work(out):
        pass
    assert list(out.iterdir()) == [], "an empty folder that was there stays"


def test_the_lock_of_a_killed_process_is_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        with at_work(out):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [file.name for file in out.iterdir()] == [LOCK]
    check_idle(out)
    check_output(out, overwrite=False)
    assert not is_own(out)
    with at_work(out):
        RunFolder(out).begin("structure: nm\n")
        with pytest.raises(PadstError, match=BUSY):
            check_idle(out)
    assert sorted(file.name for file in out.iterdir()) == ["recipe.yaml", "state"]


def test_a_folder_that_is_emptied_keeps_its_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.begin("structure: diag\n")
    with at_work(folder.path):
        folder.begin("structure: nm\n")
        with pytest.raises(PadstError, match=BUSY):
            check_idle(folder.path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with at_work(tmp_path / "out"):
        check_idle(tmp_path / "out")
        (tmp_path / "out" / "file").touch()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["file"]


def test_a_lock_that_was_removed_before_it_was_had_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def late(*given: int) -> None:
        (tmp_path / LOCK).unlink()  # as its holder does on leaving
        flock(*given)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(PadstError, match="taken"), holding(tmp_path, "taken"):
        pytest.fail("the next would hold another file's")


def test_the_lock_of_a_folder_that_took_the_place_is_not_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with at_work(out):
        with atomic_folder(out) as temporary:
            (temporary / "config.json").write_text("{}")
        (out / LOCK).touch()  # another process is at work in the new folder by now
    assert sorted(file.name for file in out.iterdir()) == [LOCK, "config.json"]


def test_a_lock_is_not_published() -> None:
    assert not any(fnmatch(LOCK, pattern) for pattern in UPLOADED)
