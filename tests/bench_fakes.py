"""A GPU's stopwatch without the GPU: graphs that call again, events that are the CPU's clock."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from padst_cli.bench import cuda
from padst_cli.bench.cuda import CudaStopwatch
from padst_cli.stopwatch import Timing

CPU = torch.device("cpu")
QUICK = Timing(repeats=2, run_seconds=1e-4, rotate_bytes=2**16, max_copies=4)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often each captured graph was replayed."""
    replays: list[int] = []

    def graph_of(work):
        number = len(replays)
        replays.append(0)
        work()

        def replay():
            replays[number] += 1
            work()

        return SimpleNamespace(replay=replay)

    def event_seconds(work, device):
        del device
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    monkeypatch.setattr(cuda, "graph_of", graph_of)
    monkeypatch.setattr(cuda, "event_seconds", event_seconds)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return replays


def cuda_stopwatch(graphs: bool = True) -> CudaStopwatch:
    return CudaStopwatch(QUICK, 1, CPU, graphs)
