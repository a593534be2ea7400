"""The state a run resumes from: one file, replaced as a whole, and the signals that ask for it.

A state is written under a temporary name, flushed to the disk and renamed over the last one, so that a kill at any
moment leaves either the previous state or the new one. It holds tensors and plain values only and is read with
`weights_only=True`.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from padst_cli.document import dotted
from padst_cli.errors import PadstError
from padst_cli.recipe import Recipe

STATE_VERSION = 4
# What may differ between the run that saved a state and the one that resumes it: it decides what is shown, not what is
# learned.
_COSMETIC = frozenset(
    {"training.log_every", "training.eval_every", "training.save_every", "eval_data", "eval_samples", "dense_control"}
)


@dataclass(frozen=True)
class StateStore:
    """Where a run keeps its state: `folder/name.pt` (and `name.pt.partial` while one is being written)."""

    folder: Path
    name: str = "state"

    @property
    def path(self) -> Path:
        """The file of the last whole state."""
        return self.folder / f"{self.name}.pt"

    def exists(self) -> bool:
        """Whether there is a state to resume from."""
        return self.path.is_file()

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write a state and make it the last one; raises `PadstError` where the disk refuses (the last one stays)."""
        partial = self.path.with_suffix(".pt.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
            _sync_folder(self.folder)
        except (OSError, RuntimeError) as error:
            # torch's zip writer reports a full disk as a RuntimeError.
            partial.unlink(missing_ok=True)
            raise PadstError(
                f"the state of the run could not be written to '{self.path}' ({error}); free some space and resume"
            ) from error
        return self.path

    def load(self) -> dict[str, Any]:
        """The last state, on the CPU; raises `PadstError` where there is none or it is damaged."""
        if not self.exists():
            raise PadstError(f"there is no state to resume from at '{self.path}'; start the run without --resume")
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise PadstError(
                f"the state '{self.path}' cannot be read ({error}); remove it and start the run again"
            ) from error
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise PadstError(f"the state '{self.path}' was written by another version of padst; start the run again")
        return state

    def step(self) -> int:
        """How many steps the last state has behind it; raises `PadstError` as `load` does."""
        return int(self.load()["step"])

    def clear(self) -> None:
        """Remove the state once the run is finished and its result is whole elsewhere."""
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".pt.partial").unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk too; Windows cannot open folders and does without.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_same_run(state: Mapping[str, Any], recipe: Recipe, processes: int, items: int) -> None:
    """Raise `PadstError` where a state comes from another recipe, data set size or number of processes."""
    saved, wanted = dotted(state["recipe"]), dotted(recipe.model_dump(mode="json"))
    different = sorted(
        key for key in saved.keys() | wanted.keys() if key not in _COSMETIC and saved.get(key) != wanted.get(key)
    )
    if different:
        key = different[0]
        raise PadstError(
            f"the state was saved with {key} = {saved.get(key)} and this run has {wanted.get(key)}; "
            "resume with the settings it was started with"
        )
    if state["processes"] != processes or state["items"] != items:
        raise PadstError(
            f"the state was saved by {state['processes']} processes over {state['items']} training items and this "
            f"run has {processes} over {items}; resume with the same"
        )


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process, as tensors and plain values."""
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(algorithm), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put every random generator of this process back to a `random_state`."""
    torch.set_rng_state(state["torch"])
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass
class StopRequest:
    """Whether a signal asked the run to stop after the step in progress."""

    requested: bool = False
    previous: dict[int, Any] = field(default_factory=dict)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the request; the same signal again does what it did before: a second Ctrl-C ends the program."""
        del frame
        self.requested = True
        signal.signal(number, self.previous[number])


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request for as long as the block runs (outside the main thread: never one)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        request.previous[number] = signal.signal(number, request.handle)
    try:
        yield request
    finally:
        for stopper, before in request.previous.items():
            signal.signal(stopper, before)
