"""Timing on a GPU: CUDA events around replays of CUDA graphs, the weights of a layer rotated within one graph.

Launching a kernel takes the CPU longer than the GPU takes to read a small layer, so a function is captured into a graph
once, with all its turns, and the graph is what is timed, on both sides. Where one side cannot be captured both are
timed as they are, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from padst_kernels.gpu.timing import event_seconds, graph_of, l2_bytes, repeated

from padst_cli.stopwatch import Pair, Stopwatch, Timing, turns_of

_L2_TIMES = 3
"""Weights are rotated through so many times the L2 cache."""


def stopwatch_for(timing: Timing, threads: int, device: torch.device, graphs: bool) -> Stopwatch:
    """What times on this device; `graphs` counts on a GPU alone."""
    if device.type != "cuda":
        return Stopwatch(timing, threads, device)
    rotated = max(timing.rotate_bytes, _L2_TIMES * l2_bytes(device))
    return CudaStopwatch(replace(timing, rotate_bytes=rotated), threads, device, graphs)


class CudaStopwatch(Stopwatch):
    """The stopwatch of a GPU; `notes` are what a reader of its figures must know."""

    def __init__(self, timing: Timing, threads: int, device: torch.device, graphs: bool = True) -> None:
        super().__init__(timing, threads, device)
        self.graphs = graphs
        self.notes: list[str] = []

    def calls(self, dense: Callable[[], Any], sparse: Callable[[], Any]) -> Pair:
        """Seconds a call, with as many calls to a run as `run_seconds` hold."""
        once = self.replays("a call", [dense, sparse])
        return self.alternate(
            *(self._run_of(run, turns_of(step)) for run, step in zip(once, (dense, sparse), strict=True))
        )

    def uncaptured(self, dense: Callable[[], Any], sparse: Callable[[], Any]) -> Pair:
        """As `calls`, without CUDA graphs."""
        return self.alternate(self._run_of(dense, 1), self._run_of(sparse, 1))

    def replays(self, what: str, works: Sequence[Callable[[], Any]]) -> list[Callable[[], None]]:
        """Each work with all its turns as the replay of a CUDA graph, or each as it is."""
        whole = [repeated(work, turns_of(work)) for work in works]
        if self.graphs:
            try:
                return [graph_of(work).replay for work in whole]
            except RuntimeError as error:
                torch.cuda.synchronize(self.device)
                self.note(f"{what} was timed without CUDA graphs on both sides: {str(error).splitlines()[0]}")
        for work in whole:
            work()
        return whole

    def note(self, text: str) -> None:
        """Something that a reader must know, said once."""
        if text not in self.notes:
            self.notes.append(text)

    def once(self, work: Callable[[], Any]) -> float:
        """Seconds between the events before and after one call; what the device did before is waited for."""
        return event_seconds(work, self.device)

    def _run_of(self, once: Callable[[], None], turns: int) -> Callable[[], float]:
        once()
        number = max(1, round(self.timing.run_seconds / max(self.once(once), 1e-7)))

        def run() -> float:
            return self.once(repeated(once, number)) / (number * turns)

        return run
