"""`padst study RECIPE`: many runs against each other, and what they show."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from padst_cli.commands.common import Common, comma_separated, common_flags
from padst_cli.errors import Interrupted, PadstError

if TYPE_CHECKING:
    from padst_cli.console import Console
    from padst_cli.study import Cell, StudyResult


@common_flags("dtype", "seed")
def study(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="Study recipe file, or the name of one that comes with padst."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write; default ./RECIPE or ./study.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="In place of the recipe's models: this one ('embedded' for padst's own)."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="With --model: training data.")] = None,
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="With --model: held-out data.")] = None,
    structures: Annotated[str | None, typer.Option("--structures", help="diag, nm, block; comma separated.")] = None,
    sparsities: Annotated[str | None, typer.Option("--sparsities", help="For example 0.8,0.9.")] = None,
    permutations: Annotated[
        str | None,
        typer.Option("--permutations", help="none, random, assignment, learned, soft, frozen; comma separated."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Of the recipe's extra methods these, comma separated; or none.")
    ] = None,
    controls: Annotated[
        str | None, typer.Option("--controls", help="Unstructured: rigl, set; comma separated.")
    ] = None,
    one_shot: Annotated[
        str | None, typer.Option("--one-shot", help="Never trained: start, magnitude, wanda, sparsegpt; or none.")
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="For example 0,1,2.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="This one seed, as --seeds SEED.", min=0)] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, float32 or bfloat16: what every run's training computes in.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps of every run.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", help="Runs that go on at once.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop the cells of an earlier study there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the cells.")] = False,
    *,
    common: Common,
) -> None:
    """Run a grid of models, structures, sparsities, permutations and seeds; started again it goes on where it was."""
    with common.running() as console:
        from padst_cli.study import expand, load_study
        from padst_cli.study import study as run_study

        changes = {
            "models": _model(model, data, eval_data),
            "structures": comma_separated(structures, str, "--structures"),
            "sparsities": comma_separated(sparsities, float, "--sparsities"),
            "permutations": comma_separated(permutations, str, "--permutations"),
            "controls": comma_separated(controls, str, "--controls"),
            "one_shot": comma_separated("" if one_shot == "none" else one_shot, str, "--one-shot"),
            "seeds": comma_separated(seeds if seed is None else str(seed), int, "--seeds"),
            "steps": steps,
            "jobs": jobs,
        }
        if recipe is None and model is None:
            raise PadstError("a study needs a recipe (study-small comes with padst) or a --model")
        if seed is not None and seeds is not None:
            raise PadstError("--seed and --seeds say the same; give one of them")
        stated = {key: value for key, value in changes.items() if value is not None}
        chosen = load_study(recipe, stated, dtype, comma_separated(methods, str, "--methods"))
        if dry_run:
            _show_cells(console, expand(chosen))
            return
        folder = output or Path(Path(recipe).stem if recipe else "study")
        command = _command(sys.argv[1:], to=True)
        try:
            with console.progress() as on_event:
                result = run_study(
                    chosen,
                    folder,
                    device=common.device.value,
                    overwrite=overwrite,
                    on_event=on_event,
                    command=_command(sys.argv[1:], to=False),
                )
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted, the runs have saved their state; go on with: {command}") from None
        console.result(result, render=lambda: _render(console, result))
        if result.failures:
            console.message(f"{len(result.failures)} cells failed; the same command tries them again")
            raise typer.Exit(1)


def _command(words: Sequence[str], to: bool) -> str:
    """The command as it was given, without --overwrite; unless `to`, without the folder: it is where its page lies."""
    kept = [word for word in words if word != "--overwrite"]
    if not to:
        kept = [
            word
            for before, word in zip(["", *kept], kept, strict=False)
            if "--output" not in (before, word) and not word.startswith("--output=")
        ]
    return shlex.join(["padst", *kept])


def _model(model: str | None, data: str | None, eval_data: str | None) -> list[Mapping[str, Any]] | None:
    """The one model that the flags name, as the recipe would."""
    if model is None:
        if data is not None or eval_data is not None:
            raise PadstError("--data and --eval-data belong to --model; name the model, or write them into the recipe")
        return None
    return [{"model": model, "data": data, "eval_data": eval_data}]


def _show_cells(console: Console, cells: list[Cell]) -> None:
    found = {"cells": [cell.name for cell in cells], "count": len(cells)}

    def render() -> None:
        rows = [(each.model, each.structure, each.method, f"{each.sparsity:g}", str(each.seed)) for each in cells]
        console.table(f"{len(cells)} cells", ("model", "structure", "method", "sparsity", "seed"), rows)

    console.result(found, render=render)


def _render(console: Console, result: StudyResult) -> None:
    for comparison in result.comparisons:
        rows = [
            (
                row["structure"],
                row["method"],
                _figure(row["kl"]),
                _figure(row["score"]),
                ", ".join(map(str, row["moved"])),
            )
            for row in comparison["rows"]
        ]
        columns = ("structure", "method", "KL to dense", "log perplexity or metric", "entries moved")
        console.table(f"{comparison['model']}, sparsity {comparison['sparsity']:g}", columns, rows)
        _render_costs(console, comparison)
    for name, sentence in result.failures.items():
        console.message(f"{name} failed: {sentence}")
    console.message(f"{len(result.cells)} cells done; written to {result.output}: {', '.join(result.files)}")


def _render_costs(console: Console, comparison: Mapping[str, Any]) -> None:
    """What each learner of the permutation costs over the fixed one, a run and its soft phase apart."""
    fixed = {row["structure"]: row for row in comparison["rows"] if row["method"] == "assignment"}
    learners = [row for row in comparison["rows"] if row["moved"] and row["structure"] in fixed]
    rows = [
        (
            row["structure"],
            row["method"],
            _ratio(row["step_seconds"], fixed[row["structure"]]["step_seconds"]),
            _ratio(row["soft_step_seconds"], fixed[row["structure"]]["step_seconds"]),
            _extra(row["peak_bytes"], fixed[row["structure"]]["peak_bytes"]),
        )
        for row in learners
    ]
    if rows:
        columns = ("structure", "learner", "a step, over the run", "a step while soft", "peak memory")
        console.table("cost of learning, against the fixed assignment", columns, rows)


def _ratio(own: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> str:
    return "-" if own is None or base is None or not base["mean"] else f"x {own['mean'] / base['mean']:.2f}"


def _extra(own: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> str:
    if own is None or base is None:
        return "-"
    return f"{(own['mean'] - base['mean']) / 1e6:+.0f} MB ({_ratio(own, base)})"


def _figure(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    spread = f" ± {found['high'] - found['mean']:.2g}" if found["high"] is not None else ""
    return f"{found['mean']:.4g}{spread}"
