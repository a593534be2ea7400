"""Refining a start: order and support are chosen anew for the loss that the refit leaves, round by round.

The saliency that a start is first chosen by asks what each weight is worth while all others are there; at 80 or 90 %
sparsity nearly none of them are. Here every entry is judged beside the present support: one that is in it by what the
refit loses without it, `s_c^2 / ((H_SS)^-1)_cc` (optimal brain surgeon, Hassibi and Stork, 1993), one that is not by
what the refit gains with it, `g_c^2 / (H_cc - H_cS (H_SS)^-1 H_Sc)` with g the residual `A - s H` (forward selection by
orthogonal least squares, Chen, Billings and Luo, 1989). Both are exact for a single entry, and too much for many that
come at once. Gains are therefore scaled down by a factor that is tried at several sizes, and a candidate counts by its
own refit: the loss never rises.

H here is the Gram matrix with the refit's ridge, A the right-hand sides with it (`initialise/refit.py`). All matrices
are in the coordinates of W unless said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from padst_cli.initialise.refit import BUDGET_BYTES, buckets, chunks, refit
from padst_cli.permutation.apply import compose, from_structure, to_structure
from padst_cli.permutation.assignment import SearchResult, search_together
from padst_cli.structures import Structure

SCALES: Final = (2.0, 1.0, 0.5)
"""The factors by which the present scale of gains is multiplied for the candidates of one round."""
FIRST_SCALE: Final = 0.5
LEAST_SCALE: Final = 1e-3
"""Below this scale nothing would move any more: the last round."""
_DRAW_BACK: Final = 0.25
_ENOUGH: Final = 1e-5
SAMPLED_SUPPORTS: Final = 32
"""From more different supports than this, what an entry outside adds is divided by the mean over so many of them."""
BUDGET_FLOPS: Final = 4e12
"""No further round of a layer begins once its factorisations have taken this many multiplications."""


@dataclass(frozen=True)
class Problem:
    """One layer to refine: dense `weight` and `aim` `[out, in]`, `gram` `[in, in]` as the refit takes them.

    `output_weights` `[out]` say how much the loss of each row counts, None for all alike. `sides` may be reordered.
    """

    weight: Tensor
    aim: Tensor
    gram: Tensor
    damping: float
    structure: Structure
    sides: tuple[str, ...]
    output_weights: Tensor | None = None

    @property
    def ridge(self) -> float:
        """Lambda of the refit."""
        return self.damping * float(self.gram.diagonal().mean())

    @property
    def counts(self) -> Tensor:
        """How much each row counts, `[out, 1]`."""
        given = self.weight.new_ones(len(self.weight)) if self.output_weights is None else self.output_weights
        return given[:, None]


@dataclass(frozen=True)
class State:
    """An order with the refit on its support, `solution` and `mask` `[out, in]`; `gain` is over a weight of zero."""

    order: SearchResult
    solution: Tensor
    mask: Tensor
    gain: float


def refine(
    problems: Sequence[Problem],
    orders: Sequence[SearchResult],
    rounds: int,
    seed: int,
    on_cut: Callable[[int], None] | None = None,
) -> list[SearchResult]:
    """Better orders and supports of one layer, or of several that have one input permutation together.

    At most `rounds` rounds, fewer where nothing more is found or the work has exceeded `BUDGET_FLOPS`; `on_cut` is told
    of the latter, with the number of rounds that were done. The summed loss of the refits, each layer's as a share of
    its dense output, never rises. `kept` of the results stays that of `orders`.
    """
    if any(problem.ridge <= 0.0 for problem in problems):
        return list(orders)
    targets = [_Target(problem) for problem in problems]
    states = [target.state(order) for target, order in zip(targets, orders, strict=True)]
    scale, spent, number = FIRST_SCALE, 0.0, 0
    while number < rounds and scale >= LEAST_SCALE and spent < BUDGET_FLOPS:
        number += 1
        worths = [target.worth(state) for target, state in zip(targets, states, strict=True)]
        spent += sum(target.cost(state) for target, state in zip(targets, states, strict=True))
        candidates = [_candidate(targets, states, worths, scale * factor, seed + number) for factor in SCALES]
        best = max(range(len(SCALES)), key=lambda index: _gain(targets, candidates[index]))
        if _gain(targets, candidates[best]) > _gain(targets, states) * (1.0 + _ENOUGH):
            states, scale = candidates[best], scale * SCALES[best]
        else:
            scale *= _DRAW_BACK
    if on_cut is not None and number < rounds and scale >= LEAST_SCALE:
        on_cut(number)
    return [state.order for state in states]


def _candidate(
    targets: Sequence[_Target],
    states: Sequence[State],
    worths: Sequence[tuple[Tensor, Tensor]],
    scale: float,
    seed: int,
) -> list[State]:
    """The order and support that keep the most of the entries' worth, searched from the present order."""
    scores = []
    for target, state, (lost, gained) in zip(targets, states, worths, strict=True):
        score = target.counts * torch.where(state.mask, lost, scale * gained)
        scores.append(to_structure(score, state.order.perm_in, state.order.perm_out))
    problems = [target.problem for target in targets]
    found = search_together(scores, [each.structure for each in problems], [each.sides for each in problems], 1, seed)
    return [
        target.state(_turned(state.order, turn)) for target, state, turn in zip(targets, states, found, strict=True)
    ]


