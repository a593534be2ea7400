"""Perplexity of a masked language model at positions masked by a fixed seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from padst_cli.data.corpus import TextCorpus
from padst_cli.data.items import TokenWindows, check_vocabulary, token_frame, vocabulary_size
from padst_cli.errors import PadstError
from padst_cli.evaluation.forward import (
    check_finite,
    cross_entropy_sum,
    device_of,
    divergence_sum,
    evaluating,
    exponential,
    fitting_batch,
)
from padst_cli.evaluation.result import Measured, OnProgress
from padst_cli.evaluation.text import choose_context, max_positions

MASKED_SHARE = 0.15
_SEED = 2510


def frame_mask(tokenizer: Any, context: int) -> Tensor:
    """Bool `[context]`: which positions of a window hold the tokens that the tokenizer frames a text with."""
    before, after = token_frame(tokenizer)
    special = torch.zeros(context, dtype=torch.bool)
    special[: len(before)] = True
    special[context - len(after) :] = True
    return special


def masked_positions(special: Tensor, windows: int) -> Tensor:
    """Bool `[windows, context]`: 15 % of each window's tokens (at least one), never special ones; the same in every
    run.
    """
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.rand(windows, special.numel(), generator=generator).masked_fill(special, 2.0)
    count = max(1, round(MASKED_SHARE * int((~special).sum())))
    chosen = order.topk(count, dim=-1, largest=False).indices
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, chosen, True)


def measure_masked(
    model: Any,
    tokenizer: Any,
    corpus: TextCorpus,
    *,
    context: int | None = None,
    batch_size: int = 8,
    max_samples: int | None = None,
    reference: Any = None,
    device: torch.device | str | None = None,
    on_progress: OnProgress | None = None,
) -> Measured:
    """exp of the mean nats at masked positions and, with a `reference`, KL(dense || model) there.

    Every chosen token is replaced by the mask token (training after BERT leaves a fifth of them visible; a figure
    should not). Windows (framed as the tokenizer frames a text) lie back to back in the joined documents; tokens left
    over at the end are not used. Raises `PadstError` where the tokenizer has no mask token or the text is shorter
    than a window.
    """
    if tokenizer.mask_token_id is None:
        raise PadstError("this tokenizer has no mask token, so the model cannot be measured as a masked language model")
    context = choose_context(context, max_positions(model, tokenizer))
    vocabulary = vocabulary_size(model)
    items = TokenWindows.from_corpus(corpus, tokenizer, context, vocabulary)
    check_vocabulary(tokenizer.mask_token_id, vocabulary, "a masked position")
    count = min(len(items), max_samples or len(items))
    batch_size = fitting_batch(batch_size, context, model.config.get_text_config().vocab_size)
    device = device_of(model, device)
    masked = masked_positions(frame_mask(tokenizer, context), len(items))[:count]
    nats, divergence = 0.0, 0.0
    with evaluating(model, reference):
        for start in range(0, count, batch_size):
            ids = torch.stack([items[index]["input_ids"] for index in range(start, min(start + batch_size, count))])
            where = masked[start : start + batch_size]
            hidden = ids.masked_fill(where, tokenizer.mask_token_id).to(device)
            logits = model(input_ids=hidden).logits[where]
            nats += cross_entropy_sum(logits, ids[where].to(device))
            if reference is not None:
                divergence += divergence_sum(reference(input_ids=hidden).logits[where], logits)
            if on_progress:
                on_progress(start + len(ids), count)
    check_finite(nats + divergence, "the masked perplexity")
    tokens = int(masked.sum())
    figures = {"masked_perplexity": exponential(nats / tokens)}
    if reference is not None:
        figures["kl_to_dense"] = divergence / tokens
    known = {name: value for name, value in figures.items() if value is not None}
    return Measured(known, count, batch_size, tokens, context)
