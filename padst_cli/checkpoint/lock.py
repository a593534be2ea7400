"""One run works in a folder at a time: an advisory lock, which ends with the processes that hold it, however they end.

It is the lock of a file in the folder, so that on a shared disk other machines see it, too, and is taken with `flock`,
because a study hands it on to its runs. Where the file system has no locks all goes on without: that is no fault of
the user's, who could do nothing about it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from padst_cli.checkpoint.writer import LOCK, check_place, make_folder
from padst_cli.errors import PadstError


@contextmanager
def holding(folder: Path, taken: str) -> Iterator[int]:
    """Hold the lock of a folder that is there while the block runs, and give its descriptor.

    Processes that inherit the descriptor hold the lock as well. Raises `PadstError` in the words of `taken` where
    another process holds it.
    """
    with (folder / LOCK).open("ab") as file:
        _lock(file, fcntl.LOCK_EX, taken)
        if not _is_linked(file.fileno()):
            # Who held it before has removed it since it was opened: whoever comes next would lock another file.
            raise PadstError(taken)
        yield file.fileno()


@contextmanager
def at_work(output: Path) -> Iterator[None]:
    """Keep other runs out of the folder `output`, made where it is not there, while the block runs.

    The lock's file goes with the end of the block, and so does what was made and stayed empty. Raises `PadstError`
    where `output` cannot be a folder, and as `check_idle` does.
    """
    check_place(output)
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    if made:
        make_folder(output, output)
    try:
        with holding(output, _taken(output)) as lock:
            try:
                yield
            finally:
                if _is_linked(lock):  # or it went with a folder that was replaced
                    (output / LOCK).unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def check_idle(output: Path) -> None:
    """Raise `PadstError` where another process is at work in the folder `output`; makes nothing."""
    with suppress(FileNotFoundError, NotADirectoryError), (output / LOCK).open("rb") as file:
        # Shared, because the processes of one run all look.
        _lock(file, fcntl.LOCK_SH, _taken(output))


def _lock(file: IO[bytes], how: int, taken: str) -> None:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on some file systems
        raise PadstError(taken) from None
    except OSError:
        pass


def _taken(output: Path) -> str:
    return f"another process is at work in '{output}'; wait for it or stop it, or name another folder with --output"


def _is_linked(descriptor: int) -> bool:
    """Whether an open file still has a name."""
    return os.fstat(descriptor).st_nlink > 0
