"""The recipe: every choice of a run, complete and reproducible, from YAML or flags.

A recipe that `sparsify` writes beside its result holds every value, so that `--recipe DIR/recipe.yaml` repeats the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator

from padst_cli.document import Document, Strict, dotted, read_mapping
from padst_cli.errors import PadstError

StructureName = Literal["diag", "nm", "block", "unstructured"]
PermutationKind = Literal["learned", "assignment", "random", "none"]
Learner = Literal["refined", "soft", "projected", "straight-through"]
Side = Literal["auto", "both", "smaller", "input", "output"]
DstMethod = Literal["rigl", "set", "mest", "dynadiag", "static"]
StartMethod = Literal["saliency", "magnitude", "wanda", "sparsegpt"]

DEFAULT_TARGETS = "default"
"""The entry of `targets` that stands for the attention and MLP projections of all repeated blocks."""

STUDY_PREFIX: Final = "study-"
"""How the names of the shipped studies begin, which lie beside the recipes."""

DATA_ALLOCATIONS = ("owl", "error")
"""Allocations that are decided by what calibration sees, not by shapes."""

ALLOCATIONS = ("uniform", "erk", *DATA_ALLOCATIONS)
"""Allocations by name; any other is a table."""

AllocationTable = tuple[tuple[str, float], ...]
"""Layer patterns with the sparsity of their layers; the first that matches a layer counts."""


LEARNING_RATES: Final[Mapping[str, float]] = {
    "causal-lm": 3e-4,
    "masked-lm": 3e-4,
    "image-classification": 1e-4,
    "encoder": 3e-4,
}
"""Peak learning rate by task where a recipe names none: low enough that a dense model fine-tuned as long loses little.

