"""May a folder be written? What padst replaces is its own: other people's work is never in reach of a flag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from padst_cli.checkpoint.format import QUANT_METHOD
from padst_cli.checkpoint.run_folder import LOG, PROGRESS, RECIPE, RESULTS, STATE, RunFolder
from padst_cli.checkpoint.writer import check_place, check_vacant, is_vacant
from padst_cli.errors import PadstError

STUDY: Final = "study.yaml"
CELLS: Final = "cells"
"""What a study keeps in its folder from its first run on: itself, and a folder with one for each run."""

_OF_A_RUN = (RESULTS, LOG, f"{STATE}/{PROGRESS}")


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise `PadstError` unless `path` may be written: absent, empty, or padst's own and to be overwritten.

    Loses nothing and makes nothing.
    """
    check_place(path)
    if not overwrite:
        check_vacant(path, "--resume goes on with the unfinished run in it, " if RunFolder(path).is_unfinished else "")
    elif not is_vacant(path) and not is_own(path):
        raise PadstError(
            f"output '{path}' was not written by padst, so --overwrite leaves it alone; remove it yourself"
        )


def check_apart(output: Path, inputs: dict[str, Path]) -> None:
    """Raise `PadstError` where one of `inputs`, by what they are, lies in the folder that is about to be emptied."""
    for what, path in inputs.items():
        if path.resolve().is_relative_to(output.resolve()):
            raise PadstError(f"output '{output}' holds the {what} '{path}'; name another folder with --output")


def is_no_data(folder: Path) -> bool:
    """Whether padst wrote a folder, which may lie among data: a run, finished or not, an export, or a study.

    A run whose output lies in the folder of its data would else read, resumed, other data than it began with.
    """
    return is_own(folder) or ((folder / STUDY).is_file() and (folder / CELLS).is_dir())


def is_own(folder: Path) -> bool:
    """Whether padst wrote what is in a folder: a packed model, or a recipe beside what only a run leaves there."""
    if (folder / RECIPE).is_file() and any((folder / name).is_file() for name in _OF_A_RUN):
        return True
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, TypeError, LookupError):
        return False
