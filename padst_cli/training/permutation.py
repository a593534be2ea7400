"""One side's permutation while it may still change: a soft matrix or a lookup while it is learned, then an index."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padst_cli.permutation.soft import balanced, nearest_permutation, project, soften
from padst_cli.training.straight_through import HardLookup


class Permutation(nn.Module):
    """One side's permutation: a soft matrix M `[d, d]` until `harden`, an int32 index `[d]` from then on.

    `start` int32 `[d]` is where training began, `assigned` int32 `[d]` where learning did (by default there, too).
    Exactly one of `log_matrix` (a Parameter, the logarithm of M), `lookup` (the
    learner `straight-through`, given a `group`) and `index` (a buffer) is there.
    """

    def __init__(
        self,
        start: Tensor,
        *,
        mixing: float | None,
        dtype: torch.dtype = torch.float32,
        group: int | None = None,
        assigned: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.start: Tensor
        self.assigned: Tensor
        self.index: Tensor | None
        self.register_buffer("start", start.clone())
        self.register_buffer("assigned", (start if assigned is None else assigned).clone())
        soft, lookup = None, None
        if mixing is not None and group is not None:
            lookup = HardLookup(start, mixing, group, dtype)
        elif mixing is not None:
            soft = nn.Parameter(project(soften(start, mixing, dtype)).log())
        self.lookup = lookup
        self.register_parameter("log_matrix", soft)
        self.register_buffer("index", start.clone() if mixing is None else None)

    @property
    def is_soft(self) -> bool:
        """Whether it is still being learned by a matrix."""
        return self.index is None

    def matrix(self) -> Tensor:
        """M `[d, d]`, differentiable; only while soft and not looked up."""
        assert self.log_matrix is not None
        return balanced(self.log_matrix)

    @torch.no_grad()
    def projected(self) -> Tensor:
        """M `[d, d]` as `project` left it, which balancing would not change; only while soft and not looked up."""
        assert self.log_matrix is not None
        return self.log_matrix.exp()

    def forward(self, x: Tensor) -> Tensor:
        """Permute the last dimension of `x` `[..., d]`."""
        if self.lookup is not None:
            permuted: Tensor = self.lookup(x, self.start)
            return permuted
        if self.index is None:
            return F.linear(x, self.matrix())
        return x.index_select(-1, self.index)

    @torch.no_grad()
    def project(self) -> None:
        """Bring the soft matrix back into the Birkhoff polytope after an optimizer step; a frozen one never left it."""
        if self.lookup is not None:
            self.lookup.project()
            return
        assert self.log_matrix is not None
        if not self.log_matrix.requires_grad:
            return
        self.log_matrix.copy_(project(self.matrix()).log())

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """The index, int32 `[d]`; while soft, that in use or else the permutation nearest to the matrix."""
        if self.lookup is not None:
            return self.lookup.index
        return nearest_permutation(self.matrix()) if self.index is None else self.index

    def harden(self, index: Tensor) -> None:
        """Drop the matrix and keep `index`."""
        self.log_matrix = self.lookup = None
        self.index = index.to(device=self.start.device, dtype=torch.int32)

    @torch.no_grad()
    def set_index(self, index: Tensor) -> None:
        """Take another `index` int32 `[d]`; only where it is hard."""
        assert self.index is not None
        self.index.copy_(index)

    @property
    def moved(self) -> int:
        """How many entries of the present (rounded) permutation differ from the assignment."""
        return int((self.rounded() != self.assigned).sum())

    @property
    def moved_in_training(self) -> int:
        """How many differ from where training began."""
        return int((self.rounded() != self.start).sum())