Measured on held-out parts of training data with two small causal LMs and DeiT-Tiny; the rates of encoders, with a head
or without, are carried over from causal LMs. Sparse language models recover faster at 1e-3, which costs a dense one
on text that it knows.
"""

_NM_TOLERANCE: Final = 0.01
"""How far a stated sparsity may lie from that of a stated N:M."""

FILLED_IN: Final = ("model", "data", "eval_data", "training.learning_rate")
"""Keys, dotted, that may be None in a recipe until its run has opened the model."""


class PermutationRecipe(Strict):
    """How each layer's permutation is found, and what its learner needs.

    "assignment" keeps the order that an assignment of saliency found once. "learned" begins there, and is first refined
    on the calibration data, together with the support (`calibration.refine_rounds`). `learner` says what comes then:
    "refined" leaves it at that. "soft" trains a doubly stochastic matrix, "projected" a dense weight behind the
    support, from which order and support are chosen anew at every support update; an order must then keep more of the
    saliency than the one before by `margin`, a share of it. "straight-through" trains a matrix as "soft" does, in
    groups of at most `group` neighbours, but computes with the permutation nearest to it, renewed every `resolve_every`
    steps; of the schedule it takes `mixing`, `learning_rate` and `deadline`.

    `side` "auto" permutes the inputs and the outputs of diagonals and blocks, and the inputs of N:M, whose rows are N:M
    in any order. Matrices are then trained on the smaller side alone (on the inputs where they are shared); "both"
    trains two. "smaller" permutes no more than that side.

    `share` gives the layers that read the same input (query, key and value; gate and up) one input permutation.

    The rest is the schedule of "soft"; shares are fractions of all training steps. `mixing` is how much of the soft
    matrix starts spread evenly over its row; `delta` is the normalised penalty under which a layer hardens (0.22, after
    PA-DST); `penalty_weight` is the lambda that the l1-l2 penalty reaches, ramped up linearly until the `deadline`
    share, when whatever is still soft is hardened. No layer hardens before the `earliest` share, so that every
    permutation has had its chance to move.

    `frozen` is the control of training, for "soft" and "straight-through": the same matrices on the same schedule,
    never updated, so that they harden to where they began.
    """

    kind: PermutationKind = "learned"
    learner: Learner = "refined"
    side: Side = "auto"
    share: bool = False
    mixing: float = Field(default=0.3, ge=0.0, lt=1.0)
    delta: float = Field(default=0.22, gt=0.0, lt=1.0)
    penalty_weight: float = Field(default=0.2, ge=0.0)
    learning_rate: float = Field(default=0.05, gt=0.0)
    earliest: float = Field(default=0.05, ge=0.0, le=1.0)
    deadline: float = Field(default=0.3, gt=0.0, le=1.0)
    margin: float = Field(default=0.01, ge=0.0, lt=1.0)
    group: int = Field(default=256, ge=2)
    resolve_every: int = Field(default=1, ge=1)
    assignment_rounds: int = Field(default=8, ge=1)
    frozen: bool = False

    @property
    def is_soft(self) -> bool:
        """Whether permutations begin as matrices."""
        return self.kind == "learned" and self.learner in ("soft", "straight-through")

    @property
    def is_refined(self) -> bool:
        """Whether permutations are learned before training alone."""
        return self.kind == "learned" and self.learner == "refined"

    @property
    def lookup_group(self) -> int | None:
        """The largest group of the learner `straight-through`, None for the others."""
        return self.group if self.kind == "learned" and self.learner == "straight-through" else None

    @property
    def is_projected(self) -> bool:
        """Whether layers begin with a latent dense weight."""
        return self.kind == "learned" and self.learner == "projected"

    @model_validator(mode="after")
    def _freezes_matrices(self) -> Self:
        if self.frozen and self.kind != "learned":
            raise ValueError(f"frozen is a control of kind 'learned'; permutations of kind '{self.kind}' never move")
        if self.frozen and not self.is_soft:
            raise ValueError(f"frozen holds a learned matrix still; learner '{self.learner}' has none: name 'soft'")
        return self

    @model_validator(mode="after")
    def _shares_inputs(self) -> Self:
        if self.share and self.side == "output":
            raise ValueError("share gives layers one input permutation, and side 'output' permutes no inputs")
        return self


class SupportRecipe(Strict):
    """Dynamic sparse training: which units are dropped and grown, how many, how often and until when.

    `fraction` of the active units moves at the first update and decays with a cosine to zero at the share `until` of
    the run. With `permutation.learner` "projected" what moves follows from the latent weight, every `every` steps and
    whatever the method, until the permutations' `deadline`.

    `start_density` begins training at that density (1 is dense) and lets it fall along a cubic to the target, which it
    reaches at the share `density_until` of the run, in the steps that move the support; None starts at the target.
    """

    method: DstMethod = "rigl"
    every: int = Field(default=25, ge=1)
    fraction: float = Field(default=0.05, ge=0.0, le=1.0)
    until: float = Field(default=0.75, ge=0.0, le=1.0)
    mest_gamma: float = Field(default=1.0, ge=0.0)
    dynadiag_temperature: tuple[PositiveFloat, PositiveFloat] = (1.0, 0.05)
    start_density: float | None = Field(default=None, gt=0.0, le=1.0)
    density_until: float = Field(default=0.5, gt=0.0, lt=1.0)

    def narrowed_after(self, steps: int) -> int | None:
        """The step of a run, counted from 0, that brings the target density; None where the run begins with it."""
        return None if self.start_density is None else min(steps - 1, max(1, round(self.density_until * steps)))


class TrainingRecipe(Strict):
    """The fine-tuning phase. `batch_size` is the global batch of one optimizer step, over all processes.

    `accumulation` splits that batch into as many backward passes. `distill` mixes the loss with the divergence from the
    dense teacher's logits (and matches hidden states where the model has no head). `eval_every` 0 evaluates at the end
    only. `learning_rate` None is filled in from `LEARNING_RATES` once the task is known.

    `distill_hidden` weighs a further term, added to the rest: the relative squared distance of the student's hidden
    states from the teacher's, mean over layers and positions (after SquareHead, Kurtic et al., 2023, arXiv 2310.06927);
    a model without a head is trained by that distance alone, and takes no weight of it. `distill_attention` weighs
    another: the squared distance of their attention maps (after TinyBERT, Jiao et al., 2020). Both models then compute
    attention without a fused kernel.

    `augment` crops and mirrors images at random (padst_cli/training/augment.py); text has nothing to crop.

    `average` is the share of the steps, the last ones, whose weights are averaged into the result; 0 takes those of the
    last step. Supports and permutations must have come to rest by then.
    """

    steps: int = Field(default=1000, ge=0)
    batch_size: int = Field(default=16, ge=1)
    accumulation: int = Field(default=1, ge=1)
    max_seq_length: int = Field(default=256, ge=2)
    learning_rate: float | None = Field(default=None, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    warmup: float = Field(default=0.05, ge=0.0, le=1.0)
    clip_norm: float = Field(default=1.0, gt=0.0)
    distill: bool = True
    distill_weight: float = Field(default=0.5, ge=0.0, le=1.0)
    distill_temperature: float = Field(default=1.0, gt=0.0)
    distill_hidden: float = Field(default=0.0, ge=0.0)
    distill_attention: float = Field(default=0.0, ge=0.0)
    augment: bool = False
    average: float = Field(default=0.0, ge=0.0, lt=1.0)
    log_every: int = Field(default=10, ge=1)
    eval_every: int = Field(default=0, ge=0)
    save_every: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        for term in ("distill_hidden", "distill_attention"):
            if getattr(self, term) and not self.distill:
                raise ValueError(f"{term} compares with the dense model: it needs distill")
        return self


class CalibrationRecipe(Strict):
    """The start from the pretrained weights: how much data is looked at, and whether survivors are refitted.

    `start` "saliency" is padst's own: permutation and support by saliency, then the refit. The others are the one-shot
    baselines that it is held against, each by its own rule, in the layer's own order and without a refit: "magnitude"
    serves every structure, "wanda" and "sparsegpt" choose within rows and serve N:M and unstructured.

    The saliency of row i counts E[g_i^2] to the power `sensitivity`, g_i the gradient of the model's prediction by
    output i; 0 lets all rows count alike.

    `refine_rounds` bounds the rounds in which order and support are chosen anew for the loss that the refit leaves
    (`padst_cli/initialise/refine.py`); 0 keeps the choice by saliency. A very wide layer ends its rounds earlier, at a
    fixed amount of work. Permutations of kind "random" stay as drawn.
    """

    samples: int = Field(default=64, ge=1)
    batch_size: int = Field(default=8, ge=1)
    refit: bool = True
    refine_rounds: int = Field(default=8, ge=0)
    sensitivity: float = Field(default=0.5, ge=0.0, le=1.0)
    damping: float = Field(default=0.01, gt=0.0)
    start: StartMethod = "saliency"


class Recipe(Document):
    """One whole run of `padst sparsify`.

    `allocation` is one of `ALLOCATIONS` or a table. A file of `pattern: sparsity` may be named in its place and is read
    at once: the recipe holds what was in it.
    """

    model: str | None = None
    structure: StructureName = "diag"
    sparsity: float = 0.9
    data: str | None = None
    eval_data: str | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    block_size: Literal[16, 32, 64] = 16
    block_rows: Literal["auto", "even", "free"] = "auto"
    nm: str | None = None
    band: int = Field(default=1, ge=1)
    allocation: str | AllocationTable = "uniform"
    dense_control: bool = False
    eval_samples: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    permutation: PermutationRecipe = PermutationRecipe()
    support: SupportRecipe = SupportRecipe()
    training: TrainingRecipe = TrainingRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()

    @field_validator("sparsity")
    @classmethod
    def _open_interval(cls, value: float) -> float:
        if not 0.0 < value < 1.0:
            raise ValueError(f"sparsity must lie between 0 and 1, both excluded, not {value}")
        return value

    @field_validator("allocation", mode="before")
    @classmethod
    def _allocation_form(cls, value: Any) -> Any:
        if isinstance(value, str) and value in ALLOCATIONS:
            return value
        table = _allocation_table(_read_allocation(value) if isinstance(value, str) else value)
        if not table:
            raise ValueError(
                f"allocation {value!r} is no table of layer patterns with sparsities between 0 and 1, both excluded"
            )
        return table

    @field_validator("nm", mode="before")
    @classmethod
    def _nm_quoted(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError('nm must stand in quotes, for example "2:4", or YAML reads a number in base sixty')
        return value

    @field_validator("nm")
    @classmethod
    def _nm_form(cls, value: str | None) -> str | None:
        if value is not None:
            parse_nm(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _nm_says_sparsity(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("nm"), str) and "sparsity" not in raw:
            return {**raw, "sparsity": nm_sparsity(raw["nm"])}
        return raw

    @model_validator(mode="after")
    def _nm_agrees(self) -> Self:
        if self.nm is None:
            return self
        if self.structure != "nm":
            raise ValueError(
                f"nm {self.nm} belongs to structure 'nm', not to '{self.structure}': take nm out of the recipe file or "
                "the flags, or choose structure 'nm'"
            )
        given = nm_sparsity(self.nm)
        if abs(given - self.sparsity) > _NM_TOLERANCE:
            raise ValueError(
                f"nm {self.nm} is a sparsity of {given:.4g}, not {self.sparsity:.4g}: leave one of them out"
            )
        if self.sparsity == given:
            # Said by nm and not beside it, so that another nm laid over this one says it anew.
            self.model_fields_set.discard("sparsity")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.support.method == "dynadiag" and self.structure != "diag":
            raise ValueError("dst method 'dynadiag' learns scores of diagonals and needs structure 'diag'")
        if self.permutation.is_projected and self.support.method == "dynadiag":
            raise ValueError("learner 'projected' and dst method 'dynadiag' both keep latent values: choose one")
        return self

    @model_validator(mode="after")
    def _density_falls(self) -> Self:
        start, density = self.support.start_density, round(1.0 - self.sparsity, 9)
        if start is None:
            return self
        if start <= density:
            raise ValueError(f"start_density {start} is not above the target density {density}; leave it out")
        if not self.training.steps:
            raise ValueError("start_density falls to the target in training: it needs training.steps")
        chooser = "learner 'projected'" if self.permutation.is_projected else f"dst method '{self.support.method}'"
        if self.permutation.is_projected or self.support.method == "dynadiag":
            raise ValueError(f"start_density needs a support that is dropped from; {chooser} chooses it anew each time")
        return self

    @model_validator(mode="after")
    def _averages_at_rest(self) -> Self:
        begin = round(1.0 - self.training.average, 9)
        rest = {"support.until": self.support.until if self.support.method != "static" else 0.0}
        late = self.permutation.is_soft or self.permutation.is_projected
        rest["permutation.deadline"] = self.permutation.deadline if late else 0.0
        rest["support.density_until"] = self.support.density_until if self.support.start_density is not None else 0.0
        moving = [key for key, share in rest.items() if share > begin]
        if self.training.average and moving:
            raise ValueError(
                f"training.average {self.training.average} begins at the share {begin} of the run, before {moving[0]} "
                f"{rest[moving[0]]}: weights are averaged only once supports and permutations rest"
            )
        return self

    @model_validator(mode="after")
    def _start_serves(self) -> Self:
        start, served = self.calibration.start, ("nm", "unstructured")
        if start in ("wanda", "sparsegpt") and self.structure not in served:
            raise ValueError(
                f"start '{start}' chooses weights within rows: it serves structures {' and '.join(served)}, not "
                f"'{self.structure}'"
            )
        if start != "saliency" and self.structure != "unstructured" and self.permutation.kind != "none":
            raise ValueError(f"start '{start}' keeps every layer in its own order: it needs permutation 'none'")
        return self

    def updated(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with dotted keys replaced, e.g. `{"training.steps": 10}`; raises `PadstError` as `from_dict` does."""
        raw = self.model_dump(exclude_unset=True)
        for key, value in changes.items():
            target = raw
            *parents, leaf = key.split(".")
            for parent in parents:
                target = target.setdefault(parent, {})
                if not isinstance(target, dict):
                    raise PadstError(f"recipe: {parent} is {target!r}; it should be a mapping of keys to values")
            target[leaf] = value
        return Recipe.from_dict(raw)

    def stated(self) -> dict[str, Any]:
        """The values that a file, a flag or the run itself stated, by dotted key; defaults are left out."""
        return dotted(self.model_dump(mode="json", exclude_unset=True))


