"""Running cells: each a `padst sparsify` in a process of its own, several at once, resumed where it was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from padst_cli.events import CellFinished, Message, OnEvent, PhaseStarted
from padst_cli.study.folder import CellFolder

_LOOK_EVERY: Final = 0.1
"""Seconds between two looks at the running processes."""
_STOP_WITHIN: Final = 120.0
"""Seconds that a run has to save its state before it is killed."""
# ru_maxrss counts kilobytes, on macOS bytes.
_RSS_UNIT: Final = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Options:
    """How the runs are started: on which device, how many at once, and what becomes of their weights."""

    device: str
    jobs: int
    keep_weights: bool
    lock: int


def run_cells(folders: Sequence[CellFolder], options: Options, on_event: OnEvent) -> None:
    """Run all cells that are not done; a failure is recorded in its folder and stops nothing else.

    An interrupt stops the runs, each after it has saved its state, and goes on to the caller.
    """
    waiting = [folder for folder in folders if not folder.settle(options.keep_weights)]
    done = len(folders) - len(waiting)
    on_event(PhaseStarted("study", len(folders)))
    if done:
        on_event(Message(f"{done} of {len(folders)} cells are done already"))
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                running.append(_Running(waiting.pop(0), options))
            time.sleep(_LOOK_EVERY)
            for run in [run for run in running if run.has_ended()]:
                running.remove(run)
                done += 1
                sentence = run.settle()
                on_event(Message(sentence))
                on_event(CellFinished(run.folder.cell.name, done, len(folders)))
    finally:
        _stop(running)


def _stop(running: Sequence[_Running]) -> None:
    """Ask all runs to save and stop, then see to it that none is left."""
    for run in running:
        # Not SIGINT, which a study that was started in the background of a shell ignores, and its runs with it.
        run.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP_WITHIN
    while any(not run.has_ended() for run in running):
        if time.monotonic() > deadline:
            for run in running:
                run.process.kill()
        time.sleep(_LOOK_EVERY)
    for run in running:
        run.folder.settle(run.options.keep_weights)


class _Running:
    """One cell at work."""

    def __init__(self, folder: CellFolder, options: Options) -> None:
        self.folder, self.options = folder, options
        resume = folder.is_unfinished
        folder.begin()
        self.began = time.monotonic()
        with folder.out.open("wb") as out, folder.log.open("ab") as log:
            # A session of its own: an interrupt from the terminal is passed on once, and not to processes that are
            # about to end.
            self.process = subprocess.Popen(
                command(folder, options.device, resume),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=_environment(options.jobs),
                pass_fds=(options.lock,),
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        """Whether the process is gone; keeps its memory and exit code when it goes."""
        if self.process.returncode is not None:
            return True
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.folder.saw_peak(usage.ru_maxrss * _RSS_UNIT)
        return True

    def settle(self) -> str:
        """Take the figures, or record the failure; one line that says how it went."""
        name, seconds = self.folder.cell.name, time.monotonic() - self.began
        if self.folder.settle(self.options.keep_weights):
            figures = self.folder.figures()
            assert figures is not None
            kl = "" if figures.kl_to_dense is None else f", KL {figures.kl_to_dense:.4g}"
            return f"{name}: {figures.metric} {figures.final:.4g}{kl} ({seconds:.0f} s)"
        sentence = _why(self.folder, self.process.returncode)
        self.folder.fail(sentence)
        return f"{name} failed: {sentence}"


def command(folder: CellFolder, device: str, resume: bool) -> list[str]:
    """The command line of a cell."""
    model = folder.cell.recipe.model
    assert model is not None
    paths = ["--recipe", str(folder.recipe), "--output", str(folder.run)]
    flags = ["--device", device, "--json", *(["--resume"] if resume else [])]
    return [sys.executable, "-m", "padst_cli", "sparsify", model, *paths, *flags]


def _environment(jobs: int) -> dict[str, str]:
    """The environment of a run: its share of the cores, unless the user has said how many."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _why(folder: CellFolder, code: int) -> str:
    """The sentence that a run ended with; the last line of its log where it said none."""
    if code < 0:
        return f"killed by signal {-code}"
    said = _last(folder.out)
    if said is not None:
        return said
    lines = folder.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1].strip() if lines else 'nothing was said'}"


def _last(out: Path) -> str | None:
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    return found.get("error") if isinstance(found, dict) else None
