"""Wanda: weights stay by |W| times the norm of their input, compared within a row (Sun et al., 2023, arXiv 2306.11695).

The norm is that of the inputs in the already sparse model, and the weights that stay are not changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padst_cli.initialise.one_shot.pruned import Pruned
from padst_cli.initialise.statistics import InputStatistics
from padst_cli.structures import Structure
from padst_cli.structures.unstructured import Unstructured


def wanda(weight: Tensor, structure: Structure, statistics: InputStatistics, damping: float) -> Pruned:
    """|W| * |X|_2 (equation 1 of the paper), the best of every N:M group, or of every row where single weights go.

    Rows keep equally many weights, give or take one. Without any calibration input it goes by |W|.
    """
    del damping
    score = weight.abs()
    if statistics.tokens:
        score = score * statistics.gram.diagonal().sqrt()
    mask = _best_of_rows(score, structure.count) if isinstance(structure, Unstructured) else structure.project(score)
    return Pruned(torch.where(mask, weight, 0.0), mask)


def _best_of_rows(score: Tensor, count: int) -> Tensor:
    """`count` entries bool `[out, in]`, the best of each row; what does not divide goes to the rows whose next is
    best.
    """
    each, extra = divmod(count, len(score))
    ranked = score.sort(dim=1, descending=True, stable=True)
    quota = torch.full((len(score),), each, device=score.device)
    if extra:
        quota[ranked.values[:, each].topk(extra).indices] += 1
    taken = torch.arange(score.shape[1], device=score.device) < quota[:, None]
    return torch.zeros_like(taken).scatter_(1, ranked.indices, taken)