def _read_allocation(path: str) -> list[tuple[Any, Any]]:
    if not Path(path).is_file():
        raise ValueError(f"allocation '{path}' is neither {', '.join(ALLOCATIONS)} nor a file")
    return list(read_mapping(path, (), "allocation file").items())


def _allocation_table(value: Any) -> AllocationTable | None:
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        table = tuple((str(pattern), float(sparsity)) for pattern, sparsity in pairs)
    except (TypeError, ValueError):
        return None
    return table if all(0.0 < sparsity < 1.0 for _, sparsity in table) else None


def parse_nm(text: str) -> tuple[int, int]:
    """`"2:4"` -> (2, 4); raises ValueError for anything but 1 <= N < M <= 32."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"'{text}' is not of the form N:M, for example 2:4")
    n, m = int(parts[0]), int(parts[1])
    if not 1 <= n < m <= 32:
        raise ValueError(f"N:M needs 1 <= N < M <= 32, not {text}")
    return n, m


def nm_sparsity(text: str) -> float:
    """The sparsity of `"2:4"`, 1 - N / M; raises ValueError as `parse_nm` does."""
    n, m = parse_nm(text)
    return 1.0 - n / m


def recipe_names() -> list[str]:
    """Names of the recipes of a run that come with padst."""
    return [name for name in _shipped() if not name.startswith(STUDY_PREFIX)]


def study_names() -> list[str]:
    """Names of the studies that come with padst: grids of runs, read by `padst_cli.study`."""
    return [name for name in _shipped() if name.startswith(STUDY_PREFIX)]


def _shipped() -> list[str]:
    folder = resources.files("padst_cli.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe file, or one that comes with padst by name; raises `PadstError` for bad YAML or bad keys."""
    raw = read_mapping(name_or_path, recipe_names(), "recipe")
    return Recipe.from_dict(raw, source=f"recipe '{name_or_path}'")
