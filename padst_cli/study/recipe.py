"""The study recipe: which models, structures, sparsities, methods and seeds are run against each other.

Everything about a single run is said in the words of the run recipe (`padst_cli.recipe`), under the keys `recipe`,
`structures`, `methods` and each model's own `recipe`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from padst_cli.document import Document, Strict, read_mapping
from padst_cli.errors import PadstError, nearest
from padst_cli.recipe import study_names

EMBEDDED: Final = "embedded"
"""The model that stands for the checkpoint that comes with padst."""

Structured = Literal["diag", "nm", "block"]
PermutationMethod = Literal["none", "random", "assignment", "learned", "soft", "frozen"]
Control = Literal["rigl", "set"]
OneShot = Literal["start", "magnitude", "wanda", "sparsegpt"]
Changes = Mapping[str, Any]
Sparsity = Annotated[float, Field(gt=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

PERMUTATIONS: Final[Mapping[str, Changes]] = {
    "none": {"permutation.kind": "none"},
    "random": {"permutation.kind": "random"},
    "assignment": {"permutation.kind": "assignment"},
    "learned": {"permutation.kind": "learned"},
    "soft": {"permutation.kind": "learned", "permutation.learner": "soft"},
    "frozen": {"permutation.kind": "learned", "permutation.learner": "soft", "permutation.frozen": True},
}
"""What each method changes in the run recipe: learned takes the recipe's learner, soft the paper's, and frozen is the
latter held at its start."""

CONTROLS: Final[Mapping[str, Changes]] = {
    method: {"structure": "unstructured", "permutation.kind": "none", "support.method": method}
    for method in ("rigl", "set")
}
"""The unstructured runs that a structure is held against."""

ONE_SHOT: Final[Mapping[str, Changes]] = {
    "start": {"permutation.kind": "learned", "permutation.learner": "refined", "support.start_density": None},
    **{
        method: {"permutation.kind": "none", "calibration.start": method, "support.start_density": None}
        for method in ("magnitude", "wanda", "sparsegpt")
    },
}
"""What is never trained: padst's own start, and the baselines of the literature."""


def expanded(path: str | None) -> str | None:
    """A path with its environment variables filled in."""
    return None if path is None else os.path.expandvars(path)


class StudyModel(Strict):
    """One model of the grid: a hub id, a folder, or `embedded`; its data as in the run recipe.

    `$NAME` in the three paths stands for an environment variable (`expanded`) and stays as it is written, so that what
    is shown of a study holds on other machines, too. `name` is how tables and folders call it (by default
    the last part of `model`); `sparsities` replace the study's; `recipe` is laid over the study's.
    """

    model: str
    name: str = ""
    data: str | None = None
    eval_data: str | None = None
    sparsities: tuple[Sparsity, ...] = ()
    recipe: Changes = Field(default={})

    @field_validator("model", "data", "eval_data")
    @classmethod
    def _can_be_expanded(cls, value: str | None) -> str | None:
        if missing := re.search(r"\$\{?(\w+)", expanded(value) or ""):
            raise ValueError(f"'{value}' needs the environment variable {missing.group(1)}, which is not set")
        return value

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("model"), str) and not raw.get("name"):
            last = raw["model"].rstrip("/").rpartition("/")[2]
            return raw | {"name": re.sub(r"[^\w.-]+", "-", last).lstrip(".")}
        return raw

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.-]+", value) or value.startswith("."):
            raise ValueError(f"name '{value}' becomes part of file names: letters, digits, dots and dashes only")
        return value


class StudyRecipe(Document):
    """A whole study.

    Run in every (model, sparsity, seed): the unstructured `controls`, and every structure with each of the
    `permutations` and of the extra `methods`. `structures` is a list, or a mapping from structure to what it changes in
    the run recipe; `methods` maps the name of an extra method to what it changes, dotted or nested. `steps` holds for
    all runs but those of the `one_shot` methods, which are never trained: they run on the unstructured control and,
    where it is among the structures, on N:M, and besides at sparsity 0.5 on the control and on 2:4, as in their papers.
    The dense model is fine-tuned as long, once a model and seed, unless `dense_control` is off. `jobs` runs
    go on at once. With `checkpoints` off the weights of finished runs are removed, their figures and reports kept.
    """

    models: tuple[StudyModel, ...] = Field(min_length=1)
    structures: dict[Structured, Changes] = Field(default={"diag": {}, "nm": {}, "block": {}})
    sparsities: tuple[Sparsity, ...] = Field(default=(0.8, 0.9, 0.95), min_length=1)
    permutations: tuple[PermutationMethod, ...] = ("none", "random", "assignment", "learned", "soft", "frozen")
    controls: tuple[Control, ...] = ("rigl", "set")
    methods: Mapping[str, Changes] = {}
    one_shot: tuple[OneShot, ...] = ()
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)
    steps: int = Field(default=600, ge=0)
    dense_control: bool = True
    checkpoints: bool = True
    jobs: int = Field(default=1, ge=1)
    recipe: Changes = Field(default={})

    @field_validator("structures", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return {str(each): {} for each in value} if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        lists: dict[str, list[Any]] = {
            "names of models": [each.name for each in self.models],
            "sparsities": list(self.sparsities),
            "seeds": list(self.seeds),
            "permutations": list(self.permutations),
            "controls": list(self.controls),
            "methods": [*self.methods, *PERMUTATIONS, *CONTROLS, *ONE_SHOT],
            "one-shot methods": list(self.one_shot),
        }
        for what, values in lists.items():
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"two of the {what} are {twice[0]}")
        if unfit := [name for name in self.methods if not re.fullmatch(r"[\w.-]+", name)]:
            raise ValueError(f"method '{unfit[0]}' becomes part of file names: letters, digits, dots and dashes only")
        if self.dense_control and not self.controls:
            raise ValueError("the dense model is fine-tuned beside a control; name one, or turn dense_control off")
        return self


def load_study(
    name_or_path: str | None,
    changes: Mapping[str, Any],
    dtype: str | None = None,
    methods: Sequence[str] | None = None,
) -> StudyRecipe:
    """A study file, or one that comes with padst by name, with `changes` (top-level keys) laid over it.

    Without either the changes are the study. `dtype` is that of every run, in place of what its recipe says. Of its
    extra methods only those named by `methods` stay, all where that is None and nothing where it is `["none"]`. Raises
    `PadstError` for bad YAML, bad keys and bad values.
    """
    raw = read_mapping(name_or_path, study_names(), "study") if name_or_path else {}
    source = f"study '{name_or_path}'" if name_or_path else "study"
    whole = {**raw, **changes}
    if dtype is not None:
        whole["recipe"] = {**(whole.get("recipe") or {}), "dtype": dtype}
    study = StudyRecipe.from_dict(whole, source=source)
    return study if methods is None else study.model_copy(update={"methods": _chosen(study.methods, methods)})


def _chosen(known: Mapping[str, Changes], names: Sequence[str]) -> Mapping[str, Changes]:
    """The methods of these names, in the study's order."""
    if list(names) == ["none"]:
        return {}
    for name in names:
        if name not in known:
            has = f"its extra methods are {', '.join(known)}" if known else "it has no extra methods"
            raise PadstError(f"--methods: the study has no method '{name}'{nearest(name, list(known))}; {has}")
    return {name: changes for name, changes in known.items() if name in names}
