"""Refining a start: what entries are worth, and that a refined support loses less, by an oracle in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from padst_cli.initialise import refine as module
from padst_cli.initialise.refine import Problem, refine, worth_of_support
from padst_cli.initialise.refit import refit
from padst_cli.permutation.apply import check_permutation, from_structure, identity
from padst_cli.permutation.assignment import SearchResult, kept_share
from padst_cli.structures import StructureOptions, structure_class

OUT, IN, DAMPING = 32, 48, 0.01


def correlated(generator: torch.Generator, tokens: int = 400) -> Tensor:
    """Inputs `[tokens, in]` that a third as many causes explain, most of all."""
    mixing = torch.randn(IN // 3, IN, generator=generator)
    x = torch.randn(tokens, IN // 3, generator=generator) @ mixing
    return x + 0.3 * torch.randn(tokens, IN, generator=generator)


def problem(name: str, density: float = 0.25, sides: tuple[str, ...] = ("input",), seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x, weight = correlated(generator), torch.randn(OUT, IN, generator=generator)
    gram = x.T @ x
    structure = structure_class(name).for_density(OUT, IN, density, StructureOptions())
    counts = torch.rand(OUT, generator=generator) + 0.1
    return Problem(weight, weight @ gram, gram, DAMPING, structure, sides, counts)


def beginning(one: Problem) -> SearchResult:
    """The identity, with the support that the largest weights choose."""
    score = one.weight.square()
    mask = one.structure.project(score)
    perms = [identity(size) if side in one.sides else None for side, size in (("input", IN), ("output", OUT))]
    return SearchResult(perms[0], perms[1], mask, kept_share(score, mask), 0)


def loss(one: Problem, order: SearchResult) -> float:
    """The least of `counts (|X w - X s|^2 + ridge |s - w|^2)` over s on the support, in float64, row by row."""
    mask = from_structure(order.mask, order.perm_in, order.perm_out)
    gram, weight, total = one.gram.double(), one.weight.double(), 0.0
    ridged = gram + one.ridge * torch.eye(IN, dtype=torch.float64)
    for row, support, count in zip(weight, mask, one.counts.double(), strict=True):
        own = ridged[support][:, support]
        right = (ridged @ row)[support]
        total += float(count) * float(row @ ridged @ row - right @ torch.linalg.solve(own, right))
    return total


@pytest.mark.parametrize("sides", [(), ("input",), ("output",), ("input", "output")], ids=str)
@pytest.mark.parametrize("name", ["diag", "nm", "block", "unstructured"])
def test_the_refit_loses_less_on_the_refined_support(name: str, sides: tuple[str, ...]) -> None:
    one = problem(name, sides=sides)
    before = beginning(one)
    (after,) = refine([one], [before], 8, 0)
    # Two rows of three blocks are too few to choose from while the columns stay in their order.
    assert loss(one, after) <= loss(one, before) * (1.0 if name == "block" and "input" not in sides else 0.95)
    assert one.structure.is_feasible(one.structure.units_of(after.mask))
    for side, perm, size in (("input", after.perm_in, IN), ("output", after.perm_out, OUT)):
        assert (perm is not None) == (side in sides)
        if perm is not None:
            check_permutation(perm, size, side)


def test_layers_with_one_input_permutation_get_the_same() -> None:
    first = problem("diag")
    weight = 1e3 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5))
    second = replace(first, weight=weight, aim=weight @ first.gram, output_weights=None)
    problems = [first, second]
    before = [beginning(one) for one in problems]
    after = refine(problems, before, 8, 0)
    assert all(torch.equal(after[0].perm_in, one.perm_in) for one in after)
    assert not torch.equal(after[0].perm_in, identity(IN))
    # No layer's scale decides for the others.
    gains = [loss(one, then) / loss(one, old) for one, old, then in zip(problems, before, after, strict=True)]
    assert sum(gains) < 0.98 * len(gains)


def test_it_is_deterministic_and_no_round_changes_nothing() -> None:
    one = problem("nm")
    before = beginning(one)
    first, second = (refine([one], [before], 4, 3)[0] for _ in range(2))
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.perm_in, second.perm_in)
    assert not torch.equal(first.mask, before.mask)
    assert torch.equal(refine([one], [before], 0, 3)[0].mask, before.mask)


def test_inputs_that_were_never_active_leave_the_order_alone() -> None:
    one = problem("diag")
    silent = replace(one, aim=torch.zeros_like(one.aim), gram=torch.zeros_like(one.gram))
    before = beginning(one)
    assert refine([silent], [before], 4, 0) == [before]


def test_no_round_begins_past_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUDGET_FLOPS", 1.0)
    one = problem("nm")
    before, cut = beginning(one), []
    assert torch.equal(refine([one], [before], 8, 0, cut.append)[0].mask, refine([one], [before], 1, 0)[0].mask)
    assert cut == [1]
    refine([one], [before], 1, 0, cut.append)
    assert cut == [1], "all rounds were done"


def test_worths_are_those_of_refits_with_one_entry_more_or_less() -> None:
    one = problem("unstructured")
    mask = one.structure.project(one.weight.square())
    ridged = one.gram + one.ridge * torch.eye(IN)
    aim = one.aim + one.ridge * one.weight
    solution = refit(one.weight, mask, one.gram, one.aim, DAMPING).weight
    lost, apart = worth_of_support(solution, mask, ridged)
    gained = (aim - solution @ ridged).square() / apart
    assert not lost[~mask].any()
    for row in (0, 7):
        for column in (0, 5, 30, 47):
            other = mask[row].clone()
            other[column] = ~other[column]
            change = gain_of(ridged, aim[row], other) - gain_of(ridged, aim[row], mask[row])
            expected = -lost[row, column] if mask[row, column] else gained[row, column]
            assert float(expected) == pytest.approx(change, rel=2e-3, abs=1e-2)


def test_of_many_supports_some_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem("unstructured")
    mask = one.structure.project(one.weight.square())
    gram = one.gram + one.ridge * torch.eye(IN)
    solution = refit(one.weight, mask, one.gram, one.aim, DAMPING).weight
    lost, exact = worth_of_support(solution, mask, gram)
    monkeypatch.setattr(module, "SAMPLED_SUPPORTS", OUT - 1)
    same, mean = worth_of_support(solution, mask, gram)
    assert torch.equal(lost, same)
    assert mean.shape == (1, IN)
    outside = torch.where(mask, torch.nan, exact)
    assert (mean[0] < outside.nan_to_num(-torch.inf).amax(0)).all()
    assert (mean[0] > outside.nan_to_num(torch.inf).amin(0)).all()


def gain_of(gram: Tensor, aim: Tensor, support: Tensor) -> float:
    own, right = gram.double()[support][:, support], aim.double()[support]
    return float(right @ torch.linalg.solve(own, right))


def test_matrices_that_cannot_be_factorised_do_not_break_it() -> None:
    one = problem("nm")
    twin = one.gram.clone()
    twin[:, 1] = twin[:, 0]
    twin[1] = twin[0]
    twin[1, 1] = twin[0, 0]
    hard = Problem(one.weight, one.weight @ twin, twin, 1e-9, one.structure, one.sides)
    (after,) = refine([hard], [beginning(hard)], 4, 0)
    assert one.structure.is_feasible(one.structure.units_of(after.mask))
    lost, apart = worth_of_support(one.weight * after.mask, after.mask, -torch.eye(IN))
    assert lost.isfinite().all()
    assert apart.isfinite().all()
