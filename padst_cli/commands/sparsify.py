"""`padst sparsify MODEL`: the whole job, from a pretrained checkpoint to a sparse one."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from padst_cli.commands.common import Common, Model, common_flags
from padst_cli.commands.plan import RecipeFlag, show_plan
from padst_cli.commands.recipe_flags import build_recipe, recipe_flags
from padst_cli.errors import PadstError

if TYPE_CHECKING:
    from padst_cli.console import Console
    from padst_cli.pipeline import SparsifyResult


@recipe_flags
@common_flags("dtype", "seed")
def sparsify(
    model: Model,
    recipe: RecipeFlag = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write; default ./MODEL-STRUCTURE-SPARSITY.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder written by padst.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
    push_to_hub: Annotated[str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload the result.")] = None,
    *,
    common: Common,
    changes: dict[str, Any],
) -> None:
    """Make MODEL sparse: calibrate, find permutations and supports, refit, fine-tune (PA-DST), evaluate, save."""
    with common.running() as console:
        from padst_cli import pipeline
        from padst_cli.hub import check_repo, push

        if push_to_hub:
            check_repo(push_to_hub)
        chosen = build_recipe(model, recipe, changes)
        if dry_run:
            show_plan(console, pipeline.plan(model, chosen))
            return
        folder = output or pipeline.default_output(model, chosen)
        with console.progress() as on_event:
            result = pipeline.sparsify(
                model,
                chosen,
                folder,
                device=common.device.value,
                resume=resume,
                overwrite=overwrite,
                on_event=on_event,
                command=shlex.join(["padst", *sys.argv[1:]]),
            )
        if not pipeline.is_main_process():
            return
        if push_to_hub:
            try:
                console.message(f"uploaded to {push(folder, push_to_hub)}")
            except PadstError as error:
                again = shlex.join(["padst", "push", str(folder), push_to_hub])
                raise PadstError(f"the run is whole, but {error}; go on with: {again}") from None
        console.result(result, render=lambda: _render(console, result))


def _render(console: Console, result: SparsifyResult) -> None:
    metric = result.metric
    rows = [
        (f"{metric['name']}, dense", _figure(metric["dense"])),
        ("   dense, fine-tuned as long", _figure(metric["dense_finetuned"])),
        ("   sparse, before training", _figure(metric["initial"])),
        ("   sparse, final", _figure(metric["final"])),
        ("sparsity requested / achieved", f"{result.sparsity_requested:.4f} / {result.sparsity_achieved:.4f}"),
        ("layers sparsified", str(result.layers)),
        ("steps, seconds", f"{result.steps}, {result.seconds:.0f}"),
        ("permutations", _permutations(result.permutations)),
        ("written to", result.output),
    ]
    console.table(f"{result.structure} on {result.task}", ("", ""), rows)


def _permutations(counts: Mapping[str, int]) -> str:
    """How many were learned when, and how many entries moved; what did not happen is not mentioned."""
    before = counts["learned_before_training"]
    parts = [
        (before, "learned before training"),
        (counts["hardened_by_penalty"], "hardened by penalty"),
        (counts["hardened_at_deadline"] - before, "hardened at the deadline"),
        (counts["moved_from_start"], "entries moved from the assignment"),
        (counts["moved_in_training"], "of them in training"),
    ]
    return ", ".join(f"{value:,} {words}" for value, words in parts if value) or "none learned"


def _figure(value: float | None) -> str:
    return "not run" if value is None else f"{value:.4g}"
