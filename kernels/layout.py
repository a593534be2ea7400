"""What a kernel is given, and what a kernel is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .cost import Work, resident_bound
from .steps import Steps


def rows_of(x: Tensor) -> Tensor:
    """`[..., features]` as `[tokens, features]`, one token where x has no other dimension."""
    return x.reshape(-1, x.shape[-1])


class Kernel(Protocol):
    """One way to compute a sparse layer, bound to one layout; it keeps what it prepares from the packed tensors."""

    name: str

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in] -> [..., out]`, in the dtype of x; bias `[out]` or None."""

    def prepare(self, dtype: torch.dtype) -> None:
        """Make now what the first call with an x of `dtype` would make."""

    def ready(self, dtype: torch.dtype) -> bool:
        """Whether all that is made: a call makes nothing more, as under a tracer, which would take it for its own."""

    def resident_bytes(self) -> int:
        """Bytes held beside the packed tensors (a dense copy, reordered values), 0 before the first call."""


@dataclass
class Layout:
    """One layer's packed tensors with permutations and shape; valid as long as the tensors are unchanged.

    The layer is y = (S x[..., perm_in])[..., perm_out] + b with S `[out, in]` packed into `tensors` after `structure`
    and `parameters`; `materialise` gives the dense W `[out, in]`, permutations folded in. `support` gives the mask of S
    `[out, in]`, and `repack` the tensors again from such a W and mask; both or neither are there. `prepared` keeps the
    kernels made for this layout, `choices` what was chosen for it on a GPU.
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
    support: Callable[[], Tensor] | None = None
    repack: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = None
    prepared: dict[str, Kernel] = field(default_factory=dict)
    choices: dict[torch.dtype, Steps[str]] = field(default_factory=dict)

    @property
    def work(self) -> Work:
        """What the cost model knows of the layer."""
        values = self.tensors["values"]
        dtype = str(values.dtype).removeprefix("torch.")
        return Work.of(self.structure, self.group, dtype, self.out_features, self.in_features, values.numel())

    @property
    def group(self) -> int:
        """M of N:M, else 0."""
        return int(self.parameters.get("m", 0))

    def permutations(self) -> dict[str, Tensor]:
        """The permutations that there are, by name."""
        perms = {"perm_in": self.perm_in, "perm_out": self.perm_out}
        return {key: perm for key, perm in perms.items() if perm is not None}

    def resident_bound(self) -> float:
        """The most bytes that the layer's weight may take in all its forms."""
        nonzeros = self.density * self.out_features * self.in_features
        return resident_bound(self.structure, self.group, nonzeros, self.tensors["values"].element_size())
