"""Held-out evaluation of a dense or a sparse model, alone or beside another on the same data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from accelerate.utils import set_seed

from padst_cli.checkpoint.output import is_no_data
from padst_cli.checkpoint.reader import Source, load_dense, open_source
from padst_cli.checkpoint.run_folder import RECIPE
from padst_cli.data.corpus import ImageCorpus, TextCorpus, default_spec, load_corpus
from padst_cli.data.items import vocabulary_size
from padst_cli.errors import PadstError
from padst_cli.evaluation import EvalResult, check_tasks, evaluate_model, run_tasks
from padst_cli.evaluation.text import max_positions
from padst_cli.events import OnEvent, PhaseStarted, ignore
from padst_cli.recipe import load_recipe
from padst_cli.runtime.load import Loaded, load
from padst_cli.runtime.quantizer import kernels_of

_PROBE: Final = "The quick brown fox (aged 37) naïvely said: 'x != 0.5'.\n\n\tIt rained; 2026 was over, wasn't it?"
"""Tokenizers that cut this alike are taken for the same."""


@dataclass(frozen=True)
class EvaluateResult:
    """What `padst eval` reports: the figures of one model, and with `--compare` of a second one on the same data."""

    model: str
    figures: EvalResult
    kernels: list[str]
    other_model: str | None = None
    other: EvalResult | None = None
    tasks: dict[str, Any] | None = None
    same_inputs: bool = True
    """Whether the other reads the data as the same tokens or pixels; figures a token are not comparable if not."""

    @property
    def ratio(self) -> float | None:
        """This model's value over the other's; None without another, and where the other's is 0."""
        return self.figures.value / self.other.value if self.other and self.other.value else None

    @property
    def metric_name(self) -> str:
        """Name of the measured metric."""
        return self.figures.metric_name

    def to_json(self) -> dict[str, Any]:
        """One flat object: the model's figures, `other` with its figures, their `ratio`, and task scores."""
        merged = {"model": self.model, **asdict(self.figures), "kernels": self.kernels}
        if self.other is not None:
            other = {"model": self.other_model, **asdict(self.other)}
            merged |= {"other": other, "ratio": self.ratio, "same_inputs": self.same_inputs}
        if self.tasks is not None:
            merged["tasks"] = self.tasks
        return merged


def evaluate(
    model: str,
    data: str | None = None,
    *,
    metric: str = "auto",
    context: int | None = None,
    stride: int | None = None,
    compare: str | None = None,
    tasks: list[str] | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_samples: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    on_event: OnEvent = ignore,
) -> EvaluateResult:
    """Measure `model` on the held-out split of `data` (WikiText-103 for causal LMs without one).

    With `compare` the other model is measured on the same data; if it is the dense one, the divergence from it is
    filled in, as far as both read the same tokens and give as many outputs. A sparse encoder without a head is compared
    with its dense base model, which its recipe names. `tasks` are lm-eval tasks. Raises `PadstError` for a list of them
    that cannot be run before anything is read, and for two models of different tasks.
    """
    if tasks is not None:
        check_tasks(tasks, limit, include_path)
    set_seed(seed)
    loaded = load(model, device=device, dtype=dtype)
    corpus = _corpus(loaded.source, data)
    second = load(compare, device=device, dtype=dtype) if compare else None
    alike = second is None or _alike(loaded, second, metric)
    reference = _reference(loaded, second) if alike else None

    def measure(one: Loaded, against: Any) -> EvalResult:
        on_event(PhaseStarted(f"evaluate {one.source.name}"))
        return evaluate_model(
            one.model,
            one.processor,
            one.source.task,
            corpus,
            metric=metric,
            context=context,
            stride=stride,
            batch_size=batch_size,
            max_samples=max_samples,
            reference=against,
            device=one.device,
        )

    scores = None
    if tasks is not None:
        # First, because a misspelt task name should not cost an evaluation.
        on_event(PhaseStarted("lm-eval"))
        scores = run_tasks(
            loaded.model, loaded.processor, tasks, limit=limit, batch_size=batch_size, include_path=include_path
        )
    figures = measure(loaded, reference)
    other = measure(second, reference) if second else None
    kernels = kernels_of(loaded.model, 1, figures.context or 1)
    return EvaluateResult(model, figures, kernels, compare, other, scores, alike)


def _corpus(source: Source, data: str | None) -> TextCorpus | ImageCorpus:
    spec = default_spec(source.task) if data is None else data
    if spec is None:
        raise PadstError(f"a model of task {source.task} needs --data: what should it be measured on?")
    labels = getattr(source.config, "label2id", None)
    return load_corpus(spec, split="heldout", modality=source.modality, label2id=labels, leave_out=is_no_data)


def _alike(one: Loaded, other: Loaded, metric: str) -> bool:
    """Whether two models read the data alike and give as many outputs, so that one can be the other's reference.

    Raises `PadstError` where their tasks differ, and where they are not alike and the metric is a distance.
    """
    names = f"'{one.source.name}' and '{other.source.name}'"
    if one.source.task != other.source.task:
        raise PadstError(
            f"{names} are models of task {one.source.task} and {other.source.task}; --compare takes one of the same"
        )
    alike = _inputs_and_outputs(one) == _inputs_and_outputs(other)
    if not alike and (one.source.task == "encoder" or metric == "kl_to_dense"):
        raise PadstError(
            f"{names} differ in what they read or give (tokens, image size, positions, classes), so the distance "
            "between them cannot be measured; name the dense model with --compare"
        )
    return alike


def _inputs_and_outputs(loaded: Loaded) -> tuple[Any, ...]:
    """What two models must have in common for their outputs to be compared."""
    config = loaded.source.config
    if loaded.source.modality == "image":
        classes = config.num_labels if loaded.source.task == "image-classification" else None
        return (classes, getattr(config, "image_size", None))
    ids = None if loaded.processor is None else list(loaded.processor(_PROBE)["input_ids"])
    return (vocabulary_size(loaded.model), max_positions(loaded.model), ids)


def _reference(loaded: Loaded, second: Loaded | None) -> torch.nn.Module | None:
    """The dense model to diverge from: the one compared with, or for a bare encoder the base model of its recipe."""
    if second is not None and second.source.padst is None:
        return second.model
    if loaded.source.task != "encoder":
        return None
    if loaded.source.padst is None:
        return loaded.model
    recipe = loaded.source.folder / RECIPE
    base = load_recipe(str(recipe)).model if recipe.is_file() else None
    if base is None:
        raise PadstError(f"'{loaded.source.name}' has no head; name its dense base model with --compare")
    return load_dense(open_source(base), dtype=torch.float32, device=loaded.device)
