"""The one error type of padst, and what it means to the shell."""

from __future__ import annotations


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


def nearest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    """` (did you mean 'x'?)` for the choice closest to `word`, or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
