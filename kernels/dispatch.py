"""Which kernel computes a layer: by structure, device and number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .cpu import native
from .cpu.native import NativeKernel
from .cpu.torch_paths import DenseMatmul, GatherBmm
from .layout import Kernel, Layout

__all__ = [
    "COMPACT_DTYPES",
    "Kernel",
    "Layout",
    "NativeKernel",
    "compact",
    "kernel_name",
    "prepare",
    "select",
    "takes_compact",
]

_KERNELS: dict[str, Callable[[Layout], Kernel]] = {kernel.name: kernel for kernel in (DenseMatmul, GatherBmm)}


GATHER_MAX_DENSITY = 0.25
"""Measured on one AVX2 core, 768 x 3072 in float32, 1 to 512 tokens: above it the gathers cost more than the zeros
they skip.
"""

COMPACT_DTYPES = frozenset(native.TYPES)
"""Dtypes of x that compact kernels compute on."""

takes_compact = native.takes


def compact(layout: Layout) -> NativeKernel | None:
    """A kernel that takes the place of the layer's packed tensors, None where none serves it there."""
    if not native.serves(layout.structure, layout.in_features, layout.tensors["values"].device):
        return None
    with torch.inference_mode(False):  # an image made inside inference mode could not enter a graph later
        return NativeKernel(layout)


def kernel_name(structure: str, density: float, in_features: int, device: torch.device, tokens: int) -> str:
    """The name of the kernel for `tokens` rows of float32, bfloat16 or float16 input.

    Without compiled kernels plain torch has a form of its own for blocks only; a gather formula for diagonals or N:M
    is slower than the dense product.
    """
    if native.serves(structure, in_features, device):
        return native.kernel_name(structure)
    return _torch_name(structure, density, tokens)


def _torch_name(structure: str, density: float, tokens: int) -> str:
    del tokens  # the torch paths serve every size
    if structure == "block" and density <= GATHER_MAX_DENSITY:
        return GatherBmm.name
    return DenseMatmul.name


def select(layout: Layout, tokens: int) -> Kernel:
    """The torch path for this layout, made once and kept in `layout.prepared`: what runs where `compact` serves not."""
    name = _torch_name(layout.structure, layout.density, tokens)
    kernel = layout.prepared.get(name)
    if kernel is None:
        kernel = layout.prepared[name] = _KERNELS[name](layout)
    return kernel


def prepare(layout: Layout, dtype: torch.dtype) -> None:
    """Make what calls with few and with many tokens will need, as before tracing a graph that may not make it."""
    for tokens in (1, 1 << 20):
        select(layout, tokens).prepare(dtype)
