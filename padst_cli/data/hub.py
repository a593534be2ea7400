"""Corpora from the Hugging Face Hub, through `datasets`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from padst_cli.data.corpus import CHOICES, HUB_PREFIX, ImageCorpus, TextCorpus, text_corpus
from padst_cli.data.images import class_numbers
from padst_cli.errors import PadstError

# A running text that comes as lines is joined into documents of about this many characters: one for any usual held-out
# split, and pieces that a tokenizer takes in parallel for a large one.
_DOCUMENT_CHARACTERS = 1 << 24


@dataclass(frozen=True)
class HubName:
    """`hf:ORG/NAME[@CONFIG][:SPLIT]`, taken apart."""

    path: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, spec: str) -> HubName:
        """Take a spec apart; raises `PadstError` where it names no data set."""
        name, _, split = spec.removeprefix(HUB_PREFIX).partition(":")
        path, _, config = name.partition("@")
        if not path:
            raise PadstError(f"'{spec}' names no data set; the form is hf:ORG/NAME[@CONFIG][:SPLIT]")
        return cls(path, config or None, split or None)


@dataclass(frozen=True)
class HubImage:
    """One image of a hub data set: row `row` of column `column`, decoded when asked for."""

    dataset: Any = field(repr=False)
    column: str
    row: int

    def load(self) -> Any:
        """The decoded PIL image."""
        return self.dataset[self.row][self.column]

    def __str__(self) -> str:
        return f"row {self.row}, column '{self.column}'"


def load(spec: str, *, split: str, modality: str, label2id: Mapping[str, int] | None) -> TextCorpus | ImageCorpus:
    """Download (or take from the local cache) a data set's split and read it as text or as images.

    Raises `PadstError` where the hub cannot be reached, or the data set, its configuration, its split or a fitting
    column is missing.
    """
    name = HubName.parse(spec)
    part = name.split or _split_for(spec, name, split)
    dataset = _asked(spec, lambda datasets: datasets.load_dataset(name.path, name.config, split=part))
    if modality == "image":
        return _images(f"{spec}" if name.split else f"{spec}:{part}", dataset, split, label2id)
    column = _text_column(spec, dataset)
    return text_corpus(spec if name.split else f"{spec}:{part}", _documents(dataset[column]), split)


def _asked(spec: str, question: Any) -> Any:
    """The answer of `datasets` to a question, with everything that can go wrong on the way told in one sentence."""
    import datasets
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    # Each retry would be a warning of its own before the sentence below.
    logging.set_verbosity_error()
    try:
        return question(datasets)
    except datasets.exceptions.DatasetNotFoundError:
        raise PadstError(
            f"there is no data set '{spec}' on the Hub, or it is not open to you; give --data {CHOICES}"
        ) from None
    except ValueError as error:
        # An unknown configuration or split: the message lists what there is.
        raise PadstError(f"'{spec}': {_one_line(error)}") from None
    except (OSError, RuntimeError) as error:
        # Connection and offline errors are OSErrors, a closed HTTP client is a RuntimeError.
        raise PadstError(
            f"cannot load '{spec}' from the Hub ({type(error).__name__}: {_one_line(error)}); give --data {CHOICES}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _split_for(spec: str, name: HubName, split: str) -> str:
    present = _asked(spec, lambda datasets: datasets.get_dataset_split_names(name.path, name.config))
    wanted = ("train",) if split == "train" else ("validation", "test")
    for candidate in wanted:
        if candidate in present:
            return candidate
    raise PadstError(
        f"'{spec}' has no split {' or '.join(wanted)}, only {', '.join(present)}; "
        f"name one: {spec}:{next(iter(present), 'SPLIT')}"
    )


def _text_column(spec: str, dataset: Any) -> str:
    strings = [
        name
        for name, feature in dataset.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise PadstError(f"'{spec}' has no column 'text'; its columns are {', '.join(dataset.features)}")


def _documents(rows: Iterable[str]) -> Iterator[str]:
    """Rows as documents; or, where rows are the lines of one running text (as WikiText's are), that text joined again.

    Lines are told by their line ends and by empty rows in between; a set of documents has neither in its first rows.
    """
    iterator = iter(rows)
    head = [row for row, _ in zip(iterator, range(64), strict=False)]
    lines = any(not row for row in head) and all(row.endswith("\n") for row in head if row)
    everything = _chain(head, iterator)
    if not lines:
        yield from everything
        return
    pending: list[str] = []
    size = 0
    for row in everything:
        pending.append(row or "\n")
        size += len(pending[-1])
        if size >= _DOCUMENT_CHARACTERS and not row:
            yield "".join(pending)
            pending, size = [], 0
    yield "".join(pending)


def _chain(head: list[str], rest: Iterator[str]) -> Iterator[str]:
    yield from head
    yield from rest


def _images(spec: str, dataset: Any, split: str, label2id: Mapping[str, int] | None) -> ImageCorpus:
    import datasets

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        raise PadstError(
            f"'{spec}' has {len(columns)} image columns where one is needed; "
            f"its columns are {', '.join(dataset.features)}"
        )
    if not len(dataset):
        raise PadstError(f"there is no image in '{spec}'")
    labels = _labels(spec, dataset, label2id)
    state = hashlib.sha256(f"{spec}\0{len(dataset)}\n".encode())
    for label in labels or ():
        state.update(f"{label}\n".encode())
    files = tuple(HubImage(dataset, columns[0], row) for row in range(len(dataset)))
    return ImageCorpus(spec, files, labels, state.hexdigest(), split)


def _labels(spec: str, dataset: Any, label2id: Mapping[str, int] | None) -> tuple[int, ...] | None:
    import datasets

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    column = "label" if "label" in columns else next(iter(columns), None)
    if column is None:
        return None
    raw = [int(label) for label in dataset[column]]
    if min(raw) < 0:
        # The convention of hidden test labels.
        return None
    numbers = class_numbers(dataset.features[column].names, label2id, where=f"'{spec}'")
    return tuple(numbers[label] for label in raw)
