"""How far a bare encoder's last hidden state is from the dense model's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from padst_cli.data.corpus import ImageCorpus, TextCorpus
from padst_cli.data.items import ImageItems, TokenWindows, collate, vocabulary_size
from padst_cli.errors import PadstError
from padst_cli.evaluation.forward import check_finite, device_of, evaluating
from padst_cli.evaluation.result import Measured, OnProgress
from padst_cli.evaluation.text import choose_context, max_positions


def measure_features(
    model: Any,
    processor: Any,
    corpus: TextCorpus | ImageCorpus,
    *,
    context: int | None = None,
    batch_size: int = 8,
    max_samples: int | None = None,
    reference: Any = None,
    device: torch.device | str | None = None,
    on_progress: OnProgress | None = None,
) -> Measured:
    """Relative feature error ||h - h_dense||^2 / ||h_dense||^2 over all positions of all samples; lower is better, 0
    is exact.

    h is the last hidden state `[batch, positions, width]`; sums are in float64. Raises `PadstError` without a
    `reference`.
    """
    if reference is None:
        raise PadstError(
            "an encoder without a head is measured by how far its features are from the dense model's: "
            "name the dense model with --compare"
        )
    if isinstance(corpus, TextCorpus):
        context = choose_context(context, max_positions(model, processor))
        items: Any = TokenWindows.from_corpus(corpus, processor, context, vocabulary_size(model))
    else:
        items = ImageItems(corpus, processor)
    count = min(len(items), max_samples or len(items))
    device = device_of(model, device)
    wrong, whole, done = 0.0, 0.0, 0
    with evaluating(model, reference):
        for inputs in _inputs(items, count, batch_size):
            dense = _last_hidden(reference, inputs, device)
            found = _last_hidden(model, inputs, device)
            if found.shape != dense.shape:
                raise PadstError(
                    f"the reference model's features are {list(dense.shape[1:])} where this one's are "
                    f"{list(found.shape[1:])}; it must be the dense model that this one was made from"
                )
            wrong += (found - dense).square().sum().item()
            whole += dense.square().sum().item()
            done += len(found)
            if on_progress:
                on_progress(done, count)
    check_finite(wrong + whole, "the feature error")
    tokens = count * context if context is not None and isinstance(corpus, TextCorpus) else None
    return Measured({"feature_error": wrong / whole}, count, batch_size, tokens, context)


def _inputs(items: Any, count: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    for batch in DataLoader(Subset(items, range(count)), batch_size=batch_size, collate_fn=collate):
        yield {key: value for key, value in batch.items() if key != "labels"}


def _last_hidden(model: Any, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
    """The last hidden state in float64; pixels go in the model's own dtype."""
    moved = {key: value.to(device, model.dtype if value.is_floating_point() else None) for key, value in inputs.items()}
    hidden = getattr(model(**moved), "last_hidden_state", None)
    if hidden is None:
        raise PadstError(
            f"{type(model).__name__} has no last hidden state to compare; padst measures encoders that give one"
        )
    return hidden.double()
