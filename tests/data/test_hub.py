"""Corpora from the hub, with `datasets` answering from memory."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from padst_cli.data import hub
from padst_cli.data.corpus import ImageCorpus, TextCorpus, load_corpus
from padst_cli.data.hub import HubName
from padst_cli.data.items import open_image
from padst_cli.errors import PadstError


class FakeHub:
    """Answers for one data set and notes what it was asked."""

    def __init__(self, splits: dict[str, datasets.Dataset]) -> None:
        self.splits = splits
        self.asked: list[tuple[Any, ...]] = []

    def load_dataset(self, path: str, name: str | None = None, *, split: str) -> datasets.Dataset:
        self.asked.append((path, name, split))
        if split not in self.splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(self.splits)}.')
        return self.splits[split]

    def get_dataset_split_names(self, path: str, config_name: str | None = None) -> list[str]:
        self.asked.append((path, config_name))
        return list(self.splits)


def answer(monkeypatch: pytest.MonkeyPatch, **splits: datasets.Dataset) -> FakeHub:
    fake = FakeHub(splits)
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", fake.get_dataset_split_names)
    return fake


def texts(*rows: str, column: str = "text") -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: list(rows)})


def load_text(spec: str, split: str = "train") -> TextCorpus:
    loaded = load_corpus(spec, split=split, modality="text")
    assert isinstance(loaded, TextCorpus)
    return loaded


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hf:org/name", HubName("org/name", None, None)),
        ("hf:org/name@conf-v1", HubName("org/name", "conf-v1", None)),
        ("hf:org/name:test", HubName("org/name", None, "test")),
        ("hf:name@conf:train[:1%]", HubName("name", "conf", "train[:1%]")),
    ],
)
def test_names_are_taken_apart(spec: str, expected: HubName) -> None:
    assert HubName.parse(spec) == expected


def test_a_spec_without_a_name_is_refused() -> None:
    with pytest.raises(PadstError, match="names no data set"):
        load_text("hf:@conf")


def test_the_split_follows_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = answer(monkeypatch, train=texts("t1", "t2"), validation=texts("v"), test=texts("x"))
    assert load_text("hf:org/name@c").documents == ("t1", "t2")
    heldout = load_text("hf:org/name@c", "heldout")
    assert (heldout.documents, heldout.name, heldout.split) == (("v",), "hf:org/name@c:validation", "heldout")
    assert load_text("hf:org/name@c:test", "train").documents == ("x",)
    assert fake.asked[1:] == [
        ("org/name", "c", "train"),
        ("org/name", "c"),
        ("org/name", "c", "validation"),
        ("org/name", "c", "test"),
    ]
    del fake.splits["validation"]
    assert load_text("hf:org/name", "heldout").documents == ("x",)
    del fake.splits["test"]
    with pytest.raises(PadstError, match="no split validation or test, only train; name one: hf:org/name:train"):
        load_text("hf:org/name", "heldout")


def test_lines_of_a_running_text_are_joined_and_documents_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, train=texts("", " = Title = \n", "", " A line . \n"), test=texts("one\n", "two"))
    assert load_text("hf:wiki").documents == ("\n = Title = \n\n A line . \n",)
    assert load_text("hf:wiki:test").documents == ("one\n", "two")


def test_a_long_running_text_is_cut_at_empty_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_DOCUMENT_CHARACTERS", 10)
    answer(monkeypatch, train=texts("", "123456789\n", "abcdef\n", "", "xyz\n", ""))
    documents = load_text("hf:wiki").documents
    assert documents == ("\n123456789\nabcdef\n\n", "xyz\n\n")


def test_the_text_column_is_found_or_the_columns_named(monkeypatch: pytest.MonkeyPatch) -> None:
    two = datasets.Dataset.from_dict({"question": ["q"], "answer": ["a"]})
    answer(monkeypatch, train=texts("only", column="content"), test=two)
    assert load_text("hf:org/name").documents == ("only",)
    with pytest.raises(PadstError, match="no column 'text'; its columns are question, answer"):
        load_text("hf:org/name:test")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectionError("Couldn't reach 'org/name' on the Hub"), r"cannot load .*\(ConnectionError: .*python-source"),
        (OSError("timed out\nafter a while"), "timed out after a while"),
        (RuntimeError("Cannot send a request, as the client has been closed."), "cannot load"),
        (datasets.exceptions.DatasetNotFoundError("gone"), "there is no data set .*python-source"),
        (ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']"), r"Available: \['a', 'b'\]"),
    ],
)
def test_what_the_hub_says_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    for spec in ("hf:org/name", "hf:org/name:train"):
        with pytest.raises(PadstError, match=says) as caught:
            load_text(spec)
        assert "\n" not in str(caught.value)


def pictures(labels: list[int], names: list[str]) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (6, 4, 3), dtype=np.uint8)) for _ in labels]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)


def load_images(spec: str, label2id: dict[str, int]) -> ImageCorpus:
    loaded = load_corpus(spec, split="train", modality="image", label2id=label2id)
    assert isinstance(loaded, ImageCorpus)
    return loaded


def test_images_are_decoded_one_by_one_and_labels_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, train=pictures([0, 1, 1], ["cat", "dog"]))
    loaded = load_images("hf:org/pets", {"bird": 0, "dog": 1, "cat": 2})
    assert loaded.labels == (2, 1, 1)
    assert open_image(loaded, 2).size == (4, 6)
    assert open_image(loaded, 0).tobytes() != open_image(loaded, 1).tobytes()
    with pytest.raises(PadstError, match="no class 'cat'"):
        load_images("hf:org/pets", {"bird": 0, "hound": 1, "fish": 2})


def test_hidden_labels_are_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, train=pictures([-1, -1], ["cat", "dog"]))
    assert load_images("hf:org/pets", {"cat": 0, "dog": 1}).labels is None


def test_text_is_no_image_data(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, train=texts("words"))
    with pytest.raises(PadstError, match="0 image columns where one is needed"):
        load_images("hf:org/name", {"cat": 0})
