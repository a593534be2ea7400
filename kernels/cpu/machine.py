"""The costs of this machine, measured once and kept in the user's cache folder.

`$XDG_CACHE_HOME/padst` (by default `~/.cache/padst`) has one file for every processor, instruction set, number of
threads, version of torch and build of the compiled kernels. It is measured the first time a packed layer runs where
there is none, which takes about four seconds and is said in the log; a file that cannot be read is measured anew.
Nothing happens at import.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
from pathlib import Path

import torch

from ..cost import Costs
from . import library

_log = logging.getLogger("padst_kernels")


@functools.cache
def costs(threads: int) -> Costs:
    """The costs with this many threads: known, or read from the cache folder, or measured now."""
    key = machine_key(threads)
    path = cache_file(key)
    found = _read(path, key)
    return measure(threads) if found is None else found


def measure(threads: int) -> Costs:
    """Measure the costs anew and keep them for the processes to come."""
    from . import calibrate  # which runs kernels, and they ask for costs

    key = machine_key(threads)
    path = cache_file(key)
    _log.warning("measuring how fast this machine is with %d thread(s), once and for about four seconds", threads)
    found = calibrate.measure(threads)
    _write(path, key, found)
    return found


def recalibrate(threads: int) -> Costs:
    """Measure anew whatever is known; layers that have chosen a path already keep to it."""
    found = measure(threads)
    costs.cache_clear()
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
    home = os.environ.get("XDG_CACHE_HOME")
    folder = Path(home) if home else Path.home() / ".cache"
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "padst" / f"costs-{digest}.json"


def _read(path: Path, key: dict[str, str]) -> Costs | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Costs.from_json(raw["costs"]) if raw["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s cannot be used (%s)", path, error)
        return None


def _write(path: Path, key: dict[str, str], found: Costs) -> None:
    # Through a file of its own: another process may read or write the same one now.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({"key": key, "costs": found.to_json()}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        _log.warning("the costs could not be kept in %s (%s): the next process will measure again", path, error)


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
