"""The study recipe: strict keys, lists and mappings, environment variables, and the studies that come with padst."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from padst_cli.errors import PadstError
from padst_cli.recipe import load_recipe, recipe_names, study_names
from padst_cli.study import StudyRecipe, expand, load_study

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(path.stem for path in RECIPES.glob("study-*.yaml"))
ONE: dict[str, Any] = {"models": [{"model": "org/tiny"}]}


def test_shipped_studies_are_no_recipes_of_a_run() -> None:
    assert study_names() == SHIPPED
    assert {"study-small", "study-deit", "study-cpu", "study-full"} <= set(SHIPPED)
    assert not set(SHIPPED) & set(recipe_names())
    with pytest.raises(PadstError, match="no recipe file 'study-small'"):
        load_recipe("study-small")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_are_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADST_DATA", "/data")
    study = load_study(name, {})
    assert StudyRecipe.from_dict(yaml.safe_load(study.to_yaml())) == study
    assert set(study.structures) == {"diag", "nm", "block"}
    assert study.permutations == ("none", "random", "assignment", "learned", "soft", "frozen")
    assert study.controls == ("rigl", "set")
    assert len(study.seeds) >= 3
    assert study.steps >= 600
    cells = expand(study)
    assert len({cell.name for cell in cells}) == len(cells)
    learned = [cell.recipe.permutation for cell in cells if cell.method == "learned"]
    assert all(each.mixing > each.delta for each in learned), "or layers would harden before an entry has moved"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, ["models"]),
        ({"models": []}, ["models"]),
        ({**ONE, "sparsitys": [0.5]}, ["unknown key 'sparsitys'", "did you mean 'sparsities'?"]),
        ({"models": [{"model": "m", "eval_dat": "x"}]}, ["'models.0.eval_dat'", "did you mean 'eval_data'?", "recipe"]),
        ({"models": [{"model": "$NOWHERE_SET/m"}]}, ["environment variable NOWHERE_SET, which is not set"]),
        ({"models": [{"model": "a/m"}, {"model": "b/m"}]}, ["two of the names of models are m"]),
        ({"models": [{"model": "a/m", "name": "x/y"}]}, ["'x/y'", "letters"]),
        ({**ONE, "sparsities": [0.5, 1.0]}, ["sparsities.1"]),
        ({**ONE, "seeds": [0, 0]}, ["two of the seeds are 0"]),
        ({**ONE, "permutations": ["learnt"]}, ["permutations.0 is 'learnt'"]),
        ({**ONE, "structures": ["unstructured"]}, ["unstructured"]),
        ({**ONE, "methods": {"learned": {}}}, ["two of the methods are learned"]),
        ({**ONE, "controls": []}, ["turn dense_control off"]),
        ({**ONE, "jobs": 0}, ["jobs"]),
    ],
)
def test_bad_values_name_the_key(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PadstError) as caught:
        StudyRecipe.from_dict(raw, source="study 'mine.yaml'")
    sentence = str(caught.value)
    assert sentence.startswith("study 'mine.yaml': ")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"training": 1}, "training is 1; it should be a mapping"), ({"training": {1: 2}}, "'training.1'")],
)
def test_changes_of_the_wrong_shape_name_the_cell(changes: dict[str, Any], words: str) -> None:
    study = StudyRecipe.from_dict({**ONE, "methods": {"mine": changes}})
    with pytest.raises(PadstError, match=f"cell 'tiny-diag-mine-0.8-seed0' of the study: .*{words}"):
        expand(study)


def test_names_variables_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_DATA", "/data")
    raw = {"models": [{"model": "$SOME_DATA/tiny/", "data": "${SOME_DATA}/t.txt"}], "structures": ["nm", "diag"]}
    study = StudyRecipe.from_dict(raw)
    model = study.models[0]
    assert (model.name, model.model, model.data) == ("tiny", "$SOME_DATA/tiny/", "${SOME_DATA}/t.txt")
    recipe = expand(study)[0].recipe
    assert (recipe.model, recipe.data, recipe.eval_data) == ("/data/tiny/", "/data/t.txt", None)
    assert study.structures == {"nm": {}, "diag": {}}


def test_a_file_and_what_is_laid_over_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**ONE, "steps": 5, "seeds": [4]}), encoding="utf-8")
    study = load_study(str(path), {"steps": 7, "models": [{"model": "other"}]})
    assert (study.steps, study.seeds, study.models[0].model) == (7, (4,), "other")
    assert load_study(None, ONE).models[0].name == "tiny"
    with pytest.raises(PadstError, match=r"no study file 'study-smal'.*did you mean 'study-small'"):
        load_study("study-smal", {})


@pytest.mark.parametrize(
    ("model", "name"),
    [("a/my model+", "my-model-"), ("a/mö dél", "mö-dél"), ("./.hidden/", "hidden"), ("m.v-1_2", "m.v-1_2")],
)
def test_a_model_is_named_after_its_folder_in_what_file_names_take(model: str, name: str) -> None:
    assert load_study(None, {"models": [{"model": model}]}).models[0].name == name


def test_a_dtype_holds_for_every_run():
    study = load_study(None, {**ONE, "recipe": {"eval_samples": 5}}, "bfloat16")
    assert dict(study.recipe) == {"eval_samples": 5, "dtype": "bfloat16"}


def test_of_the_extra_methods_only_the_named_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADST_DATA", "/data")
    whole = load_study("study-small", {})
    assert list(whole.methods) == ["projected", "straight-through", "learned-one-side", "soft-one-side"]
    assert list(load_study("study-small", {}, methods=["straight-through"]).methods) == ["straight-through"]
    named = load_study("study-small", {}, methods=["straight-through", "projected"])
    assert list(named.methods) == ["projected", "straight-through"], "in the study's order"
    none = load_study("study-small", {}, methods=["none"])
    assert not none.methods
    assert len(expand(whole)) - len(expand(none)) == 4 * len(whole.structures) * len(whole.seeds)
    with pytest.raises(PadstError, match=r"no method 'projecte' \(did you mean 'projected'\?\); .* projected,"):
        load_study("study-small", {}, methods=["projecte"])
    with pytest.raises(PadstError, match="it has no extra methods"):
        load_study("study-deit", {}, methods=["projected"])
