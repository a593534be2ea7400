"""The one entry to evaluation: pick the metric by task, run it, and put the figures into an `EvalResult`."""

from __future__ import annotations

import time
from typing import Any, Final

import torch

from padst_cli.data.corpus import ImageCorpus, TextCorpus
from padst_cli.errors import PadstError, nearest
from padst_cli.evaluation.classification import measure_classification
from padst_cli.evaluation.features import measure_features
from padst_cli.evaluation.masked import measure_masked
from padst_cli.evaluation.perplexity import measure_perplexity
from padst_cli.evaluation.result import EvalResult, Measured, OnProgress

METRICS: Final[dict[str, tuple[str, ...]]] = {
    "causal-lm": ("perplexity", "bits_per_char", "word_perplexity", "kl_to_dense"),
    "masked-lm": ("masked_perplexity", "kl_to_dense"),
    "image-classification": ("top1", "top5", "kl_to_dense"),
    "encoder": ("feature_error",),
}
"""Metrics by task, the default first."""

HIGHER_IS_BETTER: Final = frozenset({"top1", "top5"})


def evaluate_model(
    model: Any,
    processor: Any,
    task: str,
    corpus: TextCorpus | ImageCorpus,
    *,
    metric: str = "auto",
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_samples: int | None = None,
    reference: Any = None,
    device: torch.device | str | None = None,
    on_progress: OnProgress | None = None,
) -> EvalResult:
    """Measure `model` on held-out data; with the dense `reference` also KL(dense || model), from the same pass.

    `processor` is the model's tokenizer or image processor. Inputs go to `device` (default: where the model is), and
    the reference must be there as well. `max_samples` counts windows or images. Raises `PadstError` for a metric that
    the task does not have, for what the data lacks (length, labels) and for outputs that are not finite.
    """
    metric = choose_metric(metric, task, corpus, reference is not None)
    _check_inputs(task, corpus, processor, context, stride, batch_size, max_samples)
    began = time.perf_counter()
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "max_samples": max_samples,
        "reference": reference,
        "device": device,
        "on_progress": on_progress,
    }
    if isinstance(corpus, TextCorpus):
        common["context"] = context
    measured = _measure(model, processor, task, corpus, common, stride)
    return _result(measured, metric, corpus, time.perf_counter() - began)


def choose_metric(metric: str, task: str, corpus: TextCorpus | ImageCorpus, has_reference: bool) -> str:
    """`auto` resolved by task (images without labels: the divergence); raises `PadstError` that names the task's
    metrics.
    """
    choices = METRICS[task]
    if metric == "auto":
        unlabelled = isinstance(corpus, ImageCorpus) and corpus.labels is None
        return "kl_to_dense" if task == "image-classification" and unlabelled and has_reference else choices[0]
    if metric not in choices:
        hint = nearest(metric, choices)
        raise PadstError(f"metric '{metric}' does not fit a model of task {task}{hint}; use {' or '.join(choices)}")
    if metric == "kl_to_dense" and not has_reference:
        raise PadstError("metric 'kl_to_dense' compares with a dense model, and none is given; name it with --compare")
    return metric


def _check_inputs(
    task: str,
    corpus: TextCorpus | ImageCorpus,
    processor: Any,
    context: int | None,
    stride: int | None,
    batch_size: int,
    max_samples: int | None,
) -> None:
    text = isinstance(corpus, TextCorpus)
    wanted = {"causal-lm": True, "masked-lm": True, "image-classification": False}.get(task, text)
    if text != wanted:
        raise PadstError(
            f"'{corpus.name}' holds {'text' if text else 'images'}, and a model of task {task} reads the other"
        )
    if processor is None:
        raise PadstError(
            f"the model folder has no {'tokenizer' if text else 'image processor'}; put its files beside the weights"
        )
    if not text and context is not None:
        raise PadstError("--context is for text; this model reads images")
    if task != "causal-lm" and stride is not None:
        raise PadstError("--stride is for causal language models; other models see each window once")
    if batch_size < 1 or (max_samples is not None and max_samples < 1):
        raise PadstError("the batch size and the number of samples must be 1 or more")


def _measure(
    model: Any, processor: Any, task: str, corpus: Any, common: dict[str, Any], stride: int | None
) -> Measured:
    if task == "causal-lm":
        return measure_perplexity(model, processor, corpus, stride=stride, **common)
    if task == "masked-lm":
        return measure_masked(model, processor, corpus, **common)
    if task == "image-classification":
        return measure_classification(model, processor, corpus, **common)
    return measure_features(model, processor, corpus, **common)


def _result(measured: Measured, metric: str, corpus: TextCorpus | ImageCorpus, seconds: float) -> EvalResult:
    if metric not in measured.figures:
        raise PadstError(
            f"metric '{metric}' could not be taken on '{corpus.name}': bits_per_char and word_perplexity need all "
            "the text, top1 labels, top5 six classes, and a perplexity must be below 1e300"
        )
    return EvalResult(
        metric_name=metric,
        value=measured.figures[metric],
        kl_to_dense=measured.figures.get("kl_to_dense"),
        bits_per_char=measured.figures.get("bits_per_char"),
        word_perplexity=measured.figures.get("word_perplexity"),
        top5=measured.figures.get("top5"),
        samples=measured.samples,
        tokens=measured.tokens,
        context=measured.context,
        stride=measured.stride,
        split=corpus.split,
        seconds=seconds,
        data=corpus.name,
        digest=corpus.digest,
        batch_size=measured.batch_size,
    )
