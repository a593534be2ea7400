"""Accuracies on models whose guesses are known, and the divergence from a dense one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from padst_cli.errors import PadstError
from padst_cli.evaluation.classification import measure_classification


def prefers(model, order: list[int]):
    """Make a classifier rank its classes as `order` whatever it sees."""
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias[torch.tensor(order)] = torch.arange(len(order), 0, -1).float()
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_top1_and_top5_of_a_known_ranking(tiny, pictures, batch_size: int) -> None:
    model = prefers(tiny.vit(8), [3, 1, 7, 0, 2, 4, 5, 6])
    corpus = pictures((3, 1, 2, 4, 3, 6, 7))
    measured = measure_classification(model, tiny.image_processor, corpus, batch_size=batch_size)
    assert measured.figures == {"top1": 2 / 7, "top5": 5 / 7}
    assert measured.samples == 7
    first = measure_classification(model, tiny.image_processor, corpus, batch_size=batch_size, max_samples=2)
    assert first.figures == {"top1": 1 / 2, "top5": 1.0}


def test_five_classes_have_no_top5(tiny, pictures) -> None:
    measured = measure_classification(prefers(tiny.vit(5), [0, 1, 2, 3, 4]), tiny.image_processor, pictures((0, 1)))
    assert measured.figures == {"top1": 0.5}


def test_divergence_needs_no_labels(tiny, pictures) -> None:
    model, dense, corpus = tiny.vit(6), tiny.vit(6, seed=1), pictures(None, 5)
    pixels = torch.cat([tiny.image_processor(Image.open(file), "pt")["pixel_values"] for file in corpus.files])
    with torch.no_grad():
        wanted, found = (F.log_softmax(one(pixel_values=pixels).logits.double(), dim=-1) for one in (dense, model))
    expected = (wanted.exp() * (wanted - found)).sum(dim=-1).mean().item()
    measured = measure_classification(model, tiny.image_processor, corpus, reference=dense, batch_size=2)
    assert set(measured.figures) == {"kl_to_dense"}
    assert measured.figures["kl_to_dense"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(PadstError, match="has no labels"):
        measure_classification(model, tiny.image_processor, corpus)


def test_labels_outside_the_classes_are_refused(tiny, pictures) -> None:
    with pytest.raises(PadstError, match="outside the model's 6 classes"):
        measure_classification(tiny.vit(6), tiny.image_processor, pictures((0, 6)))


def test_half_precision_models_get_half_precision_pixels(tiny, pictures) -> None:
    model = prefers(tiny.vit(6), [2, 1, 0, 3, 4, 5]).to(torch.bfloat16)
    measured = measure_classification(model, tiny.image_processor, pictures((2, 2)))
    assert measured.figures["top1"] == 1.0


def test_outputs_that_are_not_finite_are_refused(tiny, pictures) -> None:
    model = tiny.vit(6)
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(PadstError, match="NaN or infinity"):
        measure_classification(model, tiny.image_processor, pictures((0,)))
