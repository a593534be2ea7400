"""`padst inspect DIR`: what is in a padst folder, layer by layer, and whether it is sound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from padst_cli.commands.common import Common, common_flags

if TYPE_CHECKING:
    from padst_cli.runtime.describe import LayerDescription


@common_flags()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that padst wrote.")],
    *,
    common: Common,
) -> None:
    """List the sparse layers of DIR and verify every tensor. Exit code 2 when something is wrong."""
    with common.running() as console:
        from padst_cli import pipeline

        result = pipeline.inspect(folder, device=common.device.value)
        columns = ("layer", "out x in", "structure", "density", "kB", "permutation", "dead rows, columns", "kernel")
        rows = [
            (
                layer.name,
                f"{layer.out_features} x {layer.in_features}",
                " ".join([layer.structure, *(f"{key}={value}" for key, value in layer.parameters.items())]),
                f"{layer.density:.4f}",
                f"{layer.packed_bytes / 1000:.1f}",
                _sides(layer),
                f"{layer.dead_rows}, {layer.dead_columns}",
                " / ".join(dict.fromkeys(layer.kernels.values())),
            )
            for layer in result.layers
        ]
        title = f"{result.folder}: format {result.version}, {result.form}, values {result.value_dtype}, verified"
        console.result(result, render=lambda: console.table(title, columns, rows))


def _sides(layer: LayerDescription) -> str:
    """Which sides are permuted, and how many of their entries move."""
    sides = {"input": layer.perm_in, "output": layer.perm_out}
    moved = [f"{name}: {side.size - side.fixed_points} of {side.size} moved" for name, side in sides.items() if side]
    return ", ".join(moved) or "-"
