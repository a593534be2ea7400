"""Image corpora from folders, and how their labels become the model's class numbers."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from padst_cli.data.corpus import CHOICES, ImageCorpus, LeaveOut, data_files, nothing, place_of
from padst_cli.errors import PadstError, nearest

LABELS_FILE = "labels.csv"
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


def load(spec: str, *, split: str, label2id: Mapping[str, int] | None, leave_out: LeaveOut = nothing) -> ImageCorpus:
    """Read a folder of images with `labels.csv`, one with a folder for each class, or images without labels.

    `labels.csv` has the columns `file` (relative to the folder) and `label` (a class number, or a class name that
    `label2id` knows). Class folders are taken by name where `label2id` knows all of them, by number where all are
    numbers, else in alphabetical order, if the model has exactly as many classes. Folders that `leave_out` names hold
    no images, unless `labels.csv` says so. Raises `PadstError` for missing files and unknown labels.
    """
    root = Path(spec)
    if not root.is_dir():
        return _unlabelled(spec, _matching(spec, leave_out), split)
    if (root / LABELS_FILE).is_file():
        files, labels = _from_table(root, label2id)
        return _corpus(spec, root, files, labels, split)
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
    inside = {folder: data_files(root, _images_under(folder), leave_out) for folder in folders}
    classes = [folder for folder in folders if inside[folder]]
    loose = sorted(file for file in root.iterdir() if _is_image(file))
    if loose and classes:
        # Images beside class folders, or plain subfolders: no reading of that as labels is safe.
        raise PadstError(
            f"'{spec}' holds images both loose and in folders; use one folder a class, or add a {LABELS_FILE}"
        )
    if loose or not classes:
        return _unlabelled(spec, loose, split)
    numbers = class_numbers([folder.name for folder in classes], label2id, where=f"'{spec}'")
    files, labels = [], []
    for folder, number in zip(classes, numbers, strict=True):
        files += inside[folder]
        labels += [number] * len(inside[folder])
    return _corpus(spec, root, files, labels, split)


def class_numbers(names: Sequence[str], label2id: Mapping[str, int] | None, *, where: str) -> list[int]:
    """Numbers of a data set's classes, in the given order: by name, by number, or by position (see `load`).

    Raises `PadstError` where the names are not the model's and the model has another number of classes.
    """
    if label2id is None:
        return [int(name) for name in names] if all(name.isdecimal() for name in names) else list(range(len(names)))
    if all(name in label2id for name in names):
        return [label2id[name] for name in names]
    if all(name.isdecimal() for name in names):
        return [check_label(int(name), label2id, where) for name in names]
    if len(names) == len(label2id):
        return list(range(len(names)))
    unknown = next(name for name in names if name not in label2id)
    raise PadstError(
        f"{where}: the model knows no class '{unknown}'{nearest(unknown, list(label2id))}, and its {len(label2id)} "
        f"classes are not the {len(names)} of the data; give a {LABELS_FILE} with the model's class numbers"
    )


def check_label(label: int, label2id: Mapping[str, int] | None, where: str) -> int:
    """The label itself where the model has that class; raises `PadstError` where it has not."""
    if label < 0 or (label2id is not None and label > max(label2id.values())):
        allowed = "from 0 up" if label2id is None else f"0 to {max(label2id.values())}"
        raise PadstError(f"{where}: label {label} is out of range; the model's classes are numbered {allowed}")
    return label


def _from_table(root: Path, label2id: Mapping[str, int] | None) -> tuple[list[Path], list[int]]:
    table = root / LABELS_FILE
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PadstError(f"'{table}' is not UTF-8 text (byte {error.start}); convert it") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise PadstError(
            f"'{table}' is no table after line {reader.line_num} ({error}); is a quote left open?"
        ) from None
    if not {"file", "label"} <= set(reader.fieldnames or ()):
        raise PadstError(f"'{table}' needs the columns 'file' and 'label' in its first line")
    files, labels = [], []
    for line, row in rows:
        where = f"'{table}' line {line}"
        if not row["file"] or row["label"] is None:
            raise PadstError(f"{where} has no file or no label")
        files.append(_existing(root / row["file"], where))
        labels.append(_label(row["label"].strip(), label2id, where))
    return files, labels


def _existing(path: Path, where: str) -> Path:
    if not path.is_file():
        raise PadstError(f"{where}: there is no file '{path}'")
    return path


def _label(text: str, label2id: Mapping[str, int] | None, where: str) -> int:
    if label2id is not None and text in label2id:
        return label2id[text]
    if text.removeprefix("-").isdecimal():
        return check_label(int(text), label2id, where)
    if label2id is None:
        raise PadstError(f"{where}: '{text}' is not a class number, and the model names no classes")
    raise PadstError(f"{where}: the model knows no class '{text}'{nearest(text, list(label2id))}")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _images_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if _is_image(path)]


def _matching(spec: str, leave_out: LeaveOut) -> list[Path]:
    if not Path(spec).exists() and not glob.has_magic(spec):
        raise PadstError(f"there is no folder '{spec}'; give --data {CHOICES}")
    matches = [Path(spec)] if Path(spec).exists() else [Path(match) for match in glob.glob(spec, recursive=True)]
    return data_files(place_of(spec) or Path(), (path for path in matches if _is_image(path)), leave_out)


def _unlabelled(spec: str, files: list[Path], split: str) -> ImageCorpus:
    return _corpus(spec, Path(spec), files, None, split)


def _corpus(spec: str, root: Path, files: list[Path], labels: list[int] | None, split: str) -> ImageCorpus:
    if not files:
        raise PadstError(f"there is no image in '{spec}'; this model takes images ({', '.join(sorted(SUFFIXES))})")
    state = hashlib.sha256()
    for index, file in enumerate(files):
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        state.update(f"{name}\0{file.stat().st_size}\0{'' if labels is None else labels[index]}\n".encode())
    return ImageCorpus(spec, tuple(files), None if labels is None else tuple(labels), state.hexdigest(), split)
