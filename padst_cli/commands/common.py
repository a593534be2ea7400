"""What all commands share: the common flags, and turning a `PadstError` into one sentence and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from padst_cli.console import Console
from padst_cli.errors import PadstError


class Device(StrEnum):
    """Where to compute; auto takes a GPU when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local Hugging Face folder, or padst folder.")]
DeviceFlag = Annotated[Device, typer.Option("--device", help="Where to compute; auto takes a GPU when there is one.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout, all else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no messages.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the checkpoint's.")]


@contextmanager
def running(json: bool, quiet: bool) -> Iterator[Console]:
    """Give a command its console; print a user's error as one sentence and leave with its exit code."""
    console = Console(json=json, quiet=quiet)
    try:
        yield console
    except PadstError as error:
        console.error(error)
        raise typer.Exit(error.exit_code) from None
