"""Corpora: what `--data` and `--eval-data` name, as documents or image files with a digest."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from padst_cli.errors import PadstError

if TYPE_CHECKING:
    from padst_cli.data.hub import HubImage

Split = Literal["train", "heldout"]
Modality = Literal["text", "image"]
LeaveOut = Callable[[Path], bool]

PYTHON_SOURCE = "python-source"
HUB_PREFIX = "hf:"
CHOICES = (
    "a text file, a folder, a glob, a .jsonl file with a 'text' field, a folder of images, "
    f"hf:ORG/NAME[@CONFIG][:SPLIT], or {PYTHON_SOURCE} (real text without a download)"
)

# Many Python installs leave the tests out, and installed packages are not the library's own: without them two installs
# of one Python version hold the same documents. Two packages are generated tables (character maps, help texts), not
# source.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_GENERATED = frozenset({"encodings", "pydoc_data"})
_BUILD = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class TextCorpus:
    """Documents in a fixed order; `digest` is the sha256 (hex) over them, `split` the part that was asked for."""

    name: str
    documents: tuple[str, ...]
    digest: str
    split: str

    @property
    def characters(self) -> int:
        """Characters of all documents together."""
        return sum(len(document) for document in self.documents)

    @property
    def words(self) -> int:
        """Words of all documents together, a word being a run without white space."""
        return sum(len(document.split()) for document in self.documents)


@dataclass(frozen=True)
class ImageCorpus:
    """Images in a fixed order, opened one at a time, with their class numbers (None where the data names no classes).

    `digest` is the sha256 (hex) over the names, sizes in bytes and labels of the files (of a hub data set: over its
    name, its split, its number of rows and its labels): image sets are too large to read twice.
    """

    name: str
    files: tuple[Path | HubImage, ...]
    labels: tuple[int, ...] | None
    digest: str
    split: str


def default_spec(task: str) -> str | None:
    """The data of a run that names none: WikiText-103 for causal language models, nothing for other tasks."""
    return "hf:Salesforce/wikitext@wikitext-103-raw-v1" if task == "causal-lm" else None


def nothing(folder: Path) -> bool:
    """Leave no folder out."""
    del folder
    return False


def load_corpus(
    spec: str,
    *,
    split: Split,
    modality: Modality,
    label2id: Mapping[str, int] | None = None,
    leave_out: LeaveOut = nothing,
) -> TextCorpus | ImageCorpus:
    """Read what `--data` or `--eval-data` names (`CHOICES` lists the forms).

    Two forms hold a train and a held-out part: `python-source` divides itself by content hash, and a hub data set
    without `:SPLIT` gives its `train` split, or `validation` and else `test` for the held-out part. Every other form is
    taken whole, whichever `split` is asked for: the same file given for training and for evaluation is the same text
    twice.

    `label2id` holds the model's classes: it turns class names of an image set into numbers, and bounds the numbers.
    `leave_out` says of a folder below the one that `spec` names that nothing in it is data. Raises `PadstError` for
    what is missing, empty, unreadable or of the wrong modality.
    """
    from padst_cli.data import hub, images, texts

    if not spec.strip():
        raise PadstError(f"the name of the data is empty; give --data {CHOICES}")
    if spec == PYTHON_SOURCE:
        if modality != "text":
            raise PadstError(f"{PYTHON_SOURCE} is text, and this model takes images; give --data a folder of images")
        return python_source(split)
    if spec.startswith(HUB_PREFIX):
        return hub.load(spec, split=split, modality=modality, label2id=label2id)
    if modality == "image":
        return images.load(spec, split=split, label2id=label2id, leave_out=leave_out)
    return texts.load(spec, split=split, leave_out=leave_out)


def place_of(spec: str) -> Path | None:
    """The file or folder that `spec` names, of a glob the folder that holds all it can match; None for other data."""
    if spec == PYTHON_SOURCE or spec.startswith(HUB_PREFIX):
        return None
    path = Path(spec)
    return path if path.exists() else Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))


def data_files(root: Path, files: Iterable[Path], leave_out: LeaveOut) -> list[Path]:
    """Those of `files` that lie in no folder below `root` that is to be left out, sorted."""
    is_left_out = cache(leave_out)
    return sorted(
        file
        for file in files
        if not any(is_left_out(root / folder) for folder in list(file.relative_to(root).parents)[:-1])
    )


def text_corpus(name: str, documents: Iterable[str], split: str) -> TextCorpus:
    """A corpus of the documents that hold more than white space; raises `PadstError` where none does."""
    kept = tuple(document for document in documents if document.strip())
    if not kept:
        raise PadstError(f"there is no text in '{name}'; give --data {CHOICES}")
    return TextCorpus(name, kept, text_digest(kept), split)


def text_digest(documents: Iterable[str]) -> str:
    """sha256 (hex) over the documents, each preceded by its length so that moving a boundary changes the digest."""
    state = hashlib.sha256()
    for document in documents:
        raw = document.encode("utf-8", errors="surrogatepass")
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return state.hexdigest()


def python_source(split: Split) -> TextCorpus:
    """The source of the running Python's standard library, one document a file, sorted by path.

    A file is held out where the first eight hex digits of its sha256 are a multiple of ten (about one in ten). Left out
    are test folders, installed packages, generated tables, build configuration (which differs between machines) and
    files that are not UTF-8. Raises `PadstError` where this Python carries no source.
    """
    documents = []
    for path in _library_files(Path(sysconfig.get_path("stdlib"))):
        raw = path.read_bytes()
        held_out = int(hashlib.sha256(raw).hexdigest()[:8], 16) % 10 == 0
        if held_out != (split == "heldout"):
            continue
        try:
            documents.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            continue
    if not documents:
        raise PadstError(f"this Python comes without the source of its standard library; give --data {CHOICES}")
    return text_corpus(PYTHON_SOURCE, documents, split)


def _library_files(root: Path) -> list[Path]:
    """The library's own `.py` files, sorted by their path under `root` in POSIX form."""
    found = []
    for folder, folders, files in os.walk(root):
        top = folder == str(root)
        # Pruned here rather than filtered later: installed packages can be a hundred times the library.
        folders[:] = [
            name
            for name in folders
            if name not in _NOT_LIBRARY and not (top and (name in _GENERATED or name.startswith(_BUILD)))
        ]
        found += [
            Path(folder, name) for name in files if name.endswith(".py") and not (top and name.startswith(_BUILD))
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
