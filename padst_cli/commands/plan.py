"""`padst plan MODEL`: what would be done, without touching a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from padst_cli.commands.common import Common, Model, common_flags
from padst_cli.commands.recipe_flags import build_recipe, recipe_flags

if TYPE_CHECKING:
    from padst_cli.console import Console
    from padst_cli.pipeline import PlanResult

RecipeFlag = Annotated[
    str | None, typer.Option("--recipe", help="Recipe file, or the name of one that comes with padst.")
]


@recipe_flags
@common_flags("dtype", "seed")
def plan(
    model: Model,
    recipe: RecipeFlag = None,
    *,
    common: Common,
    changes: dict[str, Any],
) -> None:
    """Show which layers become sparse, at what density, and what the run costs. Touches no weights."""
    with common.running() as console:
        from padst_cli import pipeline

        show_plan(console, pipeline.plan(model, build_recipe(model, recipe, changes)))


def show_plan(console: Console, result: PlanResult) -> None:
    """The plan as two tables and a line of totals."""
    console.result(result, render=lambda: _render(console, result))


def _fall(result: PlanResult) -> str:
    if result.start_density is None:
        return "no"
    return f"from {result.start_density:g}, along a cubic, within {result.narrowed_after} steps"


def _render(console: Console, result: PlanResult) -> None:
    columns = ("layer", "out x in", "structure", "parameters", "permutation", "sparsity", "packed kB", "note")
    rows = [
        (
            layer["name"],
            f"{layer['out_features']} x {layer['in_features']}",
            layer["structure"],
            ", ".join(f"{key} {value}" for key, value in layer["parameters"].items()),
            (" and ".join(layer["sides"]) or "-") + (" (shared)" if layer["shared_with"] else ""),
            f"{1 - layer['density']:.4f}",
            f"{layer['packed_bytes'] / 1000:.1f}",
            layer["note"] or "",
        )
        for layer in result.layers
    ]
    console.table(f"{len(rows)} layers become sparse", columns, rows)
    if result.skipped:
        console.table("left dense", ("weight", "reason"), [(skip["name"], skip["reason"]) for skip in result.skipped])
    console.table(
        "totals" if result.allocation not in ("owl", "error") else f"totals, until {result.allocation} has seen data",
        ("", ""),
        [
            ("sparsity requested / achieved", f"{result.sparsity_requested:.4f} / {result.sparsity_achieved:.4f}"),
            ("density of the whole model", f"{result.whole_model_density:.4f}"),
            ("dense / packed MB", f"{result.dense_bytes / 1e6:.2f} / {result.packed_bytes / 1e6:.2f}"),
            ("steps", str(result.steps)),
            ("density falls", _fall(result)),
            ("memory of weights and optimizer, about", f"{result.run_bytes / 1e9:.2f} GB"),
        ],
    )
