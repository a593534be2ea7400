"""Top-1 and top-5 accuracy of an image classifier, and its divergence from the dense one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from padst_cli.data.corpus import ImageCorpus
from padst_cli.data.items import ImageItems, collate
from padst_cli.errors import PadstError
from padst_cli.evaluation.forward import check_finite, device_of, divergence_sum, evaluating
from padst_cli.evaluation.result import Measured, OnProgress


def measure_classification(
    model: Any,
    image_processor: Any,
    corpus: ImageCorpus,
    *,
    batch_size: int = 8,
    max_samples: int | None = None,
    reference: Any = None,
    device: torch.device | str | None = None,
    on_progress: OnProgress | None = None,
) -> Measured:
    """Shares in [0, 1] of images whose label is first (`top1`), or among five (`top5`, from six classes up).

    Without labels only KL(dense || model) per image can be taken. Raises `PadstError` where there are neither labels
    nor a reference, or a label is not one of the model's classes.
    """
    if corpus.labels is None and reference is None:
        raise PadstError(
            f"'{corpus.name}' has no labels: add labels.csv (file,label) or one folder a class; "
            "without labels only the divergence from a dense model can be measured (--compare)"
        )
    items = ImageItems(corpus, image_processor)
    count = min(len(items), max_samples or len(items))
    loader = DataLoader(Subset(items, range(count)), batch_size=batch_size, collate_fn=collate)
    device = device_of(model, device)
    first, five, divergence, done, classes = 0, 0, 0.0, 0, 0
    with evaluating(model, reference):
        for batch in loader:
            pixels = batch["pixel_values"].to(device=device, dtype=model.dtype)
            logits = model(pixel_values=pixels).logits
            check_finite(logits.double().sum().item(), "the classifier's output")
            classes = logits.shape[-1]
            if corpus.labels is not None:
                hits = _hits(logits, batch["labels"].to(device), corpus.name)
                first, five = first + int(hits[:, 0].sum()), five + int(hits.sum())
            if reference is not None:
                divergence += divergence_sum(reference(pixel_values=pixels.to(reference.dtype)).logits, logits)
            done += len(pixels)
            if on_progress:
                on_progress(done, count)
    figures: dict[str, float] = {}
    if corpus.labels is not None:
        figures["top1"] = first / count
        if classes > 5:
            figures["top5"] = five / count
    if reference is not None:
        figures["kl_to_dense"] = divergence / count
    return Measured(figures, count, batch_size)


def _hits(logits: Tensor, labels: Tensor, name: str) -> Tensor:
    """Bool `[batch, up to 5]`: whether each of an image's best guesses, best first, is its label."""
    classes = logits.shape[-1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise PadstError(
            f"'{name}' has a label outside the model's {classes} classes (0 to {classes - 1}); check its labels"
        )
    return logits.topk(min(5, classes), dim=-1).indices == labels[:, None]
