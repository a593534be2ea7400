"""The costs of this machine, measured once and kept in the user's cache folder.

There is one file for every processor, instruction set, number of threads, version of torch and build of the compiled
kernels. It is measured the first time a packed layer runs where there is none, which takes about four seconds and is
said in the log; a file that cannot be read is measured anew. Nothing happens at import.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
import threading
from pathlib import Path

import torch

from .. import cache
from ..cost import Costs
from . import library

_log = logging.getLogger("padst_kernels")

KIND = "costs"

_alone = threading.RLock()
"""Held while costs are looked up or measured: two measurements at once would slow each other."""


def costs(threads: int) -> Costs:
    """The costs with this many threads: known, or read from the cache folder, or measured now."""
    with _alone:
        return _known(threads)


@functools.cache
def _known(threads: int) -> Costs:
    found = cache.read(KIND, machine_key(threads), Costs.from_json)
    return measure(threads) if found is None else found


def measure(threads: int) -> Costs:
    """Measure the costs anew and keep them for the processes to come."""
    from . import calibrate  # which runs kernels, and they ask for costs

    _log.warning("measuring how fast this machine is with %d thread(s), once and for about four seconds", threads)
    found = calibrate.measure(threads)
    cache.write(KIND, machine_key(threads), found.to_json())
    return found


def recalibrate(threads: int) -> Costs:
    """Measure anew whatever is known; layers that have chosen a path already keep to it."""
    with _alone:
        found = measure(threads)
        _known.cache_clear()
    return found


def machine_key(threads: int) -> dict[str, str]:
    """What the costs depend on; costs measured under another key are not used."""
    return {
        "cpu": _cpu_name(),
        "isa": library.isa_name(),
        "threads": str(threads),
        "torch": torch.__version__,
        "kernels": _build(),
    }


def cache_file(key: dict[str, str]) -> Path:
    """The file of the costs under this key."""
    return cache.file_of(KIND, key)


@functools.cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = ("model name", "cpu model", "CPU part")
    found = [line.partition(":")[2].strip() for line in lines if line.startswith(names)]
    return f"{platform.machine()} {found[0] if found else platform.processor()}".strip()


@functools.cache
def _build() -> str:
    path = library.find()
    return "none" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]