def _turned(order: SearchResult, turn: SearchResult) -> SearchResult:
    """`order` once S itself is permuted by `turn`, with the support of that."""
    perm_in, perm_out = order.perm_in, order.perm_out
    if perm_in is not None and turn.perm_in is not None:
        perm_in = compose(perm_in, turn.perm_in)
    if perm_out is not None and turn.perm_out is not None:
        perm_out = compose(turn.perm_out, perm_out)
    return replace(order, perm_in=perm_in, perm_out=perm_out, mask=turn.mask)


def _gain(targets: Sequence[_Target], states: Sequence[State]) -> float:
    return sum(state.gain / target.whole for target, state in zip(targets, states, strict=True))


class _Target:
    """A problem with its ridge put in, and what is computed of it once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.counts = problem.counts
        self.gram = problem.gram.clone()
        self.gram.diagonal().add_(problem.ridge)
        self.aim = problem.aim + problem.ridge * problem.weight
        # What a layer gains is measured by what its dense weight gains, so that scales do not decide between layers.
        weight = problem.weight
        dense = self.counts * weight * (2.0 * self.aim - weight @ self.gram)
        self.whole = max(float(dense.sum(dtype=torch.float64)), torch.finfo(torch.float32).tiny)

    def state(self, order: SearchResult) -> State:
        problem = self.problem
        mask = from_structure(order.mask, order.perm_in, order.perm_out)
        solution = refit(problem.weight, mask, problem.gram, problem.aim, problem.damping).weight
        gain = float((self.counts * solution * self.aim).sum(dtype=torch.float64))
        return State(order, solution, mask, gain)

    def worth(self, state: State) -> tuple[Tensor, Tensor]:
        """By entry, `[out, in]`: what the refit loses without it, for the support, and gains with it, elsewhere."""
        lost, apart = worth_of_support(state.solution, state.mask, self.gram)
        return lost, (self.aim - state.solution @ self.gram).square() / apart

    def cost(self, state: State) -> float:
        """Multiplications of a round: its factorisations, once for the worth and once a candidate."""
        heights = [(len(each.columns), each.columns.shape[1]) for each in buckets(state.mask)]
        supports = sum(count for count, _ in heights)
        sampled = min(1.0, SAMPLED_SUPPORTS / max(1, supports))
        return sum(
            count * size**2 * ((2 + len(SCALES)) * size / 3 + sampled * len(self.gram)) for count, size in heights
        )


def worth_of_support(solution: Tensor, mask: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """What each entry of a refit `solution` `[out, in]` on `mask` is worth, and how far the other columns stand apart.

    The first, `[out, in]`, is `s_c^2 / ((H_SS)^-1)_cc` on the support and zero elsewhere. The second, broadcast to
    `[out, in]` and positive, is the variance of each column that the row's support leaves unexplained,
    `H_cc - H_cS (H_SS)^-1 H_Sc`: exact where there are at most `SAMPLED_SUPPORTS` different supports, else the mean
    over so many of them. `gram` H `[in, in]` includes the ridge.
    """
    own = gram.diagonal()
    lost = torch.zeros_like(solution)
    parts = [part for bucket in buckets(mask) for part in chunks(bucket, gram.element_size(), BUDGET_BYTES)]
    supports = sum(len(columns) for columns, _ in parts)
    sampled = supports > SAMPLED_SUPPORTS
    stride = -(-supports // SAMPLED_SUPPORTS)
    apart = own.repeat(1 if sampled else len(mask), 1)
    total, seen, position = torch.zeros_like(own), torch.zeros_like(own), 0
    for columns, rows in parts:
        factors, info = torch.linalg.cholesky_ex(gram[columns[:, :, None], columns[:, None, :]])
        alone = torch.cholesky_inverse(factors).diagonal(dim1=1, dim2=2)
        # Where a matrix is not positive definite in this precision, each weight counts by what it carries alone.
        alone = torch.where((info == 0)[:, None], alone, 1.0 / own[columns])
        where = (rows[:, None, :], columns[:, :, None])
        lost[where] = solution[where].square() / alone[:, :, None]
        for index in range(-position % stride if sampled else 0, len(columns), stride if sampled else 1):
            if int(info[index]) != 0:
                continue
            explained = torch.linalg.solve_triangular(factors[index], gram[columns[index]], upper=False)
            left = own - explained.square().sum(0)
            if sampled:
                outside = torch.ones_like(own)
                outside[columns[index]] = 0.0
                total += left * outside
                seen += outside
            else:
                apart[rows[index]] = left
        position += len(columns)
    if sampled:
        apart = torch.where(seen > 0, total / seen.clamp_min(1.0), own)[None]
    return lost, apart.clamp_min(1e-6 * float(own.mean()))
