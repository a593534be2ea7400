"""Freed memory that stays with the process: a training step asks for the same again.

glibc hands large blocks back to the system as soon as they are freed, and the system clears every page that it gives
out anew: up to a fifth of a training step on a CPU goes there (BENCHMARKS.md, "A fine-tuning step"). It helps threads
that allocate from the main arena; others get blocks of this size from the system each time, and are as slow as before.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_NEVER: Final = -1
_TOP_PAD: Final = 16 << 20
_USUAL: Final = (
    (_M_MMAP_MAX, 65536),
    (_M_TOP_PAD, 128 << 10),
    (_M_MMAP_THRESHOLD, 32 << 20),
    (_M_TRIM_THRESHOLD, 64 << 20),
)
"""What glibc begins with, but for the thresholds: those where its own adjustment, which any setting ends, arrives."""


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """What is freed inside is kept for reuse, and handed back at the end; only on a CPU, and only where glibc is."""
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _TOP_PAD)):
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _USUAL:
            libc.mallopt(option, value)
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc and the process's allocator is its own; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    process = ctypes.CDLL(None)
    return process if hasattr(process, "gnu_get_libc_version") and hasattr(process, "mallopt") else None
