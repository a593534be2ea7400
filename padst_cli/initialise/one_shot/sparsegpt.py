"""SparseGPT: column after column, what a pruned weight takes away is made up for by the columns still to come.

Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot", 2023, arXiv 2301.00774,
algorithm 1. With U the upper Cholesky factor of H^-1 (H = X'^T X' + lambda I over the inputs of the already sparse
model), pruning w_j of a row adds the error w_j / U_jj, and the columns from j on lose that error times U_j. The support
of a span of columns is chosen when its first one is reached, by w^2 / U_jj^2: the spans are the groups of N:M, or as
many columns as are updated lazily together.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from padst_cli.initialise.one_shot.pruned import Pruned
from padst_cli.initialise.refit import damped_cholesky
from padst_cli.initialise.statistics import InputStatistics
from padst_cli.structures import Structure
from padst_cli.structures.nm import NM
from padst_cli.structures.unstructured import Unstructured

BLOCK: Final = 128
"""Columns whose updates of the later ones are gathered into one product, as in the paper."""


def sparsegpt(weight: Tensor, structure: Structure, statistics: InputStatistics, damping: float) -> Pruned:
    """Support and weights by algorithm 1; lambda = damping * mean(diag H), in float64.

    Without any calibration input H is the identity, which is magnitude by spans. Raises `PadstError` where H cannot be
    factorised.
    """
    factor, escalated = _inverse_factor(statistics, damping)
    left = weight.double().clone()
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    block = BLOCK // structure.m * structure.m if isinstance(structure, NM) else BLOCK
    for first in range(0, weight.shape[1], block):
        end = min(first + block, weight.shape[1])
        errors = _prune_block(left, mask, factor, structure, (first, end))
        left[:, end:] -= errors @ factor[first:end, end:]
    return Pruned(left.to(weight.dtype), mask, weight.shape[0] * escalated)


def _prune_block(left: Tensor, mask: Tensor, factor: Tensor, structure: Structure, block: tuple[int, int]) -> Tensor:
    """Choose and prune the columns of one block of `left` `[out, in]` in place; their errors `[out, width]`."""
    first, end = block
    errors = torch.zeros_like(left[:, first:end])
    span = structure.m if isinstance(structure, NM) else end - first
    for column in range(first, end):
        if (column - first) % span == 0:
            reach = slice(column, min(column + span, end))
            score = left[:, reach].square() / factor.diagonal()[reach].square()
            mask[:, reach] = _keep(score, structure, reach)
        gone = left[:, column].masked_fill(mask[:, column], 0.0)
        errors[:, column - first] = gone / factor[column, column]
        left[:, column:end] -= torch.outer(errors[:, column - first], factor[column, column:end])
        left[:, column].masked_fill_(~mask[:, column], 0.0)
    return errors


def _keep(score: Tensor, structure: Structure, reach: slice) -> Tensor:
    """The support bool `[out, width]` of a span of columns from its score: N of a row, or a share of all weights."""
    kept = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    if isinstance(structure, NM):
        best = score.topk(min(structure.n, score.shape[1]), dim=1, sorted=False).indices
        return kept.scatter_(1, best, True)
    assert isinstance(structure, Unstructured)
    # Rounded from the left edge on, so that all spans together keep exactly the count.
    before, after = (round(structure.count * edge / structure.in_features) for edge in (reach.start, reach.stop))
    kept.view(-1)[score.flatten().topk(after - before, sorted=False).indices] = True
    return kept


def _inverse_factor(statistics: InputStatistics, damping: float) -> tuple[Tensor, bool]:
    """U `[in, in]` with U^T U = (H + lambda I)^-1, float64, and whether lambda had to be raised."""
    gram = statistics.gram.double()
    ridge = damping * float(gram.diagonal().mean())
    if not statistics.tokens or ridge <= 0.0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device), False
    factor, used = damped_cholesky(gram, ridge)
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True), used > ridge
