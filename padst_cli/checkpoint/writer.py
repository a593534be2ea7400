"""Writing folders and files so that nothing half-written is taken for whole: a temporary sibling, then a rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from padst_cli.checkpoint.reader import quiet_transformers
from padst_cli.errors import PadstError

LOCK: Final = ".padst.lock"
"""The file in an output folder whose lock says that a process is at work there (`padst_cli.checkpoint.lock`)."""

_PROCESSOR_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.codes",
    "*.tiktoken",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write into, and put it in place of `path` when the block ends without an
    error.

    What was at `path` before stays until the new folder is whole and on disk; where it is a link, what it leads to is
    replaced. Raises `PadstError` where something is at `path` that is not to be overwritten, or cannot be replaced.
    """
    path = path.resolve()
    _remove_leftovers(path)
    if not overwrite:
        check_vacant(path)
    temporary, old = _sibling(path, "writing"), _sibling(path, "replaced")
    make_folder(temporary, path)
    try:
        yield temporary
        _sync(temporary)
        if not overwrite:
            check_vacant(path)  # of what another process wrote meanwhile
        if path.exists():
            _set_aside(path, old)
        temporary.rename(path)
        _sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_place(output: Path) -> None:
    """Raise `PadstError` where `output` cannot be a folder: its name cannot be written down, or is that of a file."""
    try:
        str(output).encode()
    except UnicodeEncodeError:
        raise PadstError(f"output {str(output)!a} is not UTF-8 text; name another folder with --output") from None
    if output.exists() and not output.is_dir():
        raise PadstError(f"output '{output}' is a file; name a folder with --output")


def check_vacant(output: Path, hint: str = "") -> None:
    """Raise `PadstError` where something is in the folder `output`; `hint` is another way out, told first."""
    if not is_vacant(output):
        raise PadstError(f"output '{output}' exists; {hint}--overwrite replaces it, --output names another")


def is_vacant(folder: Path) -> bool:
    """Whether nothing is lost where `folder` is replaced: it is not there, or empty but for a lock."""
    return not folder.is_dir() or all(child.name == LOCK for child in folder.iterdir())


def make_folder(folder: Path, output: Path) -> None:
    """Make a new folder, and those above it, on the way to `output`; raises `PadstError` where the system refuses."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise PadstError(f"output '{output}' cannot be made ({error.strerror}); name another with --output") from None


def empty_folder(folder: Path, last: Sequence[str] = ()) -> None:
    """Remove all that is in a folder, the names `last` after the rest and in this order.

    The folder stays: it may be a link, a mount point or the current one. So does its lock, which may be held.
    """
    for child in sorted(folder.iterdir(), key=lambda child: last.index(child.name) if child.name in last else -1):
        if child.name == LOCK:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Write one file through a temporary sibling and a rename: whole once the block ends, or left as it was."""
    _remove_leftovers(path)
    temporary = _sibling(path, "writing")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write one file as `replaced` does; text as UTF-8."""
    with replaced(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def write_model(model: Any, folder: Path, *, max_shard_size: str = "5GB") -> None:
    """`save_pretrained` as safetensors into `folder`, shards of at most `max_shard_size`; the same model gives the
    same bytes.

    Raises `PadstError` for a size that cannot be read.
    """
    check_shard_size(max_shard_size)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    for file in folder.glob("*.safetensors"):
        # safetensors leaves its files readable by their owner only.
        file.chmod(0o644)


def check_shard_size(size: str) -> None:
    """Raise `PadstError` unless `size` reads like 5GB or 200MB."""
    number, unit = size[:-2], size[-2:].upper()
    if unit not in ("KB", "MB", "GB", "TB") or not number.strip().isdecimal() or int(number) < 1:
        raise PadstError(f"shard size '{size}' is not of the form 5GB or 200MB")


def copy_processor_files(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer and image-processor files byte for byte from one model folder to another; returns their names."""
    names = sorted({file.name for pattern in _PROCESSOR_FILES for file in source.glob(pattern) if file.is_file()})
    for name in names:
        # Files of the hub's cache are links: copy what they point to, with ordinary permissions.
        shutil.copyfile(source / name, folder / name)
    return names


def _set_aside(path: Path, old: Path) -> None:
    try:
        path.rename(old)
    except OSError as error:
        raise PadstError(
            f"output '{path}' cannot be replaced ({error.strerror}); name a folder inside it with --output"
        ) from None


def _sibling(path: Path, purpose: str) -> Path:
    return path.with_name(f".{path.name}.{purpose}-{os.getpid()}")


def _remove_leftovers(path: Path) -> None:
    # Left by a process that was killed while it wrote; one that still runs keeps its own.
    for purpose in ("writing", "replaced"):
        for leftover in path.parent.glob(f".{path.name}.{purpose}-*"):
            owner = leftover.name.rpartition("-")[2]
            if not owner.isdigit() or _is_running(int(owner)):
                continue
            if purpose == "replaced" and not path.exists():
                leftover.rename(path)
            elif leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        else:
            _sync_folder(file)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
