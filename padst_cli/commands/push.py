"""`padst push DIR REPO`: upload a padst folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from padst_cli.commands.common import Device, DeviceFlag, Dtype, Json, Quiet, Seed, running


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that padst wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, ORG/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    device: DeviceFlag = Device.auto,
    dtype: Dtype = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Verify DIR and upload it."""
    del device, dtype, seed  # nothing is computed; every command takes the flags
    with running(json, quiet) as console:
        from padst_cli import hub

        url = hub.push(folder, repo, private=private)
        console.result({"folder": str(folder), "repo": repo, "url": url}, render=lambda: typer.echo(url))
