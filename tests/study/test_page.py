"""STUDY.md and the chart of made-up figures."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from padst_cli.study import StudyRecipe
from padst_cli.study.chart import study_chart
from padst_cli.study.figures import CellFigures
from padst_cli.study.page import study_page
from padst_cli.study.recipe import StudyModel
from padst_cli.study.summary import ModelSummary, summarise

Make = Callable[..., CellFigures]
ONE_SHOT = ("start", "magnitude", "wanda", "sparsegpt")
STUDY = StudyRecipe.from_dict({"models": [{"model": "tiny"}], "structures": ["block"], "one_shot": ONE_SHOT})


@pytest.fixture
def cells(figures: Make) -> list[CellFigures]:
    """Three seeds in which learning closes three quarters of the gap, and SET is better than RigL."""
    found = []
    for seed, shift in enumerate((0.0, 0.1, -0.1)):
        tuned = {"dense_finetuned": 7.5, "dense_finetuned_kl_to_dense": 0.05 + shift / 10}
        found += [
            figures("unstructured", "rigl", seed, 1.5 + shift, 15.0, **tuned),
            figures("unstructured", "set", seed, 1.0 + shift, 12.0),
            figures("block", "none", seed, 2.0 + shift * 1.2, 20.0),
            figures("block", "assignment", seed, 1.5 + shift, 16.0),
            figures("block", "learned", seed, 1.25 + shift, 14.0, learned=8, moved=100 + seed, soft_step_seconds=0.15),
            figures("block", "soft", seed, 1.3 + shift, 14.5, learned=8, moved=110 + seed, moved_in_training=5 + seed),
            figures("block", "frozen", seed, 1.6 + shift, 16.5, learned=8, moved=0),
        ]
    return found


def test_the_better_control_is_the_one_compared_with(cells: list[CellFigures]) -> None:
    comparison = summarise(cells)[0].comparisons[0]
    assert comparison.control == "set"
    learned = next(each for each in comparison.contrasts() if each.method == "learned")
    assert learned.gap == pytest.approx(0.75)
    assert learned.control_kl is not None
    assert learned.control_kl.mean == pytest.approx(0.25)
    assert learned.control_kl.half == pytest.approx(0.0, abs=1e-12), "paired: the seeds' own spread is gone"
    assert learned.frozen_kl is not None
    assert learned.frozen_kl.mean == pytest.approx(-0.35)
    none = next(each for each in comparison.contrasts() if each.method == "none")
    assert (none.none_kl, none.gap) == (None, 0.0)


def test_controls_are_compared_on_the_seeds_that_both_have(figures: Make) -> None:
    """In a study that is not done yet a lucky seed of one control must not make it the better one."""
    rigl = [figures("unstructured", "rigl", seed, value, 12.0) for seed, value in enumerate((1.0, 2.0, 2.0))]
    once = figures("unstructured", "set", 0, 1.1, 12.0)
    assert summarise([*rigl, once])[0].comparisons[0].control == "rigl"
    assert summarise([*rigl, figures("unstructured", "set", 0, 0.9, 12.0)])[0].comparisons[0].control == "set"
    assert summarise([*rigl[1:], once])[0].comparisons[0].control == "rigl", (
        "none in common: where there is most to see"
    )
    assert summarise([figures("block", "none", 0, 1.0, 12.0)])[0].comparisons[0].control is None


def page(cells: list[CellFigures], **changes: object) -> str:
    options: dict[str, object] = {"failures": {}, "open_cells": 0, "command": "padst study mine", **changes}
    return study_page(STUDY, cells, summarise(cells), charts={"tiny": "tiny.svg"}, **options)  # type: ignore[arg-type]


def test_the_data_is_named_as_the_recipe_spells_it(cells: list[CellFigures], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", "heldout")
    study = STUDY.model_copy(update={"models": (StudyModel(model="tiny", eval_data="$SOMEWHERE.txt"),)})
    text = study_page(study, cells, summarise(cells), {}, 0, {"tiny": "tiny.svg"}, "padst study mine")
    assert "Judged on $SOMEWHERE.txt." in text
    assert "Judged on heldout.txt." in page(cells)


def row(text: str, *starts: str) -> str:
    """The first table row with these cells in front."""
    return next(line for line in text.splitlines() if line.startswith(f"| {' | '.join(starts)} |"))


def test_the_page_says_what_was_found(cells: list[CellFigures]) -> None:
    text = page(cells, failures={"tiny-x": "the loss is nan"}, open_cells=2)
    assert "21 of 24 cells done, 1 failed, 2 still to run" in text
    assert "- `tiny-x`: the loss is nan" in text
    assert "Not in this study" not in text
    assert "![Held-out perplexity against sparsity](tiny.svg)" in text
    assert row(text, "dense, as it came") == "| dense, as it came | 0 | 2.079 | 8 |"
    assert row(text, "dense, fine-tuned as long") == "| dense, fine-tuned as long | 0.05 ± 0.02484 | 2.015 ± 0 | 7.5 |"
    # t of 0.975 with two degrees of freedom, 4.303, times 0.1 / sqrt(3)
    assert row(text, "block", "learned", "3").startswith("| block | learned | 3 | 1.25 ± 0.2484 | 2.639 ± 0 | 14 |")
    assert "- **block, learned**: KL **-0.75 [" in text
    assert "against no permutation" in text
    assert "against unstructured (SET); gap closed 0.75. In the mean learned is no worse than assignment" in text
    assert row(text, "block", "learned", "100, 101, 102", "0, 0, 0")
    assert row(text, "block", "soft", "110, 111, 112", "5, 6, 7")
    assert row(text, "block", "learned", "100 ms (× 1.00)") == (
        "| block | learned | 100 ms (× 1.00) | 150 ms (× 1.50) | 500 MB (× 1.00) |"
    )


def test_what_failed_is_called_so(figures: Make) -> None:
    found = [
        figures(structure, method, seed, value + seed / 100, 10.0, learned=int(method == "learned"))
        for structure, method, value in (
            ("unstructured", "rigl", 1.0),
            ("block", "none", 2.0),
            ("block", "assignment", 2.1),
            ("block", "learned", 2.2),
        )
        for seed in (0, 1)
    ]
    text = page(found)
    assert "gap closed -0.20. In the mean learned is worse than assignment." in text
    assert "In the mean assignment is worse than no permutation. Under 0.5 of the gap: the method has failed" in text


def test_one_seed_has_no_interval_and_no_gap(cells: list[CellFigures]) -> None:
    text = page([cell for cell in cells if cell.seed == 0])
    assert "KL -0.75 (one seed) against no permutation" in text
    assert "gap closed not told." in text
    assert "±" not in row(text, "block", "learned", "1")


def test_images_keep_their_metric_and_features_do_without_a_divergence(figures: Make) -> None:
    images = [
        figures("block", "learned", seed, 0.5, 0.61, metric="top1", initial=0.3, dense=0.7, task="image-classification")
        for seed in (0, 1)
    ]
    text = page(images)
    assert "| structure | method | seeds | KL to dense | top-1 accuracy | before training |" in text
    assert row(text, "block", "learned", "2") == "| block | learned | 2 | 0.5 ± 0 | 0.61 ± 0 | 0.3 |"
    encoder = [
        figures("block", method, seed, None, value, metric="feature_error", initial=0.9, dense=0.0, task="encoder")
        for method, value in (("none", 0.4), ("learned", 0.3))
        for seed in (0, 1)
    ]
    contrast = summarise(encoder)[0].comparisons[0].contrasts()[1]
    assert contrast.none_kl is not None
    assert contrast.none_kl.mean == pytest.approx(-0.1), "its one metric stands in"
    assert "| block | learned | 2 | – | 0.3 ± 0 |" in page(encoder)


def test_what_the_grid_leaves_out_is_said(cells: list[CellFigures]) -> None:
    small = STUDY.model_copy(update={"permutations": ("none", "learned"), "controls": ("rigl",)})
    text = study_page(small, cells, summarise(cells), {}, 0, {"tiny": "tiny.svg"}, "padst study")
    assert "Not in this study: random permutation, assignment, soft, soft, frozen at its start, SET." in text


def test_what_was_never_trained_stands_apart(cells: list[CellFigures], figures: Make) -> None:
    for seed in (0, 1, 2):
        cells.insert(0, figures("unstructured", "wanda", seed, 0.1, 9.0, steps=0, step_seconds=None))
        cells.insert(0, figures("2:4", "sparsegpt", seed, 0.2, 9.5, steps=0, step_seconds=None, sparsity=0.5))
    half, whole = summarise(cells)[0].comparisons
    assert whole.control == "set", "the best trained one, whatever one shot gives"
    assert (half.control, half.contrasts()) == (None, [])
    assert [row.method for row in whole.rows()][-1] == "wanda"
    assert "wanda" not in [each.method for each in whole.contrasts()]
    text = page(cells)
    assert text.count("one shot: Wanda") == text.count("one shot: SparseGPT") == 1, "one table each, no cost"
    assert row(text, "2:4", "one shot: SparseGPT", "3").startswith("| 2:4 | one shot: SparseGPT | 3 | 0.2 ± ")
    assert "wanda" not in texts(study_chart(summarise(cells)[0]))
    assert "wanda" in texts(study_chart(summarise([cell for cell in cells if cell.steps == 0])[0]))


def test_nothing_done_is_still_a_page() -> None:
    text = page([], failures={"a": "b"}, open_cells=3)
    assert "0 of 4 cells done, 1 failed, 3 still to run" in text


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("sparsities", [(0.9,), (0.8, 0.9)])
def test_the_chart_has_a_line_a_method_and_both_dense_lines(
    cells: list[CellFigures], sparsities: tuple[float, ...]
) -> None:
    grid = [
        CellFigures(**{**vars(cell), "sparsity": sparsity, "structure": structure})
        for sparsity in sparsities
        for cell in cells
        for structure in (("block", "diag") if cell.structure == "block" else ("unstructured",))
    ]
    summary: ModelSummary = summarise(grid)[0]
    svg = study_chart(summary)
    found = texts(svg)
    lines = ["dense, as it came", "dense, fine-tuned", "unstructured, RigL", "unstructured, SET", "none", "assignment"]
    for name in (*lines, "learned", "soft, frozen at its start"):
        assert found.count(name) == 1, "one legend for all panels"
    assert {"sparsity (block)", "sparsity (diag)"} <= set(found)
    assert all(f"{sparsity:g}" in found for sparsity in sparsities)
    assert "perplexity" in found
    assert "prefers-color-scheme" in svg
