"""Files of what was measured here, in the user's cache folder: `$XDG_CACHE_HOME/padst`, by default `~/.cache/padst`.

A file belongs to a key, which names all that its figures depend on; figures under another key are not used. Files are
replaced as a whole, so that processes may read and write them at the same time; one that is damaged counts as missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

_log = logging.getLogger("padst_kernels")

Found = TypeVar("Found")
Key = Mapping[str, str]


def file_of(kind: str, key: Key) -> Path:
    """The file of figures of this kind under this key; raises FileNotFoundError where the user has no home folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(home) if home else Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError("the user has no home folder; XDG_CACHE_HOME may name another") from error
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "padst" / f"{kind}-{digest}.json"


def read(kind: str, key: Key, parse: Callable[[Any], Found]) -> Found | None:
    """What is kept, through `parse`; None where there is nothing, and, said in the log, where it cannot be used.

    `parse` raises KeyError, TypeError, ValueError or AttributeError for what it cannot take.
    """
    try:
        path = file_of(kind, key)
        raw = json.loads(path.read_text(encoding="utf-8"))
        return parse(raw[kind]) if raw["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        _log.warning("%s cannot be used (%s)", path, error)
        return None


@contextmanager
def changing(kind: str, key: Key) -> Iterator[None]:
    """Read and write in the block: others that change the same file wait, and none's figures are lost.

    Where the file system has no locks, or no place for one, nobody waits.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            path = file_of(kind, key).with_suffix(".lock")
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.open("ab")), fcntl.LOCK_EX)
        yield


def write(kind: str, key: Key, figures: Any) -> None:
    """Keep `figures`, which are JSON values; where that fails the log says it and all goes on."""
    # Through a file of its own: another process may read or write the same one now.
    try:
        path = file_of(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as failed:
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                failed.callback(Path(file.name).unlink)
                json.dump({"key": key, kind: figures}, file, indent=1)
            os.replace(file.name, path)
            failed.pop_all()
    except OSError as error:
        _log.warning("the %s could not be kept (%s): the next process will measure again", kind, error)
