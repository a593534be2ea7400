"""The metric follows the task, the result holds the keys of `padst eval`, and known models give known figures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from padst_cli.errors import PadstError
from padst_cli.evaluation import HIGHER_IS_BETTER, METRICS, evaluate_model
from tests import models

KEYS = {
    *("metric_name", "value", "kl_to_dense", "bits_per_char", "word_perplexity", "top5", "samples", "tokens"),
    *("context", "stride", "split", "seconds"),
}


def test_causal_language_model(tiny) -> None:
    corpus = tiny.text(40)
    result = evaluate_model(tiny.gpt2(), tiny.tokenizer(), "causal-lm", corpus, context=8, stride=4, batch_size=2)
    figures = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(figures) == KEYS | {"data", "digest", "batch_size"}
    assert (result.metric_name, result.context, result.stride, result.batch_size) == ("perplexity", 8, 4, 2)
    assert (result.split, result.data, result.digest) == ("heldout", "random words", corpus.digest)
    assert result.kl_to_dense is None
    assert result.top5 is None
    assert result.bits_per_char is not None
    assert result.value > 1


@pytest.mark.parametrize("metric", ["bits_per_char", "word_perplexity", "kl_to_dense"])
def test_any_metric_of_the_task_can_be_the_value(tiny, metric: str) -> None:
    result = evaluate_model(
        tiny.gpt2(), tiny.tokenizer(), "causal-lm", tiny.text(40), metric=metric, reference=tiny.gpt2(1)
    )
    assert result.metric_name == metric
    assert result.value == result.to_json()[metric]


def test_defaults_by_task(tiny, pictures) -> None:
    dense = tiny.bert(head=False, seed=1)
    masked = evaluate_model(tiny.bert(head=True), tiny.tokenizer(mask=True), "masked-lm", tiny.text(40))
    bare = evaluate_model(tiny.bert(head=False), tiny.tokenizer(), "encoder", tiny.text(40), reference=dense)
    images = evaluate_model(tiny.vit(6), tiny.image_processor, "image-classification", pictures((0, 1)))
    unlabelled = evaluate_model(
        tiny.vit(6), tiny.image_processor, "image-classification", pictures(None, 2), reference=tiny.vit(6, seed=1)
    )
    names = [one.metric_name for one in (masked, bare, images, unlabelled)]
    assert names == ["masked_perplexity", "feature_error", "top1", "kl_to_dense"]
    assert images.top5 is not None
    assert unlabelled.value == unlabelled.kl_to_dense
    assert {name for names in METRICS.values() for name in names} >= HIGHER_IS_BETTER


def test_wrong_requests_are_one_sentence(tiny, pictures) -> None:
    model, tokenizer, corpus = tiny.gpt2(), tiny.tokenizer(), tiny.text(40)
    with pytest.raises(PadstError, match="did you mean 'perplexity'"):
        evaluate_model(model, tokenizer, "causal-lm", corpus, metric="perplexty")
    with pytest.raises(PadstError, match="none is given"):
        evaluate_model(model, tokenizer, "causal-lm", corpus, metric="kl_to_dense")
    with pytest.raises(PadstError, match="holds images"):
        evaluate_model(model, tokenizer, "causal-lm", pictures((0,)))
    with pytest.raises(PadstError, match="no tokenizer"):
        evaluate_model(model, None, "causal-lm", corpus)
    with pytest.raises(PadstError, match="need all"):
        evaluate_model(model, tokenizer, "causal-lm", corpus, metric="bits_per_char", context=8, max_samples=1)
    with pytest.raises(PadstError, match="1 or more"):
        evaluate_model(model, tokenizer, "causal-lm", corpus, batch_size=0)
    with pytest.raises(PadstError, match="--stride is for"):
        evaluate_model(tiny.bert(head=True), tiny.tokenizer(mask=True), "masked-lm", corpus, stride=4)
    with pytest.raises(PadstError, match="--context is for text"):
        evaluate_model(tiny.vit(6), tiny.image_processor, "image-classification", pictures((0,)), context=4)


@pytest.mark.parametrize(("model", "task"), [("bert-mlm", "masked-lm"), ("bert", "encoder"), ("gpt2", "causal-lm")])
def test_a_tokenizer_of_another_model_is_told(tiny, model: str, task: str) -> None:
    small = models.build(model, vocab_size=20)
    with pytest.raises(PadstError, match="tokenizer and model do not belong together"):
        evaluate_model(small, tiny.tokenizer(mask=True), task, tiny.text(40), reference=small)


@pytest.fixture(scope="module")
def real() -> Path:
    if "PADST_DATA" not in os.environ:
        pytest.skip("PADST_DATA names no folder of real models and data")
    return Path(os.environ["PADST_DATA"])


def test_known_language_model(real: Path) -> None:
    """stories260k: 3.8 a token where every story has its start token; more where windows cut stories."""
    from padst_cli.checkpoint.reader import load_dense, load_processor, open_source
    from padst_cli.data.corpus import load_corpus

    source = open_source(str(real / "stories260k"))
    corpus = load_corpus(str(real / "text" / "tinystories-dev.txt"), split="heldout", modality="text")
    result = evaluate_model(load_dense(source), load_processor(source), source.task, corpus, max_samples=24)
    assert 4.0 < result.value < 5.0
    assert result.tokens == 24 * 511 + 1


def test_known_image_classifier(real: Path) -> None:
    """deit-tiny: about 70 % top-1 and 92 % top-5 on ImageNet validation images; a fifth of the dev images is read."""
    from padst_cli.checkpoint.reader import load_dense, load_processor, open_source
    from padst_cli.data.corpus import load_corpus

    source = open_source(str(real / "deit-tiny"))
    labels = source.config.label2id
    corpus = load_corpus(str(real / "imagenette-dev"), split="heldout", modality="image", label2id=labels)
    result = evaluate_model(load_dense(source), load_processor(source), source.task, corpus, max_samples=50)
    assert result.value >= 0.55
    assert result.top5 is not None
    assert result.top5 >= 0.85
