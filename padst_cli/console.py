"""The one output sink of the command line: results on stdout, everything that is said on the way on stderr.

rich is imported where it draws, so that `padst --help` does not pay for it here.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from padst_cli.errors import PadstError, no_space
from padst_cli.events import (
    CalibrationProgress,
    CellFinished,
    Evaluated,
    Event,
    Message,
    OnEvent,
    PhaseStarted,
    Saved,
    Step,
    SupportUpdated,
    ignore,
)

if TYPE_CHECKING:
    import rich.console
    import rich.progress

_UNCUT = 240
"""Columns of a table that goes into a pipe or a file: wide enough that no layer name is cut."""
_PLAIN_EVERY = 10.0
"""Seconds between progress lines where stderr is no terminal."""


@contextmanager
def _full_stdout_told() -> Iterator[None]:
    """Raise `PadstError` where stdout goes to a file on a full disk; nothing more is written there."""
    try:
        yield
    except OSError as error:
        said = no_space(error)
        if said is None:
            raise
        # What is left in the buffer would fail again, at the latest when Python ends.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise PadstError(f"the result cannot be printed: {said}; free some, or send stdout elsewhere") from None


class Console:
    """What a command prints through: `json` puts exactly one object on stdout, `quiet` drops progress and messages.

    Of several processes of one command (`torchrun`) the first alone prints on stdout. What the encoding of a stream
    cannot write is replaced there, and escaped in JSON.
    """

    def __init__(self, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self._leads = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")

    def result(self, value: object, render: Callable[[], None] | None = None) -> None:
        """Print the result of the command: as JSON, or by calling `render`, or as a table of its fields.

        `value` is a mapping, a dataclass, or anything with `to_json`. NaN and infinities become null in JSON.
        """
        fields = to_json(value)
        if not self._leads:
            return
        with _full_stdout_told():
            if self.json:
                self._write(json.dumps(fields, indent=2, allow_nan=False, ensure_ascii=not _holds_all(sys.stdout)))
            elif render is not None:
                render()
            else:
                self.table("", ("", ""), [(key.replace("_", " "), _plain(entry)) for key, entry in fields.items()])
            sys.stdout.flush()

    def message(self, text: str) -> None:
        """Say something on stderr that the user should read once."""
        if not self.quiet:
            self._stderr().print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def error(self, error: PadstError) -> None:
        """Print a user's error as one sentence on stderr (`quiet` does not hold it back), with `json` on stdout too."""
        from rich.text import Text

        if self.json and self._leads:
            self._write(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        sentence = Text.assemble(("error: ", "bold red"), str(error))
        self._stderr().print(sentence, highlight=False, emoji=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table on stdout (with `json` on stderr); columns that hold only numbers are set flush right."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD,
            show_header=any(columns),
            header_style="bold",
            pad_edge=False,
        )
        for index, column in enumerate(columns):
            cells = [row[index] for row in rows if index < len(row)]
            right = bool(cells) and all(_is_number(cell) for cell in cells)
            table.add_column(Text(column), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        if (self.json and self.quiet) or not self._leads:
            return
        console = self._stderr() if self.json else self._stdout()
        if title:  # over the table and not in it, where rich would fold it to the table's width
            console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(table)

    @contextmanager
    def progress(self) -> Iterator[OnEvent]:
        """Give an event callback that shows what long work is doing, for as long as the context is open.

        A terminal gets one live line a phase (loss, metric, permutations hardened, time left), anything else a plain
        line now and then.
        """
        if self.quiet:
            yield ignore
            return
        console = self._stderr()
        if not console.is_terminal:
            yield PlainProgress(self.message)
            return
        with _columns(console) as display:
            live = LiveProgress(display)
            yield live
            live.close()

    def _write(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def _stdout(self) -> rich.console.Console:
        return _rich(sys.stdout.isatty(), stderr=False)

    def _stderr(self) -> rich.console.Console:
        return _rich(sys.stderr.isatty(), stderr=True)


def _holds_all(stream: Any) -> bool:
    """Whether every character can be written to the stream."""
    try:
        return codecs.lookup(stream.encoding or "ascii").name.startswith("utf")
    except (AttributeError, LookupError):
        return False


def to_json(value: object) -> dict[str, Any]:
    """A dataclass, a mapping or an object with `to_json` as strict JSON values: NaN and infinities become None.

    Raises TypeError for anything that has no JSON form.
    """
    converted = _jsonable(value)
    if not isinstance(converted, dict):
        raise TypeError(f"a result is a JSON object, not a {type(value).__name__}")
    return converted


def _jsonable(value: object) -> Any:
    if hasattr(value, "to_json"):
        return _jsonable(value.to_json())
    if is_dataclass(value) and not isinstance(value, type):
        return _jsonable(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"a {type(value).__name__} has no JSON form")


class LiveProgress:
    """An event callback that keeps one line a phase in a rich progress display."""

    def __init__(self, display: rich.progress.Progress) -> None:
        self.display = display
        self.figures = Figures()
        self.task: rich.progress.TaskID | None = None
        self.phase = ""

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Message):
            self.display.console.print(event.text, markup=False, highlight=False, soft_wrap=True)
        elif isinstance(event, PhaseStarted):
            self._begin(event.phase, event.total)
        else:
            phase, done, total = self.figures.take(event)
            if phase and phase != self.phase:
                # A resumed run goes on in the middle of a phase whose start was told to an earlier process.
                self._begin(phase, total)
                self.figures.take(event)
            if self.task is not None:
                self.display.update(self.task, completed=done, figures=self.figures.text)

    def close(self) -> None:
        """Mark the running phase as done."""
        if self.task is not None:
            task = next(task for task in self.display.tasks if task.id == self.task)
            total = task.total or max(task.completed, 1)
            self.display.update(self.task, total=total, completed=total)

    def _begin(self, phase: str, total: int | None) -> None:
        self.close()
        self.phase = phase
        self.figures.begin()
        self.task = self.display.add_task(phase, total=total, figures="")


class PlainProgress:
    """An event callback for logs and pipes: a line when a phase begins, for a held-out figure, every ten seconds."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.say = say
        self.clock = clock
        self.figures = Figures()
        self.phase = ""
        self.told = -math.inf
        self.first: tuple[float, int] | None = None

    def __call__(self, event: Event) -> None:
        """Show one event, or keep it to itself."""
        if isinstance(event, Message):
            self.say(event.text)
        elif isinstance(event, PhaseStarted):
            self._begin(event.phase)
            self.say(event.phase)
        elif isinstance(event, Evaluated):
            self.say(f"{event.metric} {event.value:.4g} ({event.phase.replace('_', ' ')}, step {event.step})")
            self.figures.take(event)
        else:
            phase, done, total = self.figures.take(event)
            if phase and phase != self.phase:
                self._begin(phase)
                self.figures.take(event)
            if done is not None and total is not None:
                self._work(done, total)

    def _begin(self, phase: str) -> None:
        self.phase = phase
        self.figures.begin()
        self.first = None
        self.told = -math.inf

    def _work(self, done: int, total: int) -> None:
        now = self.clock()
        if self.first is None:
            self.first = (now, done)
        if done < total and now - self.told < _PLAIN_EVERY:
            return
        self.told = now
        began, at = self.first
        left = f"  {_duration((now - began) / (done - at) * (total - done))} left" if at < done < total else ""
        self.say(f"{self.phase} {done}/{total}  {self.figures.text}{left}")


class Figures:
    """The figures of the running phase, gathered from its events: the short text beside the bar."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    @property
    def text(self) -> str:
        """For example `loss 3.412  perplexity 21.3  5/16 hardened`."""
        return "  ".join(self._shown.values())

    def begin(self) -> None:
        """Forget the figures of the phase before."""
        self._shown.clear()

    def take(self, event: Event) -> tuple[str, int | None, int | None]:
        """Take an event in; gives the phase it belongs to ("" if any), the units done and the total, if it says so."""
        shown = self._shown
        if isinstance(event, Step):
            shown["loss"] = f"loss {event.loss:.3f}"
            # Where nothing is left to learn from the first step on, the count would say nothing.
            if event.hardened < event.layers or "hardened" in shown:
                shown["hardened"] = f"{event.hardened}/{event.layers} hardened"
            return "dense control" if event.control else "train", event.step, event.steps
        if isinstance(event, CalibrationProgress):
            shown["error"] = f"error {event.error_mask:.3f} -> {event.error:.3f} after refit"
            return "calibrate", event.done, event.total
        if isinstance(event, CellFinished):
            return "study", event.done, event.total
        if isinstance(event, Evaluated):
            shown["metric"] = f"{event.metric} {event.value:.4g}"
        elif isinstance(event, SupportUpdated):
            shown["moved"] = f"{sum(event.moved.values())} weights moved"
        elif isinstance(event, Saved):
            shown["saved"] = f"saved at {event.step}"
        return "", None, None


def _columns(console: rich.console.Console) -> rich.progress.Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        refresh_per_second=4,
    )


def _rich(terminal: bool, stderr: bool) -> rich.console.Console:
    import rich.console

    return rich.console.Console(stderr=stderr, width=None if terminal else _UNCUT)


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("x%").replace(",", "") or "0")
    except ValueError:
        return cell == "-"
    return True


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
