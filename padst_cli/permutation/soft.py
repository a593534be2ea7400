"""The soft permutation: a doubly stochastic matrix M `[d, d]` that stands for P while it is learned.

Rows and columns of M are nonnegative and sum to 1 (the Birkhoff polytope, whose corners are the permutations). M is
pushed to a corner by the l1-l2 penalty of AutoShuffleNet (Lyu et al., KDD 2020), which PA-DST (Tyagi et al., 2025,
arXiv 2510.14812) uses per layer. Row i of M stands for `x'[i] = x[perm[i]]`, so the permutation `perm` is the matrix
with ones at `(i, perm[i])`.

What the optimizer holds is log M, not M as in AutoShuffleNet: a step then multiplies an entry by so much, whatever its
size. An additive step of Adam floods the d small entries of a wide row at once (at d = 768 a step of 0.002 each moves
three quarters of the row) and never singles one out.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# A projection of a matrix that the optimizer nudged converges in a handful of sweeps; the cap only bounds the time of
# one that cannot, and what is left of the deviation then is taken up by the next step's projection.
_MAX_SWEEPS = 50
_TOLERANCE = 1e-5
# Times 1 / d the least an entry can be: low enough that all of a row's together are nothing, high enough to come back.
_FLOOR = 1e-4


def matrix_of(perm: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The permutation matrix P `[d, d]` of an int32 index vector `[d]`: `(P x)[i] = x[perm[i]]`."""
    matrix = torch.zeros(perm.numel(), perm.numel(), dtype=dtype, device=perm.device)
    matrix[torch.arange(perm.numel(), device=perm.device), perm.long()] = 1.0
    return matrix


def soften(perm: Tensor, mixing: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The start of the learner, `(1 - mixing) P + mixing / d` `[d, d]`: P itself blurred evenly over every row."""
    return (1.0 - mixing) * matrix_of(perm, dtype) + mixing / perm.numel()


def balanced(log_matrix: Tensor) -> Tensor:
    """M `[..., d, d]` of its logarithm, one Sinkhorn sweep on: the same matrix where it was in the polytope.

    The sweep is there for its gradient, which points along the polytope. Without it whole rows would be told to rise or
    fall, which the next projection takes back, and Adam would see nothing else.
    """
    return torch.softmax(torch.log_softmax(log_matrix, dim=-1), dim=-2)


def penalty(matrix: Tensor) -> Tensor:
    """Sum over rows and columns of (l1 norm - l2 norm), a scalar: 0 exactly where a doubly stochastic M is a
    permutation.

    `matrix` `[d, d]` is nonnegative. Source: equation 5 of AutoShuffleNet (Lyu et al., KDD 2020).
    """
    # One square for both norms, and no absolute values: half the time of `torch.linalg.vector_norm` and its gradient.
    squares = matrix.square()
    return 2 * matrix.sum() - squares.sum(1).sqrt().sum() - squares.sum(0).sqrt().sum()


def normalised_penalty(matrix: Tensor) -> Tensor:
    """`penalty(M) / (2 d)`, a scalar in [0, 1): comparable between layers, about `mixing` at the start."""
    return penalty(matrix) / (2 * matrix.shape[0])


@torch.no_grad()
def project(matrix: Tensor) -> Tensor:
    """A nonnegative matrix `[..., d, d]` brought to the Birkhoff polytope by normalising its rows and columns in turn.

    The alternation is Sinkhorn's (1967), run until every row sum is within 1e-5 of 1 right after the columns were
    normalised. No entry is left at zero: it could never grow again. What alternates are the factors of rows and columns
    `[..., d, 1]`; the matrix is only read, and scaled once.
    """
    matrix = matrix.clamp(min=_FLOOR / matrix.shape[-1])
    sums = matrix.sum(-1, keepdim=True)
    for _ in range(_MAX_SWEEPS):
        rows = sums.reciprocal()
        columns = (matrix.mT @ rows).reciprocal()
        sums = matrix @ columns
        least, most = (sums * rows).aminmax()
        if max(1.0 - float(least), float(most) - 1.0) < _TOLERANCE:
            break
    return matrix * rows * columns.mT


@torch.no_grad()
def nearest_permutation(matrix: Tensor) -> Tensor:
    """The permutation closest to M, int32 `[d]` on M's device: the exact linear assignment that keeps the most of M."""
    _, columns = linear_sum_assignment(matrix.double().cpu().numpy(), maximize=True)
    return torch.as_tensor(columns, dtype=torch.int32).to(matrix.device)
