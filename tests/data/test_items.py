"""Windows, images and the order of items."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor

from padst_cli.data.corpus import ImageCorpus, TextCorpus, load_corpus, text_corpus
from padst_cli.data.items import (
    ImageItems,
    TokenWindows,
    collate,
    open_image,
    step_indices,
    token_frame,
    token_stream,
)
from padst_cli.errors import PadstError

from .conftest import byte_tokenizer, draw


def corpus_of(*documents: str) -> TextCorpus:
    return text_corpus("made", documents, "train")


def test_documents_are_joined_by_the_separator_and_nothing_else() -> None:
    tokenizer = byte_tokenizer()
    stream = token_stream(corpus_of("ab", "c", "é"), tokenizer)
    assert stream.dtype == torch.int64
    assert tokenizer.decode(stream.tolist()) == "ab[END]c[END]é"
    assert token_stream(corpus_of("ab"), tokenizer).numel() == 2


def test_without_a_separator_documents_follow_each_other() -> None:
    assert token_stream(corpus_of("ab", "c"), byte_tokenizer(separator=False)).numel() == 3


def test_many_documents_are_tokenised_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("padst_cli.data.items._DOCUMENTS_PER_CALL", 3)
    stream = token_stream(corpus_of(*"abcdefgh"), byte_tokenizer())
    assert byte_tokenizer().decode(stream.tolist()) == "[END]".join("abcdefgh")


def test_a_text_longer_than_the_context_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        token_stream(corpus_of("much longer than eight bytes"), byte_tokenizer())
    assert not caplog.records


@pytest.mark.parametrize(("vocabulary", "framed"), [(50, False), (2, True)])
def test_tokens_outside_the_vocabulary_are_refused(vocabulary: int, framed: bool) -> None:
    tokenizer = byte_tokenizer(framed=framed)
    highest = max(tokenizer("az")["input_ids"])
    with pytest.raises(PadstError, match=f"gives 'made' the token {highest}, .* ends at {vocabulary - 1}"):
        TokenWindows.from_corpus(corpus_of("az"), tokenizer, 4, vocabulary)
    assert token_stream(corpus_of("az"), tokenizer, highest + 1).numel() == 2


def test_the_frame_is_what_the_tokenizer_adds() -> None:
    assert token_frame(byte_tokenizer()) == ([], [])
    assert token_frame(byte_tokenizer(framed=True)) == ([1], [2])


@pytest.mark.parametrize("framed", [False, True])
def test_windows_cover_the_stream_in_order(framed: bool) -> None:
    tokenizer = byte_tokenizer(framed=framed)
    windows = TokenWindows.from_corpus(corpus_of("abcdefghijklmnopq"), tokenizer, 6)
    items = [windows[index]["input_ids"] for index in range(len(windows))]
    assert {tuple(item.shape) for item in items} == {(6,)}
    chunks = ["abcd", "efgh", "ijkl", "mnop"] if framed else ["abcdef", "ghijkl"]
    expected = [f"[CLS]{chunk}[SEP]" if framed else chunk for chunk in chunks]
    assert [tokenizer.decode(item.tolist()) for item in items] == expected
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_a_text_shorter_than_a_window_is_refused() -> None:
    windows = TokenWindows.from_corpus(corpus_of("abcd"), byte_tokenizer(), 4)
    assert len(windows) == 1
    with pytest.raises(PadstError, match="'made' is too short: 4 tokens, and one window takes 5"):
        TokenWindows.from_corpus(corpus_of("abcd"), byte_tokenizer(), 5)
    with pytest.raises(PadstError, match="leaves nothing to predict"):
        TokenWindows.from_corpus(corpus_of("abcd"), byte_tokenizer(framed=True), 2)


def processor(tmp_path: Path, size: int) -> Any:
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    return AutoImageProcessor.from_pretrained(tmp_path)


def images(tmp_path: Path) -> ImageCorpus:
    draw(tmp_path / "images" / "0.png", 0, size=(40, 30))
    draw(tmp_path / "images" / "1.png", 1, size=(20, 50), mode="L")
    (tmp_path / "labels.csv").write_text("file,label\nimages/1.png,3\nimages/0.png,1\n")
    loaded = load_corpus(str(tmp_path), split="train", modality="image")
    assert isinstance(loaded, ImageCorpus)
    return loaded


def test_images_become_pixel_values_and_labels(tmp_path: Path) -> None:
    corpus = images(tmp_path)
    assert open_image(corpus, 0).mode == "RGB"
    assert open_image(corpus, 0).size == (20, 50)
    items = ImageItems(corpus, processor(tmp_path, 16))
    batch = collate([items[index] for index in range(len(items))])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [3, 1]
    assert batch["labels"].dtype == torch.int64
    grey = batch["pixel_values"][0]
    assert torch.equal(grey[0], grey[1])
    assert not torch.equal(batch["pixel_values"][1][0], batch["pixel_values"][1][1])


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    corpus = images(tmp_path)
    (tmp_path / "images" / "1.png").write_bytes(b"not an image")
    with pytest.raises(PadstError, match=r"1\.png' of .* is not a readable image"):
        open_image(corpus, 0)
    whole = (tmp_path / "images" / "0.png").read_bytes()
    (tmp_path / "images" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PadstError, match=r"0\.png"):
        open_image(corpus, 1)


def test_an_image_of_suspicious_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = images(tmp_path)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PadstError, match=r"1\.png' of .* is not a readable image"):
        open_image(corpus, 0)


def test_items_without_labels_have_none(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    loaded = load_corpus(str(tmp_path), split="train", modality="image")
    assert isinstance(loaded, ImageCorpus)
    assert set(ImageItems(loaded, processor(tmp_path, 16))[0]) == {"pixel_values"}


SIZES = [(1, 1), (5, 2), (7, 3), (7, 7), (8, 7), (13, 7), (15, 8), (16, 8), (40, 16), (97, 8)]


@pytest.mark.parametrize(("count", "batch"), SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_epoch_covers_every_item_once(count: int, batch: int, seed: int) -> None:
    steps = -(-6 * count // batch)
    stream = list(itertools.chain.from_iterable(step_indices(count, batch, seed, step) for step in range(steps)))
    for epoch in range(6):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


@pytest.mark.parametrize(("count", "batch"), SIZES)
def test_no_item_comes_twice_in_a_batch(count: int, batch: int) -> None:
    for step in range(200):
        assert len(set(step_indices(count, batch, 3, step))) == batch


def test_a_batch_larger_than_the_data_repeats_evenly() -> None:
    for step in range(10):
        times = Counter(step_indices(3, 8, 0, step)).values()
        assert max(times) - min(times) <= 2
        assert sum(times) == 8


@pytest.mark.parametrize(("count", "batch"), SIZES)
def test_a_step_does_not_depend_on_what_was_asked_before(count: int, batch: int) -> None:
    forward = [step_indices(count, batch, 5, step) for step in range(60)]
    backward = [step_indices(count, batch, 5, step) for step in reversed(range(60))]
    assert forward == backward[::-1]


def test_orders_differ_between_epochs_and_seeds() -> None:
    assert step_indices(50, 50, 0, 0) != step_indices(50, 50, 0, 1)
    assert step_indices(50, 50, 0, 0) != step_indices(50, 50, 1, 0)
    assert step_indices(50, 50, 1, 0) != step_indices(50, 50, 0, 1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_slices_of_all_ranks_are_the_global_batch(world: int) -> None:
    batch = step_indices(100, 16, 0, 9)
    slices = [step_indices(100, 16, 0, 9)[rank::world] for rank in range(world)]
    assert sorted(itertools.chain.from_iterable(slices)) == sorted(batch)
    assert not any(set(one) & set(other) for one, other in itertools.combinations(slices, 2))


@pytest.mark.parametrize(("count", "batch", "step"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_questions_are_refused(count: int, batch: int, step: int) -> None:
    with pytest.raises(ValueError, match="need items"):
        step_indices(count, batch, 0, step)


@pytest.mark.skipif("PADST_DATA" not in os.environ, reason="PADST_DATA names no folder of real inputs")
def test_real_images_and_their_labels(tmp_path: Path) -> None:
    folder = Path(os.environ["PADST_DATA"]) / "imagenette-dev"
    loaded = load_corpus(str(folder), split="heldout", modality="image")
    assert isinstance(loaded, ImageCorpus)
    assert len(loaded.files) == 250
    assert loaded.labels is not None
    assert len(set(loaded.labels)) == 10
    item = ImageItems(loaded, processor(tmp_path, 224))[7]
    assert item["pixel_values"].shape == (3, 224, 224)
    assert item["labels"] == loaded.labels[7]
