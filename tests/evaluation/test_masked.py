"""The mask is the same in every run, spares special tokens, and the figure is taken there alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from padst_cli.data.items import TokenWindows
from padst_cli.errors import PadstError
from padst_cli.evaluation.masked import frame_mask, masked_positions, measure_masked


def test_fifteen_percent_of_each_window_and_nothing_special(tiny) -> None:
    special = frame_mask(tiny.tokenizer("[CLS] $A [SEP]"), 42)
    assert special.nonzero().flatten().tolist() == [0, 41]
    masked = masked_positions(special, 50)
    assert masked.sum(dim=1).tolist() == [6] * 50
    assert not bool(masked[:, special].any())
    assert torch.equal(masked, masked_positions(special, 50))
    assert len({tuple(row) for row in masked.tolist()}) > 40


def test_equals_a_plain_sum_over_masked_positions(tiny) -> None:
    model, dense = tiny.bert(head=True), tiny.bert(head=True, seed=1)
    tokenizer, corpus = tiny.tokenizer("[CLS] $A [SEP]", mask=True), tiny.text(60, 30)
    windows = TokenWindows.from_corpus(corpus, tokenizer, 16)
    masked = masked_positions(frame_mask(tokenizer, 16), len(windows))
    nats, divergence = [], []
    for index in range(len(windows)):
        ids = windows[index]["input_ids"]
        hidden = ids.clone()
        hidden[masked[index]] = tokenizer.mask_token_id
        with torch.no_grad():
            found, wanted = (
                F.log_softmax(one(input_ids=hidden[None]).logits[0].double(), dim=-1)[masked[index]]
                for one in (model, dense)
            )
        nats.append(-found.gather(1, ids[masked[index]][:, None])[:, 0])
        divergence.append((wanted.exp() * (wanted - found)).sum(dim=-1))
    for batch_size in (1, 4):
        measured = measure_masked(model, tokenizer, corpus, context=16, batch_size=batch_size, reference=dense)
        assert measured.figures["masked_perplexity"] == pytest.approx(torch.cat(nats).mean().exp().item(), rel=1e-6)
        assert measured.figures["kl_to_dense"] == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-5)
        assert (measured.samples, measured.tokens, measured.context) == (6, 12, 16)


def test_a_part_sees_the_same_mask_as_the_whole(tiny) -> None:
    model, tokenizer, corpus = tiny.bert(head=True), tiny.tokenizer(mask=True), tiny.text(32)
    part = measure_masked(model, tokenizer, corpus, max_samples=1)
    alone = measure_masked(model, tokenizer, tiny.text(32), max_samples=1, batch_size=1)
    assert part == alone or part.figures == alone.figures
    assert part.samples == 1


def test_needs_a_mask_token(tiny) -> None:
    with pytest.raises(PadstError, match="no mask token"):
        measure_masked(tiny.bert(head=True), tiny.tokenizer(), tiny.text(60))


def test_needs_a_whole_window(tiny) -> None:
    with pytest.raises(PadstError, match="too short"):
        measure_masked(tiny.bert(head=True), tiny.tokenizer(mask=True), tiny.text(5))
