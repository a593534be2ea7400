"""The grid: which runs there are, in which order, and what each changes in the recipe."""

from __future__ import annotations

from typing import Any

import pytest

from padst_cli.assets import EMBEDDED_MODEL
from padst_cli.errors import PadstError
from padst_cli.study import StudyRecipe, expand

RAW: dict[str, Any] = {
    "models": [
        {"model": "org/one", "data": "a.txt", "eval_data": "b.txt", "recipe": {"training": {"batch_size": 4}}},
        {"model": "embedded", "name": "own", "sparsities": [0.5]},
    ],
    "structures": {"diag": {"band": 16}, "block": {}},
    "sparsities": [0.8, 0.9],
    "seeds": [0, 7],
    "steps": 12,
    "methods": {"static": {"permutation.kind": "assignment", "support": {"method": "static"}}},
    "recipe": {"training": {"batch_size": 8, "distill": False}, "eval_samples": 3},
}


def grid(**changes: Any) -> StudyRecipe:
    return StudyRecipe.from_dict({**RAW, **changes})


def test_every_place_of_the_grid_is_there_once() -> None:
    cells = expand(grid())
    # (2 controls + 2 structures x (6 permutations + 1 extra method)) x 3 (model, sparsity) pairs x 2 seeds
    assert len(cells) == (2 + 2 * 7) * 3 * 2 == len({cell.name for cell in cells})
    assert [cell.seed for cell in cells] == [0] * 48 + [7] * 48, "a whole seed before the next"
    first = [(cell.structure, cell.method) for cell in cells[:16]]
    assert first[:3] == [("unstructured", "rigl"), ("unstructured", "set"), ("diag", "none")]
    assert set(first[2:]) == {
        (structure, method)
        for structure in ("diag", "block")
        for method in ("none", "random", "assignment", "learned", "soft", "frozen", "static")
    }


def cell_of(name: str, study: StudyRecipe | None = None) -> Any:
    return next(cell for cell in expand(study or grid()) if cell.name == name)


def test_a_cell_holds_the_whole_recipe() -> None:
    recipe = cell_of("one-diag-learned-0.9-seed7").recipe
    assert (recipe.model, recipe.data, recipe.eval_data) == ("org/one", "a.txt", "b.txt")
    assert (recipe.structure, recipe.band, recipe.sparsity, recipe.seed) == ("diag", 16, 0.9, 7)
    assert (recipe.training.steps, recipe.training.batch_size, recipe.training.distill) == (12, 4, False)
    assert (recipe.permutation.kind, recipe.permutation.frozen, recipe.dense_control) == ("learned", False, False)
    own = cell_of("own-block-none-0.5-seed0").recipe
    assert (own.model, own.training.batch_size, own.band) == (str(EMBEDDED_MODEL), 8, 1)


@pytest.mark.parametrize(
    ("method", "kind", "frozen", "support"),
    [
        ("none", "none", False, "rigl"),
        ("random", "random", False, "rigl"),
        ("assignment", "assignment", False, "rigl"),
        ("learned", "learned", False, "rigl"),
        ("soft", "learned", False, "rigl"),
        ("frozen", "learned", True, "rigl"),
        ("static", "assignment", False, "static"),
    ],
)
def test_methods(method: str, kind: str, frozen: bool, support: str) -> None:
    recipe = cell_of(f"one-block-{method}-0.8-seed0").recipe
    assert (recipe.permutation.kind, recipe.permutation.frozen, recipe.support.method) == (kind, frozen, support)


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_controls(method: str) -> None:
    recipe = cell_of(f"one-unstructured-{method}-0.8-seed0").recipe
    assert (recipe.structure, recipe.permutation.kind, recipe.support.method) == ("unstructured", "none", method)


def test_the_dense_model_is_tuned_once_a_model_and_seed() -> None:
    carriers = [cell.name for cell in expand(grid()) if cell.recipe.dense_control]
    assert carriers == [f"{place}-seed{seed}" for seed in (0, 7) for place in (
        "one-unstructured-rigl-0.8", "own-unstructured-rigl-0.5",
    )]  # fmt: skip
    assert not any(cell.recipe.dense_control for cell in expand(grid(dense_control=False)))


def test_what_is_never_trained() -> None:
    methods = ["start", "magnitude", "wanda", "sparsegpt"]
    study = grid(structures={"nm": {}, "diag": {}}, one_shot=methods, recipe={"support": {"start_density": 0.9}})
    cells = [cell for cell in expand(study) if cell.method in methods and cell.seed == 7 and cell.model == "one"]
    places = {(cell.structure, cell.sparsity) for cell in cells}
    assert places == {(kind, at) for kind in ("unstructured", "nm") for at in (0.8, 0.9)} | {
        ("unstructured", 0.5), ("2:4", 0.5),
    }  # fmt: skip
    assert len({cell.name for cell in expand(study)}) == len(expand(study))
    assert len(cells) == 4 * len(places)
    for cell in cells:
        assert (cell.recipe.training.steps, cell.recipe.dense_control) == (0, False)
        assert cell.recipe.calibration.start == ("saliency" if cell.method == "start" else cell.method)
        assert cell.recipe.permutation.kind == ("learned" if cell.method == "start" else "none")
        assert cell.recipe.nm == ("2:4" if cell.structure == "2:4" else None)
    own = [cell for cell in expand(study) if cell.method == "wanda" and cell.seed == 7 and cell.model == "own"]
    assert [cell.structure for cell in own] == ["unstructured", "nm", "2:4"], "0.5 is this model's own sparsity"
    assert own[-1].name == "own-2of4-wanda-0.5-seed7"


def test_an_impossible_recipe_names_its_cell() -> None:
    with pytest.raises(PadstError, match=r"cell 'one-.*training\.step.*did you mean 'steps'"):
        expand(grid(recipe={"training": {"step": 3}}))
    with pytest.raises(PadstError, match=r"cell 'one-block-gated-0.8-seed0'.*dynadiag"):
        expand(grid(methods={"gated": {"support.method": "dynadiag"}}))


def test_two_cells_of_one_name_are_refused() -> None:
    with pytest.raises(PadstError, match=r"2 cells of the study are called 'one-.*0.666667.*must all differ"):
        expand(grid(sparsities=[0.6666666, 0.6666667]))
