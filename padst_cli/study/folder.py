"""The files of a study: one folder a cell, figures that mark a cell as done, and a lock that cells hold too.

study.yaml              the study as it was last started
cells/NAME/recipe.yaml  the cell's run recipe
cells/NAME/run/         the folder of its `padst sparsify`
cells/NAME/out.json, log.txt   what the run printed
cells/NAME/figures.json the cell is done, or
cells/NAME/failure.json its last attempt failed
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from padst_cli.checkpoint.lock import holding
from padst_cli.checkpoint.output import CELLS, STUDY
from padst_cli.checkpoint.run_folder import RECIPE, RunFolder
from padst_cli.checkpoint.stored import Form, read_stored
from padst_cli.checkpoint.writer import LOCK, check_place, make_folder, write_atomically
from padst_cli.document import dotted
from padst_cli.errors import PadstError, no_space
from padst_cli.recipe import load_recipe
from padst_cli.study.cells import Cell
from padst_cli.study.figures import CellFigures, read_figures
from padst_cli.study.recipe import StudyRecipe

_WEIGHTS: Final = ("*.safetensors", "*.safetensors.index.json", "config.json")


@dataclass(frozen=True)
class _Failure:
    """What failure.json holds: the sentence with which the last attempt failed."""

    error: str


@dataclass(frozen=True)
class _Peak:
    """What peak.json holds: the most memory that any process of the cell had."""

    bytes: int


class CellFolder:
    """The files of one cell."""

    def __init__(self, path: Path, cell: Cell) -> None:
        self.path = path
        self.cell = cell
        self.run = path / "run"
        self.recipe = path / RECIPE
        self.out = path / "out.json"
        self.log = path / "log.txt"
        self._figures = path / "figures.json"
        self._failure = path / "failure.json"
        self._peak = path / "peak.json"

    @property
    def is_unfinished(self) -> bool:
        """Whether a run that can be resumed lies here."""
        return RunFolder(self.run).is_unfinished

    def figures(self) -> CellFigures | None:
        """The figures of a done cell, None of any other."""
        return _read(self._figures, CellFigures)

    def failure(self) -> str | None:
        """The sentence with which the last attempt failed, None where it did not."""
        found = _read(self._failure, _Failure)
        return None if found is None else found.error

    def check(self) -> None:
        """Raise `PadstError` where what lies here, finished or not, was run with another recipe."""
        if not self.recipe.is_file() or not (self._figures.is_file() or self.run.is_dir()):
            return
        before = dotted(load_recipe(str(self.recipe)).model_dump(mode="json"))
        for key, value in dotted(self.cell.recipe.model_dump(mode="json")).items():
            if before[key] != value:
                raise PadstError(
                    f"cell '{self.cell.name}' was run with {key} = {before[key]}, not {value}; keep the study as it "
                    f"was, name another folder with --output, or start anew with --overwrite"
                )

    def begin(self) -> None:
        """Make ready for a run: the recipe written, leftovers of a run that cannot be resumed removed."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._failure.unlink(missing_ok=True)
        write_atomically(self.recipe, self.cell.recipe.to_yaml())
        if not self.is_unfinished and self.run.exists():
            shutil.rmtree(self.run)

    def saw_peak(self, peak_bytes: int) -> None:
        """Keep the most memory that any process of this cell had."""
        peak = _Peak(max(peak_bytes, self._peak_bytes() or 0))
        try:
            write_atomically(self._peak, json.dumps(asdict(peak)))
        except OSError as error:
            # A figure is lost; its runs, which may be told to save and stop just now, need not be.
            if no_space(error) is None:
                raise

    def settle(self, keep_weights: bool) -> bool:
        """Take the figures of a run that is whole; False where there is none."""
        if self._figures.is_file():
            return True
        if self.is_unfinished or not (self.run / "config.json").is_file():
            return False
        figures = read_figures(self.cell, self.run, self._peak_bytes())
        write_atomically(self._figures, json.dumps(asdict(figures), indent=1))
        if not keep_weights:
            for pattern in _WEIGHTS:
                for file in self.run.glob(pattern):
                    file.unlink()
        return True

    def fail(self, sentence: str) -> None:
        """Record why the run failed."""
        write_atomically(self._failure, json.dumps(asdict(_Failure(sentence))))

    def _peak_bytes(self) -> int | None:
        found = _read(self._peak, _Peak)
        return None if found is None else found.bytes


def open_cells(output: Path, study: StudyRecipe, cells: list[Cell], overwrite: bool) -> list[CellFolder]:
    """The cells' folders in the locked folder `output`; `overwrite` drops all cells of an earlier study.

    Raises `PadstError` where cells of the same place were run with other recipes.
    """
    folders = [CellFolder(output / CELLS / cell.name, cell) for cell in cells]
    if overwrite:
        shutil.rmtree(output / CELLS, ignore_errors=True)
    for folder in folders:
        folder.check()
    write_atomically(output / STUDY, study.to_yaml())
    return folders


@contextmanager
def locked(output: Path) -> Iterator[int]:
    """Hold the lock of the study in `output`, which is made where it is not there, and give its descriptor.

    Runs that inherit the descriptor hold the lock as well, so that a study whose own process was killed is not started
    again beside the runs that it left. Raises `PadstError` where it is held, and where `output` holds something else.
    """
    check_place(output)
    if not output.is_dir():
        make_folder(output, output)
    if {file.name for file in output.iterdir()} - {LOCK} and not (output / STUDY).is_file():
        raise PadstError(f"output '{output}' holds something other than a study; name another folder with --output")
    taken = (
        f"the study in '{output}' is at work in another process (or a run of it that was left alone still is); "
        "wait for it or stop it"
    )
    with holding(output, taken) as lock:
        yield lock


def _read(path: Path, form: type[Form]) -> Form | None:
    if not path.is_file():
        return None
    return read_stored(path, form, f"'{path}' is damaged", "remove it and start the study again")
