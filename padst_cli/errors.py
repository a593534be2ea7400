"""The one error type of padst, and what it means to the shell."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class PadstError(Exception):
    """Something the user can put right: one sentence that says what is wrong, where, and what to do.

    The command line prints the sentence without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class CheckFailed(PadstError):
    """A check that the user asked for did not hold (exit code 1): the input was fine, the answer is no."""

    exit_code = 1


class Interrupted(PadstError):
    """Work stopped on request after its state was saved (exit code 130); the message names the resume command."""

    exit_code = 130


def no_space(error: BaseException | None) -> str | None:
    """What the system says where an error comes of a full disk or quota, None of any other.

    torch tells of a full disk in an error that follows the system's, safetensors in the text of its own.
    """
    while error is not None:
        for code in _FULL:
            if getattr(error, "errno", None) == code or f"(os error {code})" in str(error):
                said = os.strerror(code)
                return said[:1].lower() + said[1:]
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def full_disk_told(place: object, then: str) -> Iterator[None]:
    """Tell of a disk that is full in the block as a `PadstError`: where, and what to do `then`, with space."""
    try:
        yield
    except PadstError:
        raise
    except Exception as error:
        said = no_space(error)
        if said is None:
            raise
        raise PadstError(f"{said} for '{place}'; free some, then {then}") from error


def nearest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    """` (did you mean 'x'?)` for the choice closest to `word`, or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
