"""Sliding windows score every token once, and the figures equal plain sums over single forward passes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from padst_cli.data.items import token_stream
from padst_cli.errors import PadstError
from padst_cli.evaluation.perplexity import measure_perplexity, sliding_windows


@pytest.mark.parametrize("tokens", [2, 3, 8, 9, 17, 40])
@pytest.mark.parametrize(("context", "stride"), [(1, 1), (4, 4), (8, 8), (8, 3), (8, 1), (16, 5)])
@pytest.mark.parametrize("prefixed", [False, True])
def test_every_token_is_scored_once_from_a_full_context(tokens: int, context: int, stride: int, prefixed: bool) -> None:
    scored: list[int] = []
    for number, window in enumerate(sliding_windows(tokens, context, stride, prefixed)):
        assert 1 <= window.length <= context
        targets = range(window.start + window.length + 1 - window.scored, window.start + window.length + 1)
        scored.extend(targets)
        if number:
            assert window.scored <= stride
            # What the first scored target of a later window may look back on.
            assert targets[0] - window.start > context - stride
    assert scored == list(range(0 if prefixed else 1, tokens))


def naive_nats(model, stream: torch.Tensor, context: int, stride: int, prefix: list[int]) -> torch.Tensor:
    """Nats of each scored token, one window at a time, in float64."""
    body = context - len(prefix)
    stride = min(stride, body)
    found = []
    seen = 0 if prefix else 1
    for start in range(0, len(stream), stride):
        inputs = torch.cat([torch.tensor(prefix, dtype=torch.int64), stream[start : start + body]])
        end = min(start + body + 1, len(stream))
        with torch.no_grad():
            log = F.log_softmax(model(input_ids=inputs[None]).logits[0].double(), dim=-1)
        while seen < end:
            found.append(-log[len(prefix) + seen - start - 1, stream[seen]])
            seen += 1
        if seen == len(stream):
            break
    return torch.stack(found)


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (7, 7), (7, 2)])
@pytest.mark.parametrize("frame", [None, "[BEGIN] $A"])
def test_equals_single_windows_in_float64(tiny, context: int, stride: int, frame: str | None) -> None:
    model, tokenizer, corpus = tiny.gpt2(), tiny.tokenizer(frame), tiny.text(30, 1, 22)
    prefix = [1] if frame else []
    nats = naive_nats(model, token_stream(corpus, tokenizer), context, stride, prefix)
    for batch_size in (1, 3, 64):
        measured = measure_perplexity(model, tokenizer, corpus, context=context, stride=stride, batch_size=batch_size)
        assert measured.tokens == len(nats) == 30 + 1 + 22 + 2 - (not frame)
        assert measured.figures["perplexity"] == pytest.approx(nats.mean().exp().item(), rel=1e-6)
        total = nats.sum().item()
        assert measured.figures["bits_per_char"] == pytest.approx(total / math.log(2) / corpus.characters, rel=1e-6)
        assert measured.figures["word_perplexity"] == pytest.approx(math.exp(total / 53), rel=1e-5)


def test_one_window_equals_the_loss_of_transformers(tiny) -> None:
    model, tokenizer, corpus = tiny.gpt2(), tiny.tokenizer(), tiny.text(16)
    ids = token_stream(corpus, tokenizer)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.exp().item()
    assert measure_perplexity(model, tokenizer, corpus).figures["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tiny) -> None:
    model = tiny.gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    measured = measure_perplexity(model, tiny.tokenizer(), tiny.text(40), context=8)
    assert measured.figures["perplexity"] == pytest.approx(tiny.vocab, rel=1e-6)


def test_divergence_from_the_reference_in_the_same_pass(tiny) -> None:
    model, dense, tokenizer, corpus = tiny.gpt2(0), tiny.gpt2(1), tiny.tokenizer(), tiny.text(16)
    ids = token_stream(corpus, tokenizer)[None, :-1]
    with torch.no_grad():
        wanted, found = (F.log_softmax(one(input_ids=ids).logits[0].double(), dim=-1) for one in (dense, model))
    expected = (wanted.exp() * (wanted - found)).sum(dim=-1).mean().item()
    measured = measure_perplexity(model, tokenizer, corpus, reference=dense)
    assert measured.figures["kl_to_dense"] == pytest.approx(expected, rel=1e-5)
    alone = measure_perplexity(model, tokenizer, corpus)
    assert "kl_to_dense" not in alone.figures
    assert alone.figures["perplexity"] == measured.figures["perplexity"]
    assert measure_perplexity(model, tokenizer, corpus, reference=model).figures["kl_to_dense"] == 0.0


def test_text_cut_short_has_no_figures_of_the_whole_text(tiny) -> None:
    seen: list[tuple[int, int]] = []
    measured = measure_perplexity(
        tiny.gpt2(),
        tiny.tokenizer(),
        tiny.text(60),
        context=8,
        max_samples=3,
        batch_size=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert (measured.samples, measured.tokens) == (3, 24)
    assert set(measured.figures) == {"perplexity"}
    assert seen == [(2, 3), (3, 3)]


def test_modes_and_gradients_are_as_before(tiny) -> None:
    model = tiny.gpt2().train()
    model.transformer.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    measure_perplexity(model, tiny.tokenizer(), tiny.text(20))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 17}, "exceeds the model's 16 positions"),
        ({"context": 0}, "too short"),
        ({"stride": 17}, "not between 1 and the context"),
        ({"context": 4, "stride": 0}, "not between 1 and the context"),
    ],
)
def test_refuses_what_the_model_cannot_read(tiny, options: dict[str, int], message: str) -> None:
    with pytest.raises(PadstError, match=message):
        measure_perplexity(tiny.gpt2(), tiny.tokenizer(), tiny.text(60), **options)


def test_refuses_text_shorter_than_the_context(tiny) -> None:
    with pytest.raises(PadstError, match="9 tokens, fewer than the context of 16"):
        measure_perplexity(tiny.gpt2(), tiny.tokenizer(separator=False), tiny.text(9))


def test_refuses_outputs_that_are_not_finite(tiny) -> None:
    model = tiny.gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = math.nan
    with pytest.raises(PadstError, match="NaN or infinity"):
        measure_perplexity(model, tiny.tokenizer(), tiny.text(20))


def test_refuses_a_reference_with_another_vocabulary(tiny) -> None:
    dense = tiny.gpt2()
    dense.resize_token_embeddings(tiny.vocab + 3)
    with pytest.raises(PadstError, match="gives 35 outputs"):
        measure_perplexity(tiny.gpt2(), tiny.tokenizer(), tiny.text(20), reference=dense)
