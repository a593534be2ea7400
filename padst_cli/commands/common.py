"""What all commands share: the common flags, and turning a `PadstError` into one sentence and an exit code."""

from __future__ import annotations

import errno
import inspect
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from padst_cli.console import Console
from padst_cli.errors import Interrupted, PadstError, no_space
from padst_cli.runtime.environment import check_environment

Command = Callable[..., Any]

_REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
    }
)
"""What the system answers where a path cannot be read or written, whatever padst does."""


class Device(StrEnum):
    """Where to compute; auto takes a GPU when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local Hugging Face folder, or padst folder.")]

# Name -> (type with its flag, default), in the order in which `--help` lists them.
_FLAGS: Mapping[str, tuple[Any, Any]] = {
    "device": (
        Annotated[Device, typer.Option("--device", help="Where to compute; auto takes a GPU when there is one.")],
        Device.auto,
    ),
    "dtype": (
        Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the checkpoint's.")],
        None,
    ),
    "seed": (Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything random.")], 0),
    "json": (
        Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout, all else on stderr.")],
        False,
    ),
    "quiet": (Annotated[bool, typer.Option("--quiet", help="No progress and no messages.")], False),
}


@dataclass(frozen=True)
class Common:
    """The values of the flags that every command takes; a command without use for one leaves it alone."""

    device: Device = Device.auto
    dtype: str | None = None
    seed: int = 0
    json: bool = False
    quiet: bool = False

    @contextmanager
    def running(self) -> Iterator[Console]:
        """Give a command its console; print a user's error as one sentence and leave with its exit code.

        A stop by SIGINT or SIGTERM and a disk or folder that refuses to be written are such errors as well. `quiet`
        holds back what the kernels log, too.
        """
        console = Console(json=self.json, quiet=self.quiet)
        try:
            with _sigterm_as_interrupt(), _kernels_heard(not self.quiet):
                check_environment()
                yield console
        except PadstError as error:
            found = error
        except KeyboardInterrupt:
            found = Interrupted("interrupted; nothing is left half-written")
        except Exception as error:
            told = _refusal(error)
            if told is None:
                raise
            found = told
        else:
            return
        console.error(found)
        raise typer.Exit(found.exit_code) from None


def _refusal(error: Exception) -> PadstError | None:
    """What to tell of an error that the system made, whatever padst does; None of any other."""
    full = no_space(error)
    if full is not None:  # of a write, which names no file
        return PadstError(f"{full}; free some, then start the command again")
    if isinstance(error, OSError) and error.errno in _REFUSED and error.filename is not None:
        return PadstError(f"'{error.filename}' cannot be used: {error.strerror}; name another with its flag")
    return None


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, stop the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _kernels_heard(heard: bool) -> Iterator[None]:
    """Keep what the kernels log, when they measure for example, off the terminal unless it is to be `heard`."""
    log = logging.getLogger("padst_kernels")
    before = log.level
    if not heard:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def comma_separated(text: str | None, kind: Callable[[str], Any], flag: str) -> list[Any] | None:
    """The parts of a flag's value, each as a `kind`; None where the flag is not given.

    Raises `PadstError` for a part that is no number where `kind` makes one.
    """
    if text is None:
        return None
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise PadstError(f"{flag} '{text}' is not a list of numbers with commas between") from None


# Typer has no public name for the error of a wrong command line, only for this kind of it.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class CommandGroup(TyperGroup):
    """The commands; under `--json` a command line that is wrong is told as every error is: one object on stdout."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that `ctx` names."""
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            if not as_json:
                raise
            Console(json=True).error(PadstError(" ".join(error.format_message().split())))  # type: ignore[attr-defined]
            raise typer.Exit(PadstError.exit_code) from None


def common_flags(*without: str) -> Callable[[Command], Command]:
    """A decorator that adds the common flags to a command, which receives them as the keyword `common`.

    `without` names those that the command defines itself.
    """
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in _FLAGS.items()
        if name not in without
    ]
    return lambda command: with_parameters(command, "common", parameters, lambda values: Common(**values))


def with_parameters(
    command: Command, keyword: str, parameters: Sequence[inspect.Parameter], gather: Callable[[dict[str, Any]], Any]
) -> Command:
    """`command` with `parameters` where it had `keyword`, which receives what `gather` makes of their values.

    Typer reads the flags of a command from its signature, so the signature is what changes.
    """

    @wraps(command)
    def extended(**given: Any) -> Any:
        values = {parameter.name: given.pop(parameter.name) for parameter in parameters}
        return command(**given, **{keyword: gather(values)})

    own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != keyword]
    everything = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *parameters)]
    extended.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
    extended.__annotations__ = {each.name: each.annotation for each in everything}
    del extended.__wrapped__  # or Typer reads the signature of the inner function
    return extended
