"""What a kernel is given, and what a kernel is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Kernel(Protocol):
    """One way to compute a sparse layer, bound to one layout; it keeps what it prepares from the packed tensors."""

    name: str

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in] -> [..., out]`, in the dtype of x; bias `[out]` or None."""

    def prepare(self, dtype: torch.dtype) -> None:
        """Make now what the first call with an x of `dtype` would make."""

    def resident_bytes(self) -> int:
        """Bytes held beside the packed tensors (a dense copy, reordered values), 0 before the first call."""


@dataclass
class Layout:
    """One layer's packed tensors with permutations and shape; valid as long as the tensors are unchanged.

    The layer is y = (S x[..., perm_in])[..., perm_out] + b with S `[out, in]` packed into `tensors` after `structure`
    and `parameters`; `materialise` gives the dense W `[out, in]`, permutations folded in. `prepared` keeps the
    kernels made for this layout.
    """

    structure: str
    out_features: int
    in_features: int
    density: float
    parameters: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    perm_in: Tensor | None
    perm_out: Tensor | None
    materialise: Callable[[], Tensor]
    prepared: dict[str, Kernel] = field(default_factory=dict)
