"""`padst quickstart`: the whole job on a small checkpoint that comes with padst, offline."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from padst_cli.commands.common import Common, common_flags
from padst_cli.errors import Interrupted

if TYPE_CHECKING:
    from padst_cli.console import Console
    from padst_cli.quickstart import QuickstartResult


@common_flags("dtype")
def quickstart(
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")] = Path("padst-quickstart"),
    structure: Annotated[str | None, typer.Option("--structure", help="diag, nm or block.")] = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="Share of zeros in the sparsified layers.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier quickstart.")] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, float32 or bfloat16: what the training computes in.")
    ] = None,
    *,
    common: Common,
) -> None:
    """Sparsify, evaluate, export, reload, generate and benchmark a small GPT-2: minutes on two cores, no network."""
    with common.running() as console:
        from padst_cli import quickstart as quick

        changes = {
            "structure": structure,
            "sparsity": sparsity,
            "training.steps": steps,
            "seed": common.seed,
            "dtype": dtype,
        }
        try:
            with console.progress() as on_event:
                result = quick.quickstart(
                    output,
                    changes={key: value for key, value in changes.items() if value is not None},
                    overwrite=overwrite,
                    device=common.device.value,
                    on_event=on_event,
                )
        except (Interrupted, KeyboardInterrupt):
            flags = [word for word in sys.argv[1:] if word != "--overwrite"]
            again = shlex.join(["padst", *flags, "--overwrite"])
            raise Interrupted(f"interrupted; start it again with: {again}") from None
        console.result(result, render=lambda: _render(console, result))


def _render(console: Console, result: QuickstartResult) -> None:
    columns = ("", "perplexity", "MB on disk", "MB resident", "prefill tokens/s", "decode tokens/s")
    rows = [
        (
            row.name,
            f"{row.perplexity:.2f}",
            f"{row.disk_bytes / 1e6:.2f}",
            f"{row.resident_bytes / 1e6:.2f}",
            f"{row.prefill_per_s:.0f}",
            f"{row.decode_per_s:.0f}",
        )
        for row in result.rows
    ]
    console.table(f"{result.structure}, sparsity {result.sparsity:.3f}, {result.steps} steps", columns, rows)
    console.message(f"kernels: {', '.join(result.kernels)}; {result.hardware}")
    console.message(f"the packed model says: {result.generated!r}")
    console.message(f"report: {result.report}")
