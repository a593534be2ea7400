"""Recipes: strict keys, honest ranges, an exact round trip, and the ones that come with padst."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from padst_cli.checkpoint.reader import Task
from padst_cli.document import dotted
from padst_cli.errors import PadstError
from padst_cli.recipe import LEARNING_RATES, STUDY_PREFIX, Recipe, load_recipe, parse_nm, recipe_names

RECIPES = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith(STUDY_PREFIX))


def test_all_shipped_recipes_are_listed() -> None:
    assert recipe_names() == SHIPPED
    families = {"gpt2-diag90", "gpt2-block90", "gpt2-nm90", "llama-diag80", "vit-block80", "bert-block90", "quickstart"}
    assert families <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads_and_round_trips(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe == load_recipe(str(RECIPES / f"{name}.yaml"))
    assert name.partition("-")[2] in ("", f"{recipe.structure}{round(100 * recipe.sparsity)}")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_says_why(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    lines = text.splitlines()
    assert sum("#" in line for line in lines) * 3 >= len(lines), "comments say why"
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_lets_permutations_move(name: str) -> None:
    # A row of the start's soft matrix has the normalised penalty of its mixing, about: under delta it hardens unmoved.
    permutation = load_recipe(name).permutation
    assert permutation.kind != "learned" or permutation.mixing > permutation.delta


def test_defaults_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe().to_yaml(), encoding="utf-8")
    assert load_recipe(str(path)) == Recipe()
    assert list(yaml.safe_load(path.read_text())) == list(Recipe.model_fields), "a written recipe holds every key"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"sparsty": 0.5}, ["unknown key 'sparsty'", "did you mean 'sparsity'?"]),
        ({"training": {"step": 5}}, ["unknown key 'training.step'", "did you mean 'steps'?"]),
        ({"permutation": {"dleta": 0.1}}, ["'permutation.dleta'", "'delta'"]),
        ({"zzz": 1}, ["unknown key 'zzz'", "known here are", "structure"]),
        ({"sparsity": 0}, ["between 0 and 1"]),
        ({"sparsity": 1.0}, ["mine.yaml': sparsity must lie between 0 and 1, both excluded, not 1.0"]),
        ({"sparsity": "much"}, ["sparsity"]),
        ({"structure": "diagonal"}, ["structure is 'diagonal'; it should be 'diag', 'nm',"]),
        ({"block_size": 8}, ["block_size is 8; it should be 16, 32 or 64"]),
        ({"band": 0}, ["band"]),
        ({"nm": "4:2"}, ["1 <= N < M"]),
        ({"nm": "two:four"}, ["2:4"]),
        (yaml.safe_load("nm: 2:4"), ["nm must stand in quotes"]),
        ({"training": {1: 2}}, ["unknown key 'training.1'"]),
        ({"training": {"steps": -1}}, ["training.steps"]),
        ({"training": {"batch_size": 6, "accumulation": 4}}, ["not a multiple of accumulation 4"]),
        ({"training": {"learning_rate": 0}}, ["training.learning_rate"]),
        ({"training": {"learning_rate": float("inf")}}, ["training.learning_rate", "finite"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"seed": 2**32}, ["seed"]),
        ({"permutation": {"delta": 1.0}}, ["permutation.delta"]),
        (
            {"permutation": {"learner": "hard"}},
            ["permutation.learner is 'hard'; it should be 'refined', 'soft', 'projected' or 'straight-through'"],
        ),
        ({"permutation": {"margin": 1.0}}, ["permutation.margin"]),
        ({"support": {"fraction": 1.5}}, ["support.fraction"]),
        ({"support": {"method": "dynadiag"}, "structure": "block"}, ["dynadiag", "diag"]),
        ({"training": 5}, ["training"]),
        ({"permutation": {"kind": "assignment", "frozen": True}}, ["frozen is a control", "'assignment' never move"]),
        ({"permutation": {"learner": "projected", "frozen": True}}, ["frozen holds", "'projected' has none"]),
    ],
)
def test_bad_values_name_the_key(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PadstError) as caught:
        Recipe.from_dict(raw, source="recipe 'mine.yaml'")
    sentence = str(caught.value)
    assert sentence.startswith("recipe 'mine.yaml': ")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(("text", "found"), [("2:4", (2, 4)), ("1:32", (1, 32)), ("8:16", (8, 16))])
def test_nm_is_parsed(text: str, found: tuple[int, int]) -> None:
    assert parse_nm(text) == found


@pytest.mark.parametrize("text", ["", "2", "2:4:8", "4:4", "0:4", "-1:4", "1:33", "2.0:4", "a:b", ":4"])
def test_bad_nm_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"N:M|N < M"):
        parse_nm(text)


def test_updated_changes_dotted_keys_only() -> None:
    recipe = Recipe()
    changed = recipe.updated({"training.steps": 7, "sparsity": 0.5, "targets": ("q_proj",)})
    assert (changed.training.steps, changed.sparsity, changed.targets) == (7, 0.5, ("q_proj",))
    assert recipe == Recipe(), "a recipe never changes in place"
    assert changed.updated({"training.steps": 1000, "sparsity": 0.9, "targets": ()}) == recipe


@pytest.mark.parametrize(
    ("kind", "learner", "soft", "projected"),
    [
        ("learned", "soft", True, False),
        ("learned", "projected", False, True),
        ("learned", "straight-through", True, False),
        ("assignment", "soft", False, False),
        ("none", "projected", False, False),
    ],
)
def test_a_learner_counts_for_learned_permutations(kind: str, learner: str, soft: bool, projected: bool) -> None:
    permutation = Recipe().updated({"permutation.kind": kind, "permutation.learner": learner}).permutation
    assert (permutation.is_soft, permutation.is_projected) == (soft, projected)


def test_updated_checks_what_it_is_given() -> None:
    with pytest.raises(PadstError, match=r"training\.step.*did you mean 'steps'"):
        Recipe().updated({"training.step": 7})
    with pytest.raises(PadstError, match="between 0 and 1"):
        Recipe().updated({"sparsity": 2})
    with pytest.raises(PadstError, match="training is 1; it should be a mapping"):
        Recipe().updated({"training": 1, "training.steps": 7})


def test_stated_is_what_was_said_and_nothing_else(tmp_path: Path) -> None:
    assert Recipe().stated() == {}
    path = tmp_path / "mine.yaml"
    path.write_text("sparsity: 0.9\ntraining:\n  steps: 1000\n", encoding="utf-8")
    said = load_recipe(str(path))
    assert said == Recipe(), "both happen to be the defaults"
    assert said.stated() == {"sparsity": 0.9, "training.steps": 1000}
    more = said.updated({"targets": ("q_proj",), "support.every": 25})
    assert more.stated() == {**said.stated(), "targets": ["q_proj"], "support.every": 25}
    path.write_text(more.to_yaml(), encoding="utf-8")
    assert set(load_recipe(str(path)).stated()) == set(dotted(Recipe().model_dump())), "a written recipe states all"


def test_every_task_has_a_learning_rate() -> None:
    assert set(LEARNING_RATES) == set(get_args(Task))
    assert all(Recipe.from_dict({"training": {"learning_rate": rate}}) for rate in LEARNING_RATES.values())


def test_unknown_name_lists_the_recipes() -> None:
    with pytest.raises(PadstError, match="did you mean 'gpt2-diag90'") as caught:
        load_recipe("gpt2-diag9")
    assert "llama-diag80" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("structure: diag\nsparsity: [0.5", "not valid YAML: .* in line 2"),
        ("\x00", "not valid YAML"),
        (b"structure: diag # caf\xe9\n", "not valid YAML"),
        ("sparsity: 0.5\nstructure: diag\nsparsity: 0.9\n", "the key 'sparsity' stands twice in line 3"),
        ("training:\n  steps: 5\n  steps: 6\n", "the key 'steps' stands twice in line 3"),
        ("- diag\n- nm\n", "not a mapping"),
        ("", "not a mapping"),
    ],
)
def test_broken_files_are_one_sentence(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(PadstError, match=words) as caught:
        load_recipe(str(path))
    assert "broken.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_allocation_may_be_a_table_in_the_recipe() -> None:
    recipe = Recipe.from_dict(yaml.safe_load("allocation: {q_proj: 0.5, k_proj: .7}"))
    assert recipe.allocation == (("q_proj", 0.5), ("k_proj", 0.7))
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.updated({"seed": 1}).allocation == recipe.allocation
    with pytest.raises(PadstError, match="no table of layer patterns"):
        Recipe.from_dict({"allocation": {"q_proj": 1.5}})


def test_nm_alone_says_the_sparsity() -> None:
    assert Recipe.from_dict({"structure": "nm", "nm": "2:4"}).sparsity == 0.5


@pytest.mark.parametrize("whole", [False, True], ids=["nm alone", "as a run writes it"])
def test_another_nm_says_the_sparsity_anew(whole: bool) -> None:
    recipe = Recipe.from_dict({"structure": "nm", "nm": "2:4"})
    if whole:
        recipe = Recipe.from_dict(yaml.safe_load(recipe.to_yaml()))
    assert "sparsity" not in recipe.stated()
    assert recipe.updated({"nm": "1:4"}).sparsity == 0.75
    assert recipe.updated({"seed": 1}).sparsity == 0.5
    with pytest.raises(PadstError, match="leave one of them out"):
        recipe.updated({"nm": "1:4", "sparsity": 0.5})


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"structure": "nm", "nm": "2:4", "sparsity": 0.9}, "nm 2:4 is a sparsity of 0.5, not 0.9"),
        ({"structure": "diag", "nm": "2:4"}, "belongs to structure 'nm', not to 'diag'"),
    ],
)
def test_nm_must_agree_with_what_stands_beside_it(raw: dict[str, object], said: str) -> None:
    with pytest.raises(PadstError, match=re.escape(said)):
        Recipe.from_dict(raw)


def test_a_recipe_holds_the_allocation_that_was_in_the_file(tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    table.write_text("mlp.c_fc: 0.8\n0: 0.7\n")
    recipe = Recipe.from_dict({"allocation": str(table)})
    assert recipe.allocation == (("mlp.c_fc", 0.8), ("0", 0.7))
    table.unlink()
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    read = load_recipe(str(tmp_path / "recipe.yaml"))
    assert read == recipe.updated({"seed": 0})
    assert read.stated()["allocation"] == [["mlp.c_fc", 0.8], ["0", 0.7]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [", "not valid YAML"),
        (b"a: \xff", "not valid YAML"),
        (b"a: !!python/name:os.system", "not valid YAML"),
        (b"a: 2001-99-99", "not valid YAML"),
        (b"- a", "not a mapping"),
        (b"a: 1.5", "between 0 and 1"),
        (b"a: none", "between 0 and 1"),
        (b"{}", "between 0 and 1"),
    ],
)
def test_bad_allocation_files(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "table.yaml").write_bytes(content)
    with pytest.raises(PadstError, match=says) as caught:
        Recipe.from_dict({"allocation": str(tmp_path / "table.yaml")})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("allocation", [5, ["a"], [["a", "b"]], {"a": 1.5}, {}])
def test_bad_allocation_tables(allocation: object) -> None:
    with pytest.raises(PadstError, match="layer patterns with sparsities"):
        Recipe.from_dict({"allocation": allocation})
