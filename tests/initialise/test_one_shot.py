"""One-shot baselines: exact supports, the papers' rules against a naive reference, and what they are not for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from padst_cli.errors import PadstError
from padst_cli.events import ignore
from padst_cli.initialise import initialise
from padst_cli.initialise.one_shot import METHODS
from padst_cli.initialise.statistics import InputStatistics
from padst_cli.plan import make_plan
from padst_cli.recipe import Recipe
from padst_cli.structures import Structure, StructureOptions, structure_class

OUT, DAMPING = 12, 0.01


def inputs(width: int, tokens: int = 200) -> tuple[Tensor, InputStatistics]:
    """Correlated inputs with columns of very different size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    x *= torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    statistics = InputStatistics(width, torch.device("cpu"))
    statistics.add([x], [x], None)
    return x, statistics


def weight(width: int) -> Tensor:
    return torch.randn(OUT, width, generator=torch.Generator().manual_seed(1))


def fitted(name: str, width: int, nm: tuple[int, int] = (2, 4)) -> Structure:
    return structure_class(name).for_density(OUT, width, 0.31, StructureOptions(nm=nm))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["unstructured", "nm"])
@pytest.mark.parametrize("width", [30, 32, 300])
def test_the_support_is_one_of_the_structure(method: str, name: str, width: int) -> None:
    structure, w = fitted(name, width), weight(width)
    pruned = METHODS[method](w, structure, inputs(width)[1], DAMPING)
    assert structure.is_feasible(structure.units_of(pruned.mask))
    assert not pruned.weight[~pruned.mask].any()
    if method != "sparsegpt":
        assert torch.equal(pruned.weight, torch.where(pruned.mask, w, 0.0)), "what stays is not changed"


@pytest.mark.parametrize("name", ["diag", "block"])
def test_magnitude_serves_units_of_any_kind(name: str) -> None:
    structure = structure_class(name).for_density(32, 32, 0.5, StructureOptions())
    w = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
    mask = METHODS["magnitude"](w, structure, inputs(32)[1], DAMPING).mask
    kept, gone = (structure.unit_scores(w.abs())[structure.units_of(mask) == side] for side in (True, False))
    assert torch.equal(mask, structure.project(w.abs()))
    assert structure.name == "block" or kept.min() > gone.max()


def test_wanda_weighs_by_input_norms_within_rows() -> None:
    x, statistics = inputs(40)
    w, structure = weight(40), fitted("unstructured", 40)
    mask = METHODS["wanda"](w, structure, statistics, DAMPING).mask
    counts = mask.sum(1)
    assert int(counts.sum()) == structure.nonzeros
    assert counts.max() - counts.min() <= 1
    score = w.abs() * x.norm(dim=0)
    for row in range(OUT):
        assert score[row][mask[row]].min() > score[row][~mask[row]].max()
    assert not torch.equal(mask, METHODS["magnitude"](w, structure, statistics, DAMPING).mask)


def by_hand(w: Tensor, structure: Structure, hessian: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 without its factorisation: the inverse of what is left of H is taken anew for every column."""
    w = w.double().clone()
    mask = torch.zeros_like(w, dtype=torch.bool)
    width = w.shape[1]
    for column in range(width):
        if column % span == 0:
            end = min(column + span, width)
            alone = torch.stack([hessian[at:, at:].inverse()[0, 0] for at in range(column, end)])
            score = w[:, column:end].square() / alone
            if structure.name == "nm":
                n = min(structure.parameters()["n"], end - column)
                mask[:, column:end].scatter_(1, score.topk(n, dim=1).indices, True)
            else:
                count = structure.nonzeros
                wanted = round(count * end / width) - round(count * column / width)
                mask[:, column:end] = score >= score.flatten().topk(wanted).values[-1]
        inverse = hessian[column:, column:].inverse()
        gone = torch.where(mask[:, column], 0.0, w[:, column])
        w[:, column:] -= torch.outer(gone / inverse[0, 0], inverse[0])
    return torch.where(mask, w, 0.0), mask


@pytest.mark.parametrize(("name", "span"), [("nm", 4), ("unstructured", 128)])
def test_sparsegpt_is_the_surgeon_column_by_column(name: str, span: int) -> None:
    width = 150  # two blocks, the second one ragged
    _, statistics = inputs(width, tokens=400)
    w, structure = weight(width), fitted(name, width)
    gram = statistics.gram.double()
    hessian = gram + DAMPING * gram.diagonal().mean() * torch.eye(width)
    expected, mask = by_hand(w, structure, hessian, span)
    found = METHODS["sparsegpt"](w, structure, statistics, DAMPING)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["nm", "unstructured"])
def test_sparsegpt_loses_less_than_wanda_and_that_less_than_magnitude(name: str) -> None:
    x, statistics = inputs(64)
    w, structure = weight(64), fitted(name, 64)
    errors = {
        method: float((x @ (w - find(w, structure, statistics, DAMPING).weight).T).norm())
        for method, find in METHODS.items()
    }
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_without_inputs_all_go_by_size() -> None:
    w, structure = weight(8), fitted("nm", 8)
    masks = [find(w, structure, InputStatistics(8, torch.device("cpu")), DAMPING).mask for find in METHODS.values()]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("method", list(METHODS))
def test_the_model_takes_the_start(method: str, make_model, make_batches) -> None:
    model = make_model("gpt2")
    recipe = Recipe(structure="unstructured", sparsity=0.5).updated({"calibration.start": method})
    plan, student = make_plan(model, recipe), copy.deepcopy(model)
    starts = initialise(model, student, plan, make_batches("gpt2"), recipe, ignore)
    for layer in plan.layers:
        start = starts[layer.name]
        assert (start.perm_in, start.perm_out) == (None, None)
        assert int(start.mask.sum()) == layer.structure.nonzeros
        held = student.get_submodule(layer.name).weight
        assert torch.equal(held.T if layer.transposed else held, start.weight)
        assert (start.error < start.error_mask) if method == "sparsegpt" else (start.error == start.error_mask)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration.start": "wanda", "permutation.kind": "none"}, "it serves structures nm and unstructured"),
        ({"calibration.start": "sparsegpt", "structure": "block"}, "not 'block'"),
        ({"calibration.start": "wanda", "structure": "nm"}, "it needs permutation 'none'"),
        ({"calibration.start": "magnitude"}, "it needs permutation 'none'"),
        ({"calibration.start": "gpt"}, "'saliency', 'magnitude', 'wanda' or 'sparsegpt'"),
    ],
)
def test_what_a_method_does_not_serve_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(PadstError, match=words):
        Recipe().updated(changes)
