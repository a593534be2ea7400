"""Which kernel computes a layer: by structure, device and number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .cpu.torch_paths import DenseMatmul, GatherBmm
from .layout import Kernel, Layout

__all__ = ["Kernel", "Layout", "kernel_name", "prepare", "select"]

_KERNELS: dict[str, Callable[[Layout], Kernel]] = {kernel.name: kernel for kernel in (DenseMatmul, GatherBmm)}


GATHER_MAX_DENSITY = 0.25
"""Measured on one AVX2 core, 768 x 3072 in float32, 1 to 512 tokens: above it the gathers cost more than the zeros
they skip.
"""


def kernel_name(structure: str, density: float, device: torch.device, tokens: int) -> str:
    """The name of the kernel for `tokens` rows of input.

    Plain torch has a form of its own for blocks only; a gather formula for diagonals or N:M is slower than the dense
    product.
    """
    del device, tokens  # the torch paths serve every device and size; hand-written kernels will not
    if structure == "block" and density <= GATHER_MAX_DENSITY:
        return GatherBmm.name
    return DenseMatmul.name


def select(layout: Layout, device: torch.device, tokens: int) -> Kernel:
    """The kernel for this layout, made once and kept in `layout.prepared`."""
    name = kernel_name(layout.structure, layout.density, device, tokens)
    kernel = layout.prepared.get(name)
    if kernel is None:
        kernel = layout.prepared[name] = _KERNELS[name](layout)
    return kernel


def prepare(layout: Layout, device: torch.device, dtype: torch.dtype) -> None:
    """Make what calls with few and with many tokens will need, as before tracing a graph that may not make it."""
    for tokens in (1, 1 << 20):
        select(layout, device, tokens).prepare(dtype)
