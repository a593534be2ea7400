"""The activations that a kernel's call can end in, as torch computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from torch.nn import functional

BY_TORCH: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}
"""By the names that kernels call them by: GELU, its approximation by tanh (Hendrycks and Gimpel, 2016), SiLU."""


def activate(y: Tensor, name: str) -> Tensor:
    """f(y) for the activation of this name, y itself for the empty one."""
    return BY_TORCH[name](y) if name else y
