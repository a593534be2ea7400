"""Perplexity of a causal language model over a token stream, in sliding windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from padst_cli.data.corpus import TextCorpus
from padst_cli.data.items import token_frame, token_stream, vocabulary_size
from padst_cli.errors import PadstError
from padst_cli.evaluation.forward import (
    accepted,
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


@dataclass(frozen=True)
class Window:
    """Inputs `start .. start + length - 1` of a stream; the last `scored` of them have their next token scored."""

    start: int
    length: int
    scored: int


def sliding_windows(tokens: int, context: int, stride: int, prefixed: bool = False) -> list[Window]:
    """Windows of at most `context` inputs, `stride` apart, that score each token of a stream exactly once.

    The stream's first token is scored only where windows are `prefixed`, for else nothing comes before it.

    The recipe of the transformers documentation ("Perplexity of fixed-length models"), but that a window's targets
    reach one token beyond its inputs: so the first token after a window's edge is scored too, from a full context.
    """
    inputs = tokens - 1
    windows: list[Window] = []
    done = -1 if prefixed else 0
    for start in range(0, max(inputs, 0), stride):
        end = min(start + context, inputs)
        windows.append(Window(start, end - start, end - done))
        done = end
        if done == inputs:
            break
    return windows


def measure_perplexity(
    model: Any,
    tokenizer: Any,
    corpus: TextCorpus,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_samples: int | None = None,
    reference: Any = None,
    device: torch.device | str | None = None,
    on_progress: OnProgress | None = None,
) -> Measured:
    """Token perplexity, word perplexity, bits per character and, with a `reference` model, KL(dense || model) in one
    pass.

    Documents are joined as `data.items.token_stream` does; separators are scored like other tokens. Each window
    begins with the start token where the tokenizer gives a text one; it counts towards the context and is not scored.
    Words are runs without white space. Bits per character and word perplexity are left out when `max_samples`
    (windows) cuts the text short. Raises `PadstError` for text shorter than the context and for a context the model
    has no positions for.
    """
    text = _cut(model, tokenizer, corpus, context, stride)
    windows = text.windows[:max_samples]
    batch_size = fitting_batch(batch_size, text.context, model.config.get_text_config().vocab_size)
    device = device_of(model, device)
    nats, divergence, done = 0.0, 0.0, 0
    with evaluating(model, reference):
        for batch in _batches(windows, batch_size):
            inputs, targets = (part.to(device) for part in _gather(text, batch))
            logits = _logits(model, inputs, batch[0].scored)
            nats += cross_entropy_sum(logits, targets)
            if reference is not None:
                divergence += divergence_sum(_logits(reference, inputs, batch[0].scored), logits)
            done += len(batch)
            if on_progress:
                on_progress(done, len(windows))
    check_finite(nats + divergence, "the perplexity")
    tokens = sum(window.scored for window in windows)
    figures = {"perplexity": exponential(nats / tokens)}
    if len(windows) == len(text.windows):
        figures |= _per_text(nats, corpus)
    if reference is not None:
        figures["kl_to_dense"] = divergence / tokens
    known = {name: value for name, value in figures.items() if value is not None}
    return Measured(known, len(windows), batch_size, tokens, text.context, text.stride)


@dataclass(frozen=True)
class _Text:
    stream: Tensor
    prefix: Tensor
    windows: list[Window]
    context: int
    stride: int


def _cut(model: Any, tokenizer: Any, corpus: TextCorpus, context: int | None, stride: int | None) -> _Text:
    context = choose_context(context, max_positions(model))
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise PadstError(f"a stride of {stride} is not between 1 and the context of {context} tokens")
    prefix, _ = token_frame(tokenizer)
    body = context - len(prefix)
    if body < 1:
        raise PadstError(f"a context of {context} leaves no room beside the start token; use --context 2 or more")
    stream = token_stream(corpus, tokenizer, vocabulary_size(model))
    if stream.numel() < max(context, 2):
        raise PadstError(
            f"'{corpus.name}' ({corpus.split}) has {stream.numel()} tokens, fewer than the context of {context}: "
            "give more text or a shorter --context"
        )
    stride = min(stride, body)
    windows = sliding_windows(stream.numel(), body, stride, bool(prefix))
    return _Text(stream, torch.tensor(prefix, dtype=torch.int64), windows, context, stride)


def _per_text(nats: float, corpus: TextCorpus) -> dict[str, float | None]:
    return {
        "bits_per_char": nats / math.log(2) / corpus.characters,
        "word_perplexity": exponential(nats / corpus.words),
    }


def _batches(windows: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Runs of equally shaped windows, at most `batch_size` long: only the first and the last differ, so nothing is
    padded.
    """
    for _, run in groupby(windows, key=lambda window: (window.length, window.scored)):
        same = list(run)
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]


def _gather(text: _Text, batch: list[Window]) -> tuple[Tensor, Tensor]:
    """Inputs `[batch, prefix + length]` and the targets `[batch * scored]` of the last positions."""
    inputs = [torch.cat([text.prefix, text.stream[one.start : one.start + one.length]]) for one in batch]
    ends = [one.start + one.length + 1 for one in batch]
    targets = [text.stream[end - one.scored : end] for end, one in zip(ends, batch, strict=True)]
    return torch.stack(inputs), torch.cat(targets)


def _logits(model: Any, inputs: Tensor, scored: int) -> Tensor:
    output = model(input_ids=inputs, **accepted(model, use_cache=False, logits_to_keep=scored))
    return output.logits[:, -scored:].flatten(0, 1)
