"""The learner `straight-through`: an index in the forward pass, the gradient of a soft matrix in the backward pass.

What is learned is a doubly stochastic matrix, as for the soft learner, but the layer only ever reads the permutation
nearest to it, an exact linear assignment taken anew every so many steps; the gradient is that of the matrix product
which is not made (Mena et al., "Learning latent permutations with Gumbel-Sinkhorn networks", ICLR 2018, without the
noise; the estimator is that of Bengio et al., 2013, arXiv 1308.3432). Hardening therefore changes nothing. A wide side
is cut into groups of neighbours in the start's order, whose entries stay within their group: the matrix, its gradient
and the assignment then grow with d times the group and not with d squared.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padst_cli.permutation.apply import invert
from padst_cli.permutation.soft import balanced, nearest_permutation, project

# The logarithm of nothing, small enough that its exponential is 0 in every dtype.
_APART = -1e4


class _Lookup(torch.autograd.Function):
    """`x[..., index]`, with the gradient that `matrices` `[groups, size, size]` would have in its place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor, start: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, start, index)
        ctx.size, ctx.dtype = matrices.shape[-1], matrices.dtype
        return x.index_select(-1, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, start, index = ctx.saved_tensors
        slots, items = (_grouped(each, ctx.size) for each in (grads[0], x.index_select(-1, start).to(grads[0])))
        return grads[0].index_select(-1, invert(index)), (slots @ items.mT).to(ctx.dtype), None, None


def _grouped(x: Tensor, size: int) -> Tensor:
    """`x` `[..., d]` as `[groups, size, rows]`, zeros behind d."""
    flat = F.pad(x.flatten(0, -2), (0, -x.shape[-1] % size))
    return flat.view(len(flat), -1, size).permute(1, 2, 0)


class HardLookup(nn.Module):
    """One side's learned matrices, `log_matrix` `[groups, size, size]`, and the `index` int32 `[d]` in use.

    Entry (k, i, j) of the matrices speaks for slot `k size + i` reading what slot `k size + j` reads at the start.
    """

    def __init__(self, start: Tensor, mixing: float, group: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.index: Tensor
        size = min(group, start.numel())
        self.groups = math.ceil(start.numel() / size)
        self.padding = self.groups * size - start.numel()
        soft = (1.0 - mixing) * torch.eye(size, dtype=dtype, device=start.device) + mixing / size
        self.log_matrix = nn.Parameter(project(soft).log().repeat(self.groups, 1, 1))
        self.register_buffer("index", start.clone())

    def matrices(self) -> Tensor:
        """The doubly stochastic matrices `[groups, size, size]`, differentiable; those behind d stay apart."""
        logs: Tensor = self.log_matrix
        if self.padding:
            behind = torch.zeros(logs.shape[:2], dtype=torch.bool, device=logs.device)
            behind[-1, -self.padding :] = True
            logs = logs.masked_fill(behind[:, :, None] ^ behind[:, None, :], _APART)
        return balanced(logs)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        """Permute the last dimension of `x` `[..., d]`; `start` int32 `[d]` is the order that groups were cut from."""
        y: Tensor = _Lookup.apply(x, self.matrices(), start, self.index)
        return y

    @torch.no_grad()
    def project(self) -> None:
        """Bring the matrices back into the Birkhoff polytope after an optimizer step; frozen ones never left it."""
        if not self.log_matrix.requires_grad:
            return
        self.log_matrix.copy_(project(self.matrices()).log())

    @torch.no_grad()
    def nearest(self, start: Tensor) -> Tensor:
        """The permutation nearest to the matrices, int32 `[d]`."""
        parts = start.split(self.log_matrix.shape[-1])
        found = []
        for matrix, items in zip(self.matrices(), parts, strict=True):
            chosen = nearest_permutation(matrix[: len(items), : len(items)])
            found.append(items[chosen.long()])
        return torch.cat(found)
