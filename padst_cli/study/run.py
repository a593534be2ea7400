"""A whole study: the grid is run, then said in a page, a chart a model and one JSON file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from padst_cli.checkpoint.writer import write_atomically
from padst_cli.errors import full_disk_told
from padst_cli.events import OnEvent, ignore
from padst_cli.study.cells import expand
from padst_cli.study.chart import study_chart
from padst_cli.study.figures import CellFigures
from padst_cli.study.folder import CellFolder, locked, open_cells
from padst_cli.study.page import study_page
from padst_cli.study.recipe import StudyRecipe
from padst_cli.study.runner import Options, run_cells
from padst_cli.study.summary import Comparison, summarise

PAGE: Final = "STUDY.md"
FIGURES: Final = "study.json"


@dataclass(frozen=True)
class StudyResult:
    """What `padst study` reports, and the content of study.json.

    `cells` are the figures of all done cells, `comparisons` their means and differences by model and sparsity,
    `failures` sentences by cell, `unfinished` the names of cells still to run, `files` what was written beside them.
    """

    output: str
    study: dict[str, Any]
    cells: tuple[CellFigures, ...]
    comparisons: tuple[dict[str, Any], ...]
    failures: Mapping[str, str]
    unfinished: tuple[str, ...]
    files: tuple[str, ...]


def study(
    recipe: StudyRecipe,
    output: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    on_event: OnEvent = ignore,
    command: str | None = None,
) -> StudyResult:
    """Run every cell of the grid that is not done in `output`, and write STUDY.md, study.json and the charts there.

    A cell that fails is recorded and tried again by the next call. An interrupt (KeyboardInterrupt) goes to the caller
    once all running cells have saved their state and the page says what is done so far. Raises `PadstError` before the
    first run for a grid that cannot be, and for a folder that is in the way, in use, or of another study.
    """
    cells = expand(recipe)
    told = full_disk_told(output, "start the study again: it goes on where it was")
    with told, locked(output) as lock:
        folders = open_cells(output, recipe, cells, overwrite)
        said = command or shlex.join(["padst", "study", "--output", str(output)])
        try:
            run_cells(folders, Options(device, recipe.jobs, recipe.checkpoints, lock), on_event)
        except KeyboardInterrupt:
            write_study(recipe, folders, output, said)
            raise
        return write_study(recipe, folders, output, said)


def write_study(recipe: StudyRecipe, folders: Sequence[CellFolder], output: Path, command: str) -> StudyResult:
    """Say in `output` what its cells have found so far."""
    found = [(folder, folder.figures()) for folder in folders]
    done = tuple(figures for _, figures in found if figures is not None)
    failures = {
        folder.cell.name: sentence
        for folder, figures in found
        if figures is None and (sentence := folder.failure()) is not None
    }
    unfinished = tuple(
        folder.cell.name for folder, figures in found if figures is None and folder.cell.name not in failures
    )
    summaries = summarise(done)
    charts = {summary.model: f"{summary.model}.svg" for summary in summaries}
    for summary in summaries:
        write_atomically(output / charts[summary.model], study_chart(summary))
    page = study_page(recipe, done, summaries, failures, len(unfinished), charts, command)
    write_atomically(output / PAGE, page)
    result = StudyResult(
        output=str(output),
        study=recipe.model_dump(mode="json"),
        cells=done,
        comparisons=tuple(_comparison(each) for summary in summaries for each in summary.comparisons),
        failures=failures,
        unfinished=unfinished,
        files=(PAGE, FIGURES, *charts.values()),
    )
    write_atomically(output / FIGURES, json.dumps(asdict(result), indent=1))
    return result


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "model": comparison.model,
        "sparsity": comparison.sparsity,
        "control": comparison.control,
        "rows": [asdict(row) for row in comparison.rows()],
        "contrasts": [asdict(contrast) for contrast in comparison.contrasts()],
    }
