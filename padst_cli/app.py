"""The Typer application: names the commands, knows nothing of what they do."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from padst_cli.commands.bench import bench
from padst_cli.commands.common import CommandGroup
from padst_cli.commands.evaluate import evaluate
from padst_cli.commands.export import export
from padst_cli.commands.generate import generate
from padst_cli.commands.inspect import inspect
from padst_cli.commands.plan import plan
from padst_cli.commands.push import push
from padst_cli.commands.quickstart import quickstart
from padst_cli.commands.sparsify import sparsify
from padst_cli.commands.study import study

app = typer.Typer(
    name="padst",
    cls=CommandGroup,
    help="Make a pretrained Hugging Face model structurally sparse: faster, at the least loss of accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(quickstart)
app.command()(plan)
app.command()(sparsify)
app.command("eval")(evaluate)
app.command()(study)
app.command()(export)
app.command()(bench)
app.command()(generate)
app.command()(inspect)
app.command()(push)


def _version(wanted: bool) -> None:
    if wanted:
        from padst_cli import __version__

        typer.echo(f"padst {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a pretrained Hugging Face model structurally sparse (PA-DST)."""
    del version  # handled by its eager callback


def main() -> None:
    """Entry point of the `padst` command."""
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun or after it has ended
        sys.exit(130)
