"""`padst export DIR`: a packed checkpoint for fast inference, or an ordinary dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from padst_cli.commands.common import Common, common_flags


@common_flags("dtype")
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `padst sparsify` wrote.")],
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")],
    form: Annotated[str, typer.Option("--format", help="packed, or dense (loads without padst).")] = "packed",
    value_dtype: Annotated[
        str | None,
        typer.Option("--value-dtype", help="float32, bfloat16 or float16 for packed values; default: float32."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest file, for example 5GB.")] = "5GB",
    data: Annotated[str | None, typer.Option("--data", help="Real input for the check; default: the run's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder written by padst.")] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="dtype of what is not packed; default: the model's.")
    ] = None,
    *,
    common: Common,
) -> None:
    """Write the sparse model in DIR for others to load, and check it against DIR on real input."""
    with common.running() as console:
        from padst_cli import pipeline

        with console.progress() as on_event:
            result = pipeline.export(
                folder,
                output,
                form=form,
                value_dtype=value_dtype,
                dtype=dtype,
                max_shard_size=max_shard_size,
                data=data,
                overwrite=overwrite,
                device=common.device.value,
                on_event=on_event,
            )
        console.result(
            result,
            render=lambda: console.table(
                f"{result.format} checkpoint in {result.output}",
                ("", ""),
                [
                    ("files", ", ".join(result.files)),
                    ("dense / packed MB", f"{result.dense_bytes / 1e6:.2f} / {result.packed_bytes / 1e6:.2f}"),
                    ("largest logit error", f"{result.max_abs_logit_error:.2e} on {result.checked_on}"),
                    ("kernels", ", ".join(result.kernels) or "-"),
                ],
            ),
        )
