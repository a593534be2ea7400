"""What training minimises: the task's own loss, mixed with the distance from the dense teacher.

An objective is called as `objective(student, batch) -> (loss, terms)`: a scalar to differentiate and the detached parts
it is made of, by name. Every batch weighs its items equally, so the mean over processes and accumulated parts is the
mean of the whole batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padst_cli.errors import PadstError
from padst_cli.recipe import TrainingRecipe
from padst_cli.training.augment import augmented
from padst_cli.training.seeds import seeded

Batch = dict[str, Tensor]
IGNORED = -100
TEACHER_LOGITS: Final = "teacher_logits"
"""The key of a batch under which the teacher's logits may come along, remembered from before."""
_MASK_SHARE = 0.15
_NO_INPUTS: Final = frozenset({"labels", TEACHER_LOGITS})


class Objective(ABC):
    """A task's loss and the distillation that goes with it; `teacher` None leaves the task's loss alone."""

    flags: ClassVar[Mapping[str, bool]] = MappingProxyType({})
    """What both models are called with besides the batch."""
    asks_logits: ClassVar[bool] = False
    """Whether all that is asked of the teacher are its logits of the items as they lie in the data."""

    def __init__(self, recipe: TrainingRecipe, teacher: nn.Module | None = None) -> None:
        self.recipe = recipe
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)

    def to(self, device: torch.device) -> None:
        """Move the teacher to the device that trains."""
        if self.teacher is not None:
            self.teacher.to(device)

    def prepare(self, batch: Batch, seed: int, step: int, first_row: int) -> Batch:
        """Draw what the task draws at random for these rows, which start at `first_row` of the step's global batch."""
        del seed, step, first_row
        return batch

    def __call__(self, student: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one (part of a) batch and its terms; a batch may bring `TEACHER_LOGITS` along."""
        inputs = self._inputs(batch)
        asked = self._asked(student)
        output = student(**inputs, **asked)
        task = self.task_loss(output, batch)
        terms: dict[str, Tensor] = {}
        if task is not None:
            terms["task"] = task
        if TEACHER_LOGITS in batch:
            terms["distill"] = self.distill_loss(output, SimpleNamespace(logits=batch[TEACHER_LOGITS]))
        elif self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(**inputs, **asked)
            terms["distill"] = self.distill_loss(output, target)
        loss = self._mix(terms)
        if "output_hidden_states" in asked:
            terms["hidden"] = hidden_distance(output, target)
            loss = loss + self.recipe.distill_hidden * terms["hidden"]
        if "output_attentions" in asked:
            terms["attention"] = attention_distance(output, target)
            loss = loss + self.recipe.distill_attention * terms["attention"]
        return loss, {key: value.detach() for key, value in terms.items()}

    @property
    def answers_alike(self) -> bool:
        """Whether the teacher's part in the loss is the same whenever an item comes, and is its logits alone."""
        changing = self.recipe.augment or self.recipe.distill_hidden or self.recipe.distill_attention
        return self.asks_logits and self.teacher is not None and not changing

    @torch.no_grad()
    def ask(self, batch: Batch) -> Tensor:
        """The teacher's logits of a batch, `[batch, ..., classes]`; only where `answers_alike`."""
        assert self.teacher is not None
        logits: Tensor = self.teacher(**self._inputs(batch)).logits
        return logits

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """What both models are called with."""
        return {**{key: value for key, value in batch.items() if key not in _NO_INPUTS}, **self.flags}

    def _asked(self, student: nn.Module) -> dict[str, bool]:
        """What both models are called with to hand out hidden states and attention maps, as far as these count."""
        hidden = self.teacher is not None and bool(self.recipe.distill_hidden)
        return {**({"output_hidden_states": True} if hidden else {}), **self._attentive(student)}

    def _attentive(self, student: nn.Module) -> dict[str, bool]:
        """What both models are called with to hand out attention maps, nothing where these do not count.

        Fused kernels never hold the maps: both models are turned to plain attention. Raises `PadstError` where a model
        cannot be.
        """
        if self.teacher is None or not self.recipe.distill_attention:
            return {}
        for model in (student, self.teacher):
            if getattr(model.config, "_attn_implementation", "eager") != "eager":
                try:
                    model.set_attn_implementation("eager")  # type: ignore[operator]
                except (AttributeError, ValueError) as error:
                    raise PadstError(
                        f"training.distill_attention needs eager attention, which {type(model).__name__} does not "
                        f"take ({error}); leave it out"
                    ) from None
        return {"output_attentions": True}

    def _mix(self, terms: dict[str, Tensor]) -> Tensor:
        if len(terms) == 1:
            return next(iter(terms.values()))
        share = self.recipe.distill_weight
        return (1.0 - share) * terms["task"] + share * terms["distill"]

    @abstractmethod
    def task_loss(self, output: Any, batch: Batch) -> Tensor | None:
        """The task's own loss of the student's output, None where the batch has no labels for it."""

    def distill_loss(self, output: Any, target: Any) -> Tensor:
        """T^2 KL(teacher || student) of the logits at temperature T, mean over positions (Hinton et al., 2015)."""
        temperature = self.recipe.distill_temperature
        student = F.log_softmax(_full(output.logits) / temperature, dim=-1).flatten(0, -2)
        teacher = F.log_softmax(_full(target.logits) / temperature, dim=-1).flatten(0, -2)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


class CausalLM(Objective):
    """Cross-entropy of the next token."""

    # Models keep the keys and values of a whole batch for a generation that never comes unless told not to.
    flags = MappingProxyType({"use_cache": False})
    asks_logits = True

    def task_loss(self, output: Any, batch: Batch) -> Tensor:
        """Mean over all positions but the last, which has no next token."""
        logits = _full(output.logits[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


class MaskedLM(Objective):
    """Cross-entropy of masked tokens: 15 % of every row, of which 80 % read [MASK], 10 % a random token (Devlin et al.,
    2019).

    Every row has equally many, so that rows weigh the same however a batch is split. The `frame` is how many tokens at
    the beginning and the end of a row are special ones ([CLS], [SEP]), which are never masked.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        teacher: nn.Module | None,
        mask_id: int,
        vocabulary: int,
        frame: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(recipe, teacher)
        self.mask_id = mask_id
        self.vocabulary = vocabulary
        self.frame = frame

    def prepare(self, batch: Batch, seed: int, step: int, first_row: int) -> Batch:
        """Mask the rows: a pure function of (seed, step, row), whatever process the row falls to."""
        ids = batch["input_ids"].clone()
        labels = torch.full_like(ids, IGNORED)
        before, after = self.frame
        length = ids.shape[1] - before - after
        count = max(1, round(_MASK_SHARE * length))
        for row in range(ids.shape[0]):
            generator = seeded(seed, step, first_row + row)
            chosen = before + torch.randperm(length, generator=generator)[:count]
            labels[row, chosen] = ids[row, chosen]
            kind = torch.rand(count, generator=generator)
            noise = torch.randint(self.vocabulary, (count,), generator=generator)
            read = torch.where(kind < 0.8, self.mask_id, torch.where(kind < 0.9, noise, ids[row, chosen]))
            ids[row, chosen] = read
        return {**batch, "input_ids": ids, "labels": labels}

    def task_loss(self, output: Any, batch: Batch) -> Tensor:
        """Mean over the masked positions."""
        return F.cross_entropy(_full(output.logits).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


class ImageClassification(Objective):
    """Cross-entropy of the class where the data has labels; without labels the teacher alone teaches."""

    asks_logits = True

    def prepare(self, batch: Batch, seed: int, step: int, first_row: int) -> Batch:
        """Crop and mirror the images where the recipe asks for it."""
        if not self.recipe.augment:
            return batch
        return {**batch, "pixel_values": augmented(batch["pixel_values"], seed, step, first_row)}

    def task_loss(self, output: Any, batch: Batch) -> Tensor | None:
        """Mean over the images."""
        if "labels" not in batch:
            if self.teacher is None:
                raise PadstError("the images have no labels and distillation is off: there is nothing to learn from")
            return None
        return F.cross_entropy(_full(output.logits), batch["labels"])


class Encoder(Objective):
    """A bare encoder has no task: it keeps its teacher's hidden states."""

    def __init__(self, recipe: TrainingRecipe, teacher: nn.Module | None) -> None:
        if teacher is None:
            raise PadstError("a bare encoder has no loss of its own: leave distillation on")
        super().__init__(recipe, teacher)

    def __call__(self, student: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch: half from the last hidden state, half from the mean over the layers."""
        assert self.teacher is not None
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        attentive = self._attentive(student)
        output = student(**inputs, output_hidden_states=True, **attentive)
        with torch.no_grad():
            target = self.teacher(**inputs, output_hidden_states=True, **attentive)
        last = relative_error(output.last_hidden_state, target.last_hidden_state)
        layers = hidden_distance(output, target)
        loss, terms = 0.5 * (last + layers), {"last_hidden": last.detach(), "hidden": layers.detach()}
        if attentive:
            attention = attention_distance(output, target)
            loss, terms = loss + self.recipe.distill_attention * attention, {**terms, "attention": attention.detach()}
        return loss, terms

    def task_loss(self, output: Any, batch: Batch) -> None:
        """None: without a head there is no task."""
        del output, batch


def _full(x: Tensor) -> Tensor:
    """In float32 or better: autocast hands out logits in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over positions of |ours - theirs|^2 / |theirs|^2, a scalar; tensors `[..., hidden]`."""
    ours, theirs = _full(ours), _full(theirs)
    difference = (ours - theirs).square().sum(-1)
    return (difference / theirs.square().sum(-1).clamp_min(1e-12)).mean()


def hidden_distance(output: Any, target: Any) -> Tensor:
    """Mean of `relative_error` over the layers' hidden states `[batch, positions, hidden]`, a scalar.

    Raises `PadstError` where a model hands out none.
    """
    # The first hidden state is the embedding, before any sparse layer.
    ours, theirs = ((getattr(one, "hidden_states", None) or ())[1:] for one in (output, target))
    if not ours or any(state is None for state in (*ours, *theirs)):
        raise PadstError("this model hands out no hidden states; leave training.distill_hidden out")
    return torch.stack([relative_error(*pair) for pair in zip(ours, theirs, strict=True)]).mean()


def attention_distance(output: Any, target: Any) -> Tensor:
    """Mean over layers, heads and queries of the squared distance between two rows of attention, a scalar in [0, 2].

    Maps are `[batch, heads, queries, keys]`, one a layer (TinyBERT, Jiao et al., 2020, equation 7, but for the mean
    over keys, of which a causal row has few). Raises `PadstError` where a model hands out none.
    """
    ours, theirs = getattr(output, "attentions", None) or (), getattr(target, "attentions", None) or ()
    if not ours or any(map_ is None for map_ in (*ours, *theirs)):
        raise PadstError("this model hands out no attention maps; leave training.distill_attention out")
    pairs = zip(ours, theirs, strict=True)
    return torch.stack([(_full(one) - _full(other)).square().sum(-1).mean() for one, other in pairs]).mean()


def build_objective(
    task: str,
    recipe: TrainingRecipe,
    teacher: nn.Module | None,
    *,
    mask_id: int | None = None,
    vocabulary: int | None = None,
    frame: tuple[int, int] = (0, 0),
) -> Objective:
    """The objective of a task ("causal-lm", "masked-lm", "image-classification", "encoder").

    `teacher` is used where `recipe.distill` is on. `mask_id` and `vocabulary` (the tokenizer's mask token and the
    number of tokens) are needed for "masked-lm", which leaves the `frame` of a window alone. Raises `PadstError` where
    there is nothing to learn from.
    """
    teacher = teacher if recipe.distill else None
    if task == "causal-lm":
        return CausalLM(recipe, teacher)
    if task == "image-classification":
        return ImageClassification(recipe, teacher)
    if task == "encoder":
        return Encoder(recipe, teacher)
    if task == "masked-lm":
        if mask_id is None or vocabulary is None:
            raise PadstError("this tokenizer has no mask token, so a masked language model cannot be trained with it")
        return MaskedLM(recipe, teacher, mask_id, vocabulary, frame)
    raise ValueError(f"unknown task '{task}'")
