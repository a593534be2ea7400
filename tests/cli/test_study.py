"""`padst study` from end to end: a small real grid, its page and figures, and what the command refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from padst_cli.commands.study import _command, _render_costs
from padst_cli.console import Console
from padst_cli.study import run
from tests.cli.conftest import Padst


@pytest.fixture
def recipe(gpt2: Path, train_text: Path, heldout_text: Path, tmp_path: Path) -> Path:
    """Learned diagonals and RigL on the tiny GPT-2, two steps, two seeds."""
    path = tmp_path / "tiny.yaml"
    study = {
        "models": [{"model": str(gpt2), "data": str(train_text), "eval_data": str(heldout_text)}],
        "structures": ["diag"],
        "sparsities": [0.5],
        "permutations": ["learned"],
        "controls": ["rigl"],
        "seeds": [0, 1],
        "steps": 2,
        "jobs": 2,
        "recipe": {
            "eval_samples": 2,
            "training": {"batch_size": 2, "max_seq_length": 16, "log_every": 1},
            "calibration": {"samples": 2},
        },
    }
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return path


def test_what_is_never_trained_can_be_left_out(padst: Padst, recipe: Path) -> None:
    study = {**yaml.safe_load(recipe.read_text(encoding="utf-8")), "one_shot": ["start", "wanda"]}
    recipe.write_text(yaml.safe_dump(study), encoding="utf-8")
    whole, named, none = (
        padst.json("study", recipe, "--dry-run", *flags)
        for flags in ((), ("--one-shot", "wanda"), ("--one-shot", "none"))
    )
    # Besides RigL and learned, two seeds each: every method on the unstructured control and on 2:4.
    assert (whole["count"], named["count"], none["count"]) == (12, 8, 4)
    assert not any("wanda" in name for name in none["cells"])


@pytest.mark.slow
def test_a_real_study_from_one_command(padst: Padst, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = padst.json("study", recipe, "--output", output)
    assert found == json.loads((output / "study.json").read_text(encoding="utf-8"))
    places = [(cell["structure"], cell["method"], cell["seed"]) for cell in found["cells"]]
    assert places == [(*way, seed) for seed in (0, 1) for way in (("unstructured", "rigl"), ("diag", "learned"))]
    for cell in found["cells"]:
        carries = cell["method"] == "rigl"
        assert cell["kl_to_dense"] > 0
        assert (cell["dense_finetuned"] is not None) == carries
        assert (cell["dense_finetuned_kl_to_dense"] is not None) == carries
        assert (cell["learned"] > 0) != carries
        assert cell["peak_bytes"] > 50_000_000, "a process that has torch in it"
        assert 0 < cell["step_seconds"] < cell["seconds"]
    assert found["cells"][0]["kl_to_dense"] != found["cells"][2]["kl_to_dense"], "seeds differ"
    (contrast,) = found["comparisons"][0]["contrasts"]
    differences = [found["cells"][at + 1]["kl_to_dense"] - found["cells"][at]["kl_to_dense"] for at in (0, 2)]
    assert contrast["control_kl"]["mean"] == pytest.approx(sum(differences) / 2)
    page = (output / "STUDY.md").read_text(encoding="utf-8")
    assert "4 of 4 cells done, 0 failed" in page
    assert "dense, fine-tuned as long" in page
    assert (output / "cells" / "tiny-gpt2-diag-learned-0.5-seed1" / "run" / "model.safetensors").is_file()
    assert (output / "tiny-gpt2.svg").read_text(encoding="utf-8").startswith("<svg")

    shown = padst("study", recipe, "--output", output)
    assert shown.exit_code == 0
    assert "4 of 4 cells are done already" in shown.output
    assert "tiny-gpt2, sparsity 0.5" in shown.output


def test_a_failed_cell_makes_the_exit_code_1(padst: Padst, recipe: Path, tmp_path: Path) -> None:
    flags = ("--seeds", 0, "--model", tmp_path / "missing", "--data", "a.txt", "--eval-data", "b.txt", "--json")
    result = padst("study", recipe, "--output", tmp_path / "out", *flags)
    assert result.exit_code == 1
    failures = json.loads(result.stdout)["failures"]
    assert list(failures) == ["missing-unstructured-rigl-0.5-seed0", "missing-diag-learned-0.5-seed0"]
    assert all("missing" in sentence for sentence in failures.values())


def test_an_interrupt_says_how_to_go_on(
    padst: Padst, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_cells", stop)
    output = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["padst", "study", str(recipe), "--output", str(output), "--overwrite"])
    result = padst("study", recipe, "--output", output, "--overwrite", "--quiet")
    assert result.exit_code == 130
    again = f"padst study {recipe} --output {output}"
    assert result.output.splitlines() == [
        f"error: interrupted, the runs have saved their state; go on with: {again}"
    ], "without --overwrite, which would drop what is done"
    assert "4 still to run" in (output / "STUDY.md").read_text(encoding="utf-8")


def test_the_grid_is_shown_without_a_run(padst: Padst, recipe: Path, tmp_path: Path) -> None:
    flags = ("--structures", "nm,block", "--permutations", "none", "--sparsities", "0.5,0.9", "--seeds", 3)
    cells = padst.json("study", recipe, *flags, "--dry-run", "--output", tmp_path / "out")
    assert cells["count"] == 6
    assert cells["cells"][1] == "tiny-gpt2-nm-none-0.5-seed3"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "needs a recipe (study-small comes with padst) or a --model"),
        (("--data", "a.txt", "study-small"), "--data and --eval-data belong to --model"),
        (("study-small", "--seeds", "0,x"), "--seeds '0,x' is not a list of numbers"),
        (("study-small", "--structures", "diagonal"), "structures"),
        (("study-smal",), "did you mean 'study-small'?"),
        (("--model", "embedded", "--steps", "-1"), "steps is -1"),
    ],
)
def test_what_is_refused(padst: Padst, flags: tuple[object, ...], words: str) -> None:
    assert words in padst.error("study", *flags, "--dry-run")


def test_the_page_names_no_folder_of_this_machine() -> None:
    words = ["study", "mine", "--output", "/some/where", "--jobs", "2", "--overwrite"]
    assert _command(words, to=False) == "padst study mine --jobs 2"
    assert _command(words, to=True) == "padst study mine --output /some/where --jobs 2"
    assert _command(["study", "mine", "--output=/some/where"], to=False) == "padst study mine"


def test_what_learning_costs_is_shown_beside_the_fixed_permutation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(method: str, seconds: float, peak: float, **more: Any) -> dict[str, Any]:
        mean = {"step_seconds": {"mean": seconds}, "peak_bytes": {"mean": peak}, "soft_step_seconds": None}
        return {"structure": "diag", "method": method, "moved": [], **mean, **more}

    rows = [
        row("none", 0.1, 1e9),
        row("assignment", 0.1, 1e9),
        row("learned", 0.108, 1.2e9, moved=[3, 0], soft_step_seconds={"mean": 0.15}),
    ]
    monkeypatch.setenv("COLUMNS", "160")
    console = Console()
    _render_costs(console, {"rows": rows})
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert all(words in text for words in ("diag", "learned", "x 1.08", "x 1.50", "+200 MB (x 1.20)"))
    assert "none" not in text
    _render_costs(console, {"rows": rows[:2]})
    shown = capsys.readouterr()
    assert not shown.out + shown.err
