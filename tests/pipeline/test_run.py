"""What may be said beside `--resume`, and what the message of an interrupted run tells to type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from padst_cli.checkpoint.run_folder import RunFolder
from padst_cli.commands.recipe_flags import build_recipe
from padst_cli.errors import PadstError
from padst_cli.pipeline.run import recipe_to_resume, resume_command
from padst_cli.recipe import Recipe, load_recipe

FILE = """\
structure: block
sparsity: 0.8
training:
  steps: 40
"""

Resume = Callable[..., Recipe]


@pytest.fixture
def resume(tmp_path: Path) -> Resume:
    """Resume a run that FILE and `--learning-rate 0.002` began on the model "m", with what is said beside it."""
    (tmp_path / "mine.yaml").write_text(FILE, encoding="utf-8")
    begun = build_recipe("m", str(tmp_path / "mine.yaml"), {"training.learning_rate": 0.002})
    # As the run writes it: with what it has found for itself.
    RunFolder(tmp_path / "out").begin(begun.updated({"data": "d.txt", "eval_data": "e.txt"}).to_yaml())

    def resume(recipe: str | None = None, model: str = "m", **changes: object) -> Recipe:
        given = {key.replace("__", "."): value for key, value in changes.items()}
        path = None if recipe is None else str(tmp_path / recipe)
        return recipe_to_resume(tmp_path / "out", build_recipe(model, path, given))

    return resume


def test_nothing_need_be_said(resume: Resume, tmp_path: Path) -> None:
    assert resume() == load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert resume().training.learning_rate == 0.002


def test_what_agrees_may_be_said_again(resume: Resume) -> None:
    whole = resume()
    assert resume("mine.yaml") == whole
    assert resume("mine.yaml", training__learning_rate=0.002, data="d.txt") == whole
    assert resume("out/recipe.yaml") == whole, "the recipe that the run itself wrote"


def test_what_is_left_open_is_no_contradiction(resume: Resume, tmp_path: Path) -> None:
    (tmp_path / "open.yaml").write_text("data: null\neval_data: null\ntraining:\n  learning_rate: null\n")
    assert resume("open.yaml") == resume()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"sparsity": 0.7}, "sparsity = 0.8, not 0.7"),
        ({"sparsity": 0.9}, "sparsity = 0.8, not 0.9"),  # though 0.9 is the default
        ({"structure": "diag"}, "structure = block, not diag"),
        ({"training__steps": 1000}, "training.steps = 40, not 1000"),
        ({"training__learning_rate": 0.001}, "training.learning_rate = 0.002, not 0.001"),
        ({"data": "other.txt"}, "data = d.txt, not other.txt"),
        ({"targets": ("q_proj",)}, r"targets = \[\], not \['q_proj'\]"),
        ({"model": "n"}, "model = m, not n"),
    ],
)
def test_what_differs_is_named_by_its_dotted_key(resume: Resume, said: dict[str, object], words: str) -> None:
    with pytest.raises(PadstError, match=words):
        resume("mine.yaml", **said)


def test_a_choice_taken_back_is_a_contradiction(resume: Resume, tmp_path: Path) -> None:
    RunFolder(tmp_path / "out").begin(resume().updated({"eval_samples": 96}).to_yaml())
    (tmp_path / "all.yaml").write_text("eval_samples: null\n")
    with pytest.raises(PadstError, match="eval_samples = 96, not None"):
        resume("all.yaml")


def test_an_allocation_is_what_its_file_held_when_the_run_began(resume: Resume, tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    table.write_text("mlp.c_fc: 0.7\n")
    RunFolder(tmp_path / "out").begin(resume().updated({"allocation": str(table)}).to_yaml())
    assert resume(allocation=str(table)) == resume()
    table.write_text("mlp.c_fc: 0.6\n")
    assert resume().allocation == (("mlp.c_fc", 0.7),)
    with pytest.raises(PadstError, match=r"allocation = \[\['mlp.c_fc', 0.7\]\], not \[\['mlp.c_fc', 0.6\]\]"):
        resume(allocation=str(table))


def test_resume_command_can_be_pasted() -> None:
    assert resume_command("gpt2", Path("my run")) == "padst sparsify gpt2 --output 'my run' --resume"
    several = resume_command("gpt2", Path("out"), processes=2)
    assert several == "torchrun --nproc-per-node 2 -m padst_cli sparsify gpt2 --output out --resume"
