"""Text corpora from files: a file, a folder, a glob, or JSON lines."""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path

from padst_cli.data.corpus import CHOICES, LeaveOut, TextCorpus, data_files, nothing, place_of, text_corpus
from padst_cli.errors import PadstError

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def load(spec: str, *, split: str, leave_out: LeaveOut = nothing) -> TextCorpus:
    """Read a text file, every file of a folder (and its subfolders) or of a glob, in the order of their paths.

    A file is one document; of a `.jsonl` file every line's `text` is one, in which half a surrogate pair (JSON can
    escape one, tokenizers take none) becomes U+FFFD, as where text is decoded. In a folder or a glob hidden files and
    files that are not UTF-8 text are left out, and so are the folders below that `leave_out` names; a file that is
    named itself must be readable. Raises `PadstError` otherwise.
    """
    path = Path(spec)
    if path.is_file():
        return text_corpus(spec, _documents(path, required=True), split)
    if path.is_dir():
        if (path / "labels.csv").is_file():
            raise PadstError(f"'{spec}' is a folder of images (it holds labels.csv), and this model reads text")
        files = [file for file in path.rglob("*") if not _hidden(file.relative_to(path))]
    elif glob.has_magic(spec):
        files = [Path(match) for match in glob.glob(spec, recursive=True)]
    else:
        raise PadstError(f"there is no file or folder '{spec}'; give --data {CHOICES}")
    files = data_files(place_of(spec) or path, (file for file in files if file.is_file()), leave_out)
    if not files:
        raise PadstError(f"no file matches '{spec}'; give --data {CHOICES}")
    return text_corpus(spec, [document for file in files for document in _documents(file, required=False)], split)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _documents(path: Path, *, required: bool) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if required:
            raise PadstError(
                f"'{path}' is not UTF-8 text (byte {error.start}); convert it or name another file"
            ) from None
        return []
    except OSError as error:
        raise PadstError(f"cannot read '{path}': {error.strerror}") from None
    if path.suffix.lower() == ".jsonl":
        return _json_lines(path, text)
    return [text]


def _json_lines(path: Path, text: str) -> list[str]:
    documents = []
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped, and those do not end a line of JSON lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PadstError(
                f"'{path}' line {number} is not JSON ({error.msg}); every line must be one JSON object"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise PadstError(f"'{path}' line {number} has no 'text' field that holds a string")
        documents.append(_HALF_CHARACTER.sub("\ufffd", row["text"]))
    return documents
