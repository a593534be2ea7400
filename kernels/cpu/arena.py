"""Memory for images on huge pages: the weights of all layers behind one another, where one translation covers 2 MiB.

With few tokens a layer is a stream of weights from memory. Processors prefetch no further than a page and look a
page's address up at its first use, so that small pages cost a third of the read bandwidth (measured: 10.7 GB/s with
pages of 4 KiB, 13 to 15 with huge ones). Images are smaller than a huge page; so they share chunks of address space,
whose memory the system only provides as it is written to.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

ALIGN = 64
HUGE_PAGE = 2 << 20
CHUNK = 64 << 20

Interval = tuple[int, int]


@dataclass(eq=False)
class _Chunk:
    """One mapping; `free` are its free intervals in order, as offsets from `first`, the first huge page's start."""

    memory: mmap.mmap
    first: int
    size: int
    free: list[Interval] = field(default_factory=list)

    def take(self, size: int) -> Interval | None:
        """Cut `size` bytes off the first free interval that holds them."""
        for place, (start, end) in enumerate(self.free):
            if end - start >= size:
                self.free[place : place + 1] = [(start + size, end)] if end - start > size else []
                return start, start + size
        return None

    def give_back(self, interval: Interval) -> None:
        """Make an interval free again, give its whole pages back to the system, and merge what touches."""
        start, end = interval
        first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if last > first:
            self.memory.madvise(mmap.MADV_DONTNEED, self.first + first, last - first)
        merged: list[Interval] = []
        for one in sorted([*self.free, interval]):
            if merged and merged[-1][1] == one[0]:
                merged[-1] = (merged[-1][0], one[1])
            else:
                merged.append(one)
        self.free = merged

    @property
    def unused(self) -> bool:
        """Whether nothing lies in it."""
        return self.free == [(0, self.size)]


class Arena:
    """Hands out memory for images; what no tensor uses any more is handed out again, or goes back to the system."""

    def __init__(self) -> None:
        self._chunks: list[_Chunk] = []
        self._lock = threading.Lock()
        self._released: deque[tuple[_Chunk, Interval]] = deque()

    def take(self, size: int) -> Tensor:
        """A tensor of bytes `[size]`, aligned to `ALIGN`, that keeps its memory for as long as its storage lives."""
        room = -(-size // ALIGN) * ALIGN
        with self._lock:
            self._drain()
            for chunk in self._chunks:
                interval = chunk.take(room)
                if interval is not None:
                    break
            else:
                chunk = _new_chunk(max(CHUNK, room))
                self._chunks.append(chunk)
                interval = chunk.take(room)
                assert interval is not None
        start = chunk.first + interval[0]
        view = memoryview(chunk.memory)[start : start + size]
        # The storage holds the view, not the tensor: it may outlive the tensor that is returned here.
        weakref.finalize(view, self._release, chunk, interval).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)

    def _release(self, chunk: _Chunk, interval: Interval) -> None:
        # Called whenever a view dies, perhaps by the garbage collector in the midst of `take`, which then drains later.
        self._released.append((chunk, interval))
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def _drain(self) -> None:
        while self._released:
            chunk, interval = self._released.popleft()
            chunk.give_back(interval)
            if chunk.unused:
                self._chunks.remove(chunk)


def _new_chunk(size: int) -> _Chunk:
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    first = -address % HUGE_PAGE
    memory.madvise(mmap.MADV_HUGEPAGE, first, size)
    return _Chunk(memory, first, size, [(0, size)])


_ARENA = Arena() if hasattr(mmap, "MADV_HUGEPAGE") else None


def image_memory(size: int) -> Tensor:
    """Bytes `[size]` aligned to `ALIGN` for one image, contents undefined: on huge pages where the system has them."""
    if _ARENA is not None:
        return _ARENA.take(size)
    room = torch.empty(size + ALIGN, dtype=torch.uint8, device="cpu")
    shift = -room.data_ptr() % ALIGN
    return room[shift : shift + size]
