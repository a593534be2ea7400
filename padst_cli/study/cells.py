"""The grid of a study: every cell is one run of `sparsify`, with a recipe and a folder of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from padst_cli.assets import EMBEDDED_MODEL
from padst_cli.document import dotted
from padst_cli.errors import PadstError
from padst_cli.recipe import Recipe
from padst_cli.study.recipe import (
    CONTROLS,
    EMBEDDED,
    ONE_SHOT,
    PERMUTATIONS,
    Changes,
    StudyModel,
    StudyRecipe,
    expanded,
)

UNSTRUCTURED: Final = "unstructured"
HALF: Final = 0.5
"""The sparsity of 2:4, at which one-shot methods are known."""
TWO_OF_FOUR: Final = "2:4"


@dataclass(frozen=True)
class Cell:
    """One run: where it stands in the grid, and its complete recipe."""

    model: str
    structure: str
    method: str
    sparsity: float
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Its folder: the place in the grid, spelled out."""
        structure = self.structure.replace(":", "of")
        return f"{self.model}-{structure}-{self.method}-{self.sparsity:g}-seed{self.seed}"


def expand(study: StudyRecipe) -> list[Cell]:
    """All cells, a whole seed before the next, so that a study that is stopped early has whole comparisons.

    Raises `PadstError` where the recipe of a cell cannot be: its key and the cell are named. So are two cells of one
    name, for the second would be taken for run as soon as the first is.
    """
    cells = [
        _cell(study, model, sparsity, seed, structure, method, changes)
        for seed in study.seeds
        for model in study.models
        for sparsity, structure, method, changes in _places(study, model)
    ]
    name, count = Counter(cell.name for cell in cells).most_common(1)[0] if cells else ("", 0)
    if count > 1:
        raise PadstError(
            f"{count} cells of the study are called '{name}': its models, methods, seeds, and sparsities to six digits "
            "must all differ"
        )
    return cells


def _places(study: StudyRecipe, model: StudyModel) -> Iterator[tuple[float, str, str, Changes]]:
    """(sparsity, structure, method, changes) of all that is run for one model and seed."""
    sparsities = model.sparsities or study.sparsities
    controls: list[tuple[str, dict[str, Any]]] = [(UNSTRUCTURED, {"structure": UNSTRUCTURED})]
    groups: list[tuple[str, dict[str, Any]]] = [
        (name, {"structure": name, **dotted(own)}) for name, own in study.structures.items() if name == "nm"
    ]
    halves = [(TWO_OF_FOUR, {"structure": "nm", "nm": TWO_OF_FOUR})]
    for sparsity in sparsities:
        for structure, method, changes in _methods(study):
            yield sparsity, structure, method, changes
        for (structure, own), method in product(controls + groups, study.one_shot):
            yield sparsity, structure, method, own | dict(ONE_SHOT[method])
    for (structure, own), method in product((controls if HALF not in sparsities else []) + halves, study.one_shot):
        yield HALF, structure, method, own | dict(ONE_SHOT[method])


def _methods(study: StudyRecipe) -> Iterator[tuple[str, str, Changes]]:
    """(structure, method, changes) of all that is trained at one sparsity, the controls first."""
    for control in study.controls:
        yield UNSTRUCTURED, control, CONTROLS[control]
    methods = {name: PERMUTATIONS[name] for name in study.permutations} | dict(study.methods)
    for (structure, own), (method, changes) in product(study.structures.items(), methods.items()):
        yield structure, method, {"structure": structure, **dotted(own), **dotted(changes)}


def _cell(
    study: StudyRecipe, model: StudyModel, sparsity: float, seed: int, structure: str, method: str, changes: Changes
) -> Cell:
    carries_control = (
        study.dense_control
        and (structure, method) == (UNSTRUCTURED, study.controls[0])
        and sparsity == (model.sparsities or study.sparsities)[0]
    )
    place: dict[str, Any] = {
        "model": str(EMBEDDED_MODEL) if model.model == EMBEDDED else expanded(model.model),
        "data": expanded(model.data),
        "eval_data": expanded(model.eval_data),
        "sparsity": sparsity,
        "seed": seed,
        "training.steps": 0 if method in ONE_SHOT else study.steps,
        "dense_control": carries_control,
    }
    values = {**dotted(study.recipe), **dotted(model.recipe), **changes, **place}
    name = Cell(model.name, structure, method, sparsity, seed, Recipe()).name
    try:
        recipe = Recipe().updated(values)
    except PadstError as error:
        raise PadstError(f"cell '{name}' of the study: {error}") from None
    return Cell(model.name, structure, method, sparsity, seed, recipe)
