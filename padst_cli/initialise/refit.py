"""Closed-form refit: the surviving weights of each row that come closest to the dense layer's outputs.

Row w of the dense weight, support S: minimise `|X w - X'_S s|^2 + lambda |s - w_S|^2` over s, where X are the inputs of
the dense model, X' those of the already sparse one, and lambda = damping * mean(diag H):

    s = (H_SS + lambda I)^-1 ((C w)_S + lambda w_S),    H = X'^T X',  C = X'^T X.

The ridge pulls towards the old weight, not towards zero, so that an input that was never active keeps its weight. The
formula with H = C is the update of optimal brain compression (Frantar and Alistarh, 2022); aiming at the dense outputs
from sparse inputs follows its sequential variants (GPTQ, SparseGPT).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from padst_cli.errors import PadstError

BUDGET_BYTES = 512 * 2**20
"""Memory for the normal matrices that are solved at one time, in bytes."""
_ESCALATIONS = 8


@dataclass(frozen=True)
class Refit:
    """The refitted weight `[out, in]`, zero outside its mask, and how many rows needed more damping than asked for."""

    weight: Tensor
    escalated_rows: int


@dataclass(frozen=True)
class Bucket:
    """Problems of one shape: `columns` [problems, size] are their supports, `rows` [problems, sharing] who has them."""

    columns: Tensor
    rows: Tensor


def refit(
    weight: Tensor, mask: Tensor, gram: Tensor, aim: Tensor, damping: float, budget_bytes: int = BUDGET_BYTES
) -> Refit:
    """Solve every row of `weight` `[out, in]` on its support `mask` `[out, in]`, all in coordinates of W.

    `gram` H `[in, in]` as in the module's formula, `aim` A = W C^T `[out, in]`, the C w of all rows. Rows with one
    support share a factorisation, supports of equal size are factorised in batches of at most `budget_bytes`. A
    factorisation that fails is repeated with ten times the damping; raises `PadstError` when that does not help.
    """
    ridge = damping * float(gram.diagonal().mean())
    old = weight.to(gram.dtype)
    result = torch.zeros_like(old)
    if ridge <= 0.0:
        return Refit(torch.where(mask, old, result), 0)
    target = aim + ridge * old
    escalated = 0
    for bucket in buckets(mask):
        for columns, rows in chunks(bucket, gram.element_size(), budget_bytes):
            where = (rows[:, None, :], columns[:, :, None])
            solution, failed = _solve(gram, columns, target[where], old[where], ridge)
            result[where] = solution
            escalated += failed * rows.shape[1]
    return Refit(result, escalated)


def buckets(mask: Tensor) -> Iterator[Bucket]:
    """Group the rows by support, then the supports by (size, number of rows that share it); empty supports drop out."""
    packed = np.packbits(mask.cpu().numpy(), axis=1)
    keys = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, owner, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(owner, kind="stable"), np.cumsum(counts)[:-1])
    sizes = mask.sum(1).cpu().numpy()[first]
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for support, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if size:
            by_shape[int(size), int(count)].append(support)
    for (size, _), supports in sorted(by_shape.items()):
        chosen = torch.from_numpy(first[supports]).to(mask.device)
        columns = mask[chosen].nonzero()[:, 1].view(len(supports), size)
        rows = torch.from_numpy(np.stack([members[support] for support in supports])).to(mask.device)
        yield Bucket(columns, rows)


def chunks(bucket: Bucket, itemsize: int, budget_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`columns` and `rows` of parts of a bucket whose normal matrices fit into `budget_bytes`."""
    size, sharing = bucket.columns.shape[1], bucket.rows.shape[1]
    # Gathered matrix and factor, right-hand sides and solution.
    needed = 2 * itemsize * size * (size + 2 * sharing)
    step = max(1, budget_bytes // needed)
    yield from zip(bucket.columns.split(step), bucket.rows.split(step), strict=True)


def _solve(gram: Tensor, columns: Tensor, target: Tensor, old: Tensor, ridge: float) -> tuple[Tensor, int]:
    """Solve problems `[problems, size, sharing]`; returns the solution and how many problems needed more damping."""
    matrices = gram[columns[:, :, None], columns[:, None, :]]
    matrices.diagonal(dim1=1, dim2=2).add_(ridge)
    factors, info = torch.linalg.cholesky_ex(matrices)
    del matrices
    bad = info != 0
    solution = torch.cholesky_solve(target, factors)
    for index in bad.nonzero().ravel().tolist():
        solution[index] = _solve_damped(gram, columns[index], target[index], old[index], ridge)
    return solution, int(bad.sum())


def _solve_damped(gram: Tensor, columns: Tensor, target: Tensor, old: Tensor, ridge: float) -> Tensor:
    """One problem whose matrix was not positive definite in this precision: more damping until it is."""
    factor, more = damped_cholesky(gram[columns[:, None], columns[None, :]], 10.0 * ridge)
    return torch.cholesky_solve(target + (more - ridge) * old, factor)


def damped_cholesky(matrix: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The lower factor `[d, d]` of `matrix + ridge I`, with ten times the ridge until it exists; and the ridge used.

    Raises `PadstError` where no reasonable ridge makes the matrix positive definite.
    """
    for _ in range(_ESCALATIONS):
        damped = matrix.clone()
        damped.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return factor, ridge
        ridge *= 10.0
    raise PadstError(
        "the calibration statistics of this layer cannot be factorised; raise calibration.damping or use more samples"
    )
