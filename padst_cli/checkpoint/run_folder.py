"""The folder of one `sparsify` run: what it holds while unfinished, and how it becomes whole.

While the run goes on there is a `state/` folder and no `config.json`, so nothing can load the folder by mistake. At the
end the checkpoint is built beside it, its files are moved in one by one with `config.json` last, and `state/` is
removed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from padst_cli.checkpoint.stored import read_stored
from padst_cli.checkpoint.writer import empty_folder, make_folder, write_atomically
from padst_cli.errors import PadstError
from padst_cli.events import Event

STATE = "state"
PROGRESS = "progress.json"
RECIPE = "recipe.yaml"
LOG = "log.jsonl"
REPORT = "report.html"
RESULTS = "results.json"
_TRAINING_EVENTS = ("Step", "SupportUpdated", "Hardened", "Saved", "Evaluated")


@dataclass(frozen=True)
class RunMetric:
    """The metric of a run in its results: the dense model, the one fine-tuned as long, the start and the end."""

    name: str
    dense: float
    initial: float
    final: float
    dense_finetuned: float | None = None


class RunFolder:
    """Files of one run under `path`; `main` is False on the processes that must not write."""

    def __init__(self, path: Path, main: bool = True) -> None:
        self.path = path
        self.main = main

    @property
    def state(self) -> Path:
        """Where resumable state lives while the run is unfinished."""
        return self.path / STATE

    @property
    def is_unfinished(self) -> bool:
        """Whether a run that can be resumed lies here."""
        return (self.state / PROGRESS).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether a run that is whole lies here."""
        return not self.is_unfinished and (self.path / RESULTS).is_file()

    def begin(self, recipe_yaml: str) -> None:
        """Empty the folder and write the recipe and a first progress file."""
        if not self.main:
            return
        if self.path.is_dir():
            # From here on what was whole must not look so, wherever a kill leaves it; but it looks padst's own.
            for whole in (self.path / "config.json", self.state / PROGRESS):
                whole.unlink(missing_ok=True)
            empty_folder(self.path, last=(RESULTS, LOG, RECIPE))
        make_folder(self.state, self.path)
        try:
            write_atomically(self.path / RECIPE, recipe_yaml)
            self.save_progress({})
        except BaseException:
            # Half of this looks like nobody's, and would be in the way of the next attempt.
            shutil.rmtree(self.state, ignore_errors=True)
            (self.path / RECIPE).unlink(missing_ok=True)
            raise

    def check_resumable(self) -> None:
        """Raise `PadstError` unless an unfinished run lies here."""
        if self.is_unfinished:
            return
        if self.is_finished:
            raise PadstError(f"the run in '{self.path}' is finished: nothing to resume")
        raise PadstError(f"there is no unfinished run in '{self.path}' to resume")

    def load_progress(self, form: Any = dict[str, Any]) -> Any:
        """What earlier sessions of this run found, as a `form` of `read_stored`.

        Raises `PadstError` where the file is damaged.
        """
        path = self.state / PROGRESS
        return read_stored(path, form, f"'{path}' is damaged", "this run cannot go on: start it anew with --overwrite")

    def save_progress(self, progress: dict[str, Any]) -> None:
        """Replace the progress file atomically."""
        if self.main:
            write_atomically(self.state / PROGRESS, json.dumps(progress, indent=1))

    def log(self, event: Event) -> None:
        """Append one event to `log.jsonl`."""
        if self.main:
            with (self.path / LOG).open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(event.to_json()) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All logged events; a last line cut off by a kill is left out.

        Raises `PadstError` for a line that is no event.
        """
        path = self.path / LOG
        if not path.is_file():
            return []
        events = []
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(event, dict) or "event" not in event:
                raise PadstError(f"line {number} of '{path}' is not an event; remove it and go on as before")
            events.append(event)
        return events

    def mend_log(self) -> None:
        """Forget a last line cut off by a kill: what is logged next would be glued to it."""
        if self.main:
            self._write_log(self.events())

    def rewind_log(self, step: int, control: bool) -> None:
        """Forget training events after `step` of the phase that resumes (they will happen again).

        The control begins when training is done, so what it logged stays when that phase, finished, is taken up again.
        """
        if not self.main:
            return
        kept: list[dict[str, Any]] = []
        in_control = False
        for event in self.events():
            if event["event"] == "PhaseStarted" and event.get("phase") == "dense control":
                in_control = True
            if in_control == control and event["event"] in _TRAINING_EVENTS and event["step"] > step:
                continue
            kept.append(event)
        self._write_log(kept)

    def _write_log(self, events: list[dict[str, Any]]) -> None:
        write_atomically(self.path / LOG, "".join(json.dumps(event) + "\n" for event in events))

    def finish(self, checkpoint: Path, results: dict[str, Any]) -> None:
        """Move a finished checkpoint's files in, `config.json` last, then drop the state."""
        if not self.main:
            return
        write_atomically(self.path / RESULTS, json.dumps(results, indent=1))
        files = sorted(checkpoint.iterdir(), key=lambda file: (file.name == "config.json", file.name))
        for file in files:
            file.replace(self.path / file.name)
        checkpoint.rmdir()
        # First what makes a run unfinished: the rest of the state is of no use without it.
        (self.state / PROGRESS).unlink()
        self.drop_state()

    def drop_state(self) -> None:
        """Remove the state of a finished run, or what a stop has left of it."""
        if self.main and self.state.is_dir():
            shutil.rmtree(self.state)
