"""`padst push DIR REPO`: upload a padst folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from padst_cli.commands.common import Common, common_flags


@common_flags()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that padst wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, ORG/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    *,
    common: Common,
) -> None:
    """Verify DIR and upload it."""
    with common.running() as console:
        from padst_cli import hub

        url = hub.push(folder, repo, private=private)
        console.result({"folder": str(folder), "repo": repo, "url": url}, render=lambda: typer.echo(url))
