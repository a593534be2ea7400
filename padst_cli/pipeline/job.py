"""Everything a `sparsify` run needs, opened and checked before the first byte is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from padst_cli.checkpoint.output import is_no_data
from padst_cli.checkpoint.reader import Source, load_processor, open_source
from padst_cli.data.corpus import ImageCorpus, TextCorpus, default_spec, load_corpus
from padst_cli.data.items import ImageItems, TokenWindows, collate, step_indices, token_frame, vocabulary_size
from padst_cli.errors import PadstError
from padst_cli.evaluation.text import max_positions
from padst_cli.pipeline.planning import plan_for
from padst_cli.plan import Plan
from padst_cli.recipe import FILLED_IN, LEARNING_RATES, Recipe, TrainingRecipe
from padst_cli.training.objective import Objective, build_objective

_SPLIT_BY_ITSELF = ("python-source", "hf:")


@dataclass(frozen=True)
class Job:
    """An opened run: checkpoint, plan, training items and held-out corpus; `recipe` has every default filled in."""

    recipe: Recipe
    source: Source
    processor: Any
    plan: Plan
    items: TokenWindows | ImageItems
    train_corpus: TextCorpus | ImageCorpus
    heldout: TextCorpus | ImageCorpus

    def calibration_batches(self, device: torch.device) -> list[dict[str, Tensor]]:
        """The batches the start is computed from, on `device`: the first of the training order."""
        calibration = self.recipe.calibration
        samples = min(calibration.samples, len(self.items))
        indices = step_indices(len(self.items), samples, self.recipe.seed, 0)
        batches = [
            collate([self.items[i] for i in indices[first : first + calibration.batch_size]])
            for first in range(0, samples, calibration.batch_size)
        ]
        inputs = ("input_ids", "pixel_values", "attention_mask")
        return [{key: batch[key].to(device) for key in inputs if key in batch} for batch in batches]

    @property
    def has_control(self) -> bool:
        """Whether the dense model is fine-tuned, too: an encoder without a head has no loss of its own for that."""
        return self.recipe.dense_control and self.source.task != "encoder"

    @property
    def _vocabulary(self) -> int:
        """How many tokens both the tokenizer and the model know."""
        return min(len(self.processor), vocabulary_size(self.source) or len(self.processor))

    def objective(self, teacher: nn.Module | None) -> Objective:
        """What training minimises; without `teacher` the task's own loss."""
        tokenizer = self.processor if self.source.modality == "text" else None
        before, after = ([], []) if tokenizer is None else token_frame(tokenizer)
        return build_objective(
            self.source.task,
            self.recipe.training,
            teacher,
            mask_id=getattr(tokenizer, "mask_token_id", None),
            vocabulary=None if tokenizer is None else self._vocabulary,
            frame=(len(before), len(after)),
        )


def open_job(model: str, recipe: Recipe) -> Job:
    """Open and check all inputs of a run; raises `PadstError` before anything is written.

    Fills in the recipe: WikiText-103 for causal LMs without `--data`; the held-out split of the same source where it
    has one and `--eval-data` is not given; the learning rate of the task.
    """
    source = open_source(model)
    _check_training(source, recipe.training)
    plan = plan_for(source, recipe)
    recipe = _filled(source, recipe)
    assert recipe.data is not None
    assert recipe.eval_data is not None
    processor = load_processor(source)
    if processor is None:
        kind = "tokenizer" if source.modality == "text" else "image processor"
        raise PadstError(f"checkpoint '{source.name}' has no {kind}; put its files into the folder")
    labels = getattr(source.config, "label2id", None)
    load = partial(load_corpus, modality=source.modality, label2id=labels, leave_out=is_no_data)
    train, heldout = load(recipe.data, split="train"), load(recipe.eval_data, split="heldout")
    return Job(recipe, source, processor, plan, _items(source, recipe, processor, train), train, heldout)


def is_main_process() -> bool:
    """Whether this process is the one that writes and reports."""
    return bool(PartialState().is_main_process)


def _check_training(source: Source, training: TrainingRecipe) -> None:
    """Raise `PadstError` for what a model of this task could only ignore, or could not learn from."""
    if training.augment and source.modality != "image":
        raise PadstError(f"--augment crops images, and '{source.name}' reads {source.modality}: leave it out")
    if source.task == "encoder" and training.distill_hidden:
        raise PadstError(
            f"--distill-hidden: '{source.name}' has no head and is trained by its hidden states as it is; leave it out"
        )
    if source.task == "encoder" and not training.distill:
        raise PadstError(f"'{source.name}' has no head, and so no loss of its own: leave distillation on")


def _filled(source: Source, recipe: Recipe) -> Recipe:
    """The recipe with what depends on the model: its name, data, their held-out split, the learning rate."""
    data = default_spec(source.task) if recipe.data is None else recipe.data
    if data is None:
        raise PadstError(
            f"a model of task {source.task} needs --data: a text file, folder or glob, .jsonl, a folder of images, "
            "hf:ORG/NAME or python-source"
        )
    heldout = recipe.eval_data
    if heldout is None:
        if not data.startswith(_SPLIT_BY_ITSELF):
            raise PadstError(f"--data '{data}' has no held-out split of its own; name held-out data with --eval-data")
        heldout = data
    rate = recipe.training.learning_rate or LEARNING_RATES[source.task]
    filled = dict(zip(FILLED_IN, (source.name, data, heldout, rate), strict=True))
    return recipe.updated(filled)


def _items(
    source: Source, recipe: Recipe, processor: Any, corpus: TextCorpus | ImageCorpus
) -> TokenWindows | ImageItems:
    if isinstance(corpus, ImageCorpus):
        return ImageItems(corpus, processor)
    length = recipe.training.max_seq_length
    # A tokenizer may know less of a language model than its configuration, of an encoder it knows more.
    positions = max_positions(source, None if source.task == "causal-lm" else processor)
    if positions is not None and length > positions:
        raise PadstError(f"--max-seq-length {length} is longer than the {positions} positions of '{source.name}'")
    return TokenWindows.from_corpus(corpus, processor, length, vocabulary_size(source))
