"""Seconds that the GPU takes for a call, `seconds` without its launch and `launched` with it.

Without: the call is captured into a CUDA graph, which is replayed again and again between two events; before each
replay more memory than twice the L2 cache is written, so that weights are not in the cache. While that is going on the
CPU gets ahead, so no launch is waited for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

Timer = Callable[[Callable[[], object]], float]
"""Seconds of one call of a function that works on the GPU."""

LEAST, MOST = 5, 50
ENOUGH = 0.01
"""Seconds of calls that are timed, but at least and at most so many."""

_L2 = 64 << 20


def l2_bytes(device: torch.device) -> int:
    """Bytes of the L2 cache, 64 MiB where torch does not know it."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or _L2


def graph_of(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, which was called before on the capturing stream's side to make what is made once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def seconds(work: Callable[[], object]) -> float:
    """The median of several calls."""
    graph = graph_of(work)
    flush = torch.empty(
        2 * l2_bytes(torch.device("cuda", torch.cuda.current_device())), dtype=torch.int8, device="cuda"
    )
    first = statistics.median(_replays(graph, flush, 3))
    return statistics.median(_replays(graph, flush, max(LEAST, min(MOST, round(ENOUGH / max(first, 1e-7))))))


def _replays(graph: torch.cuda.CUDAGraph, flush: torch.Tensor, count: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def launched(work: Callable[[], object]) -> float:
    """The median of several runs of calls that follow on each other, as they come: the slower one of CPU and GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    work()
    first = event_seconds(work, device)
    count = max(1, min(MOST, round(ENOUGH / max(first, 1e-7))))
    return statistics.median(event_seconds(repeated(work, count), device) for _ in range(LEAST)) / count


def event_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that the GPU takes for what `work` launches, its waits for the CPU included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


def repeated(work: Callable[[], object], number: int) -> Callable[[], None]:
    """A function that does `work` so many times."""

    def run() -> None:
        for _ in range(number):
            work()

    return run
