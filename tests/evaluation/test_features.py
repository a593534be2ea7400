"""The relative feature error of encoders on text and on images."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image

from padst_cli.data.items import TokenWindows
from padst_cli.errors import PadstError
from padst_cli.evaluation.features import measure_features


def relative_error(model, dense, **inputs: torch.Tensor) -> float:
    with torch.no_grad():
        found, wanted = (one(**inputs).last_hidden_state.double() for one in (model, dense))
    return ((found - wanted).square().sum() / wanted.square().sum()).item()


def test_text_encoder(tiny) -> None:
    model, dense = tiny.bert(head=False), tiny.bert(head=False, seed=1)
    tokenizer, corpus = tiny.tokenizer("[CLS] $A [SEP]"), tiny.text(60)
    windows = TokenWindows.from_corpus(corpus, tokenizer, 16)
    ids = torch.stack([windows[index]["input_ids"] for index in range(len(windows))])
    measured = measure_features(model, tokenizer, corpus, reference=dense, context=16, batch_size=3)
    assert measured.figures["feature_error"] == pytest.approx(relative_error(model, dense, input_ids=ids), rel=1e-6)
    assert (measured.samples, measured.tokens, measured.context) == (4, 64, 16)
    same = measure_features(dense, tokenizer, corpus, reference=copy.deepcopy(dense))
    assert same.figures["feature_error"] == 0.0


def test_image_encoder_with_or_without_labels(tiny, pictures) -> None:
    model, dense = tiny.vit(None), tiny.vit(None, seed=1)
    corpus = pictures((0, 1, 1, 0, 1))
    pixels = torch.cat([tiny.image_processor(Image.open(file), "pt")["pixel_values"] for file in corpus.files])
    measured = measure_features(model, tiny.image_processor, corpus, reference=dense, batch_size=2)
    assert measured.figures["feature_error"] == pytest.approx(
        relative_error(model, dense, pixel_values=pixels), rel=1e-6
    )
    assert (measured.samples, measured.tokens, measured.context) == (5, None, None)
    unlabelled = measure_features(model, tiny.image_processor, pictures(None, 5), reference=dense, batch_size=2)
    assert unlabelled == measured


def test_needs_the_dense_model(tiny) -> None:
    with pytest.raises(PadstError, match="name the dense model with --compare"):
        measure_features(tiny.bert(head=False), tiny.tokenizer(), tiny.text(40))


def test_needs_a_last_hidden_state_of_the_same_shape(tiny) -> None:
    with pytest.raises(PadstError, match="no last hidden state"):
        measure_features(tiny.bert(head=True), tiny.tokenizer(), tiny.text(40), reference=tiny.bert(head=True))
    wide = tiny.bert(head=False)
    narrow = wide.__class__(wide.config.__class__(**{**wide.config.to_dict(), "hidden_size": 8}))
    with pytest.raises(PadstError, match="must be the dense model"):
        measure_features(wide, tiny.tokenizer(), tiny.text(40), reference=narrow)
