"""When a layer runs on padst's own Triton kernels, and their names: what is known without triton being there.

Triton asks for compute capability 8.0 or later on NVIDIA. The rules hold where nothing was measured (paths.py); they
are simple and rest on arithmetic: blocks, bands of diagonals and unpacked N:M run on tensor cores and take any number
of tokens; single diagonals run on CUDA cores, which win while reading the weight is what costs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

STRUCTURES = frozenset({"block", "diag", "nm"})
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

SCALAR_TOKENS = 64
"""Most tokens of single diagonals. At a density of 0.1 the arithmetic of an H200 lets them win over the dense product
below about 70 to 180 tokens, by the layer's size.
"""

BAND_SIDES = (64, 32, 16)
"""Sides of the tiles that bands are multiplied as."""

READ_COST = 136
"""Multiply-adds that a dense product does while a sparse one reads one 16-bit activation from the second-level cache:
109 on an H100 (300 T/s against 2.75 T/s), a quarter more because a gain should be seen.
"""

HAS_TRITON = importlib.util.find_spec("triton") is not None


def serves(
    structure: str, device: torch.device, tokens: int, dtype: torch.dtype, value_dtype: torch.dtype, band: int = 1
) -> bool:
    """Whether a Triton kernel computes `tokens` rows of `dtype` on this device, from values of `value_dtype`.

    Diagonals come in runs of `band`.
    """
    if device.type != "cuda" or not computes(structure, dtype, value_dtype):
        return False
    return structure != "diag" or band_side(band) > 0 or tokens <= SCALAR_TOKENS


def computes(structure: str, dtype: torch.dtype, value_dtype: torch.dtype) -> bool:
    """Whether there is a Triton kernel for the structure and these dtypes, for whatever number of tokens."""
    return HAS_TRITON and structure in STRUCTURES and dtype in DTYPES and value_dtype in DTYPES


def band_side(band: int) -> int:
    """Side of the tiles for runs of `band` diagonals: the largest that divides it, 0 where none does."""
    return next((side for side in BAND_SIDES if band % side == 0), 0)


def kernel_name(structure: str) -> str:
    """The name of the Triton kernel for a structure (AMD devices are `cuda` to torch, too)."""
    return f"cuda-triton-{structure}"


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with x is computed in, autocast considered."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def trains(x: Tensor, weight: Tensor) -> bool:
    """Whether Triton kernels take this product and its gradients."""
    return HAS_TRITON and x.is_cuda and weight.is_cuda and product_dtype(x) in DTYPES and weight.dtype in DTYPES


def training_pays(structure: str, parameters: Mapping[str, Any], density: float) -> bool:
    """Whether they are predicted to beat dense products in training, where tokens are many.

    Blocks of B use an activation B times for each time it is read, bands half as often; the dense product does 1 /
    density times the multiply-adds. Single diagonals and N:M stay dense: their gradients do the dense product's work.
    """
    uses = 0.0
    if structure == "block":
        uses = float(parameters["block_size"])
    elif structure == "diag":
        uses = band_side(int(parameters["band"])) / 2
    return density * READ_COST <= uses
