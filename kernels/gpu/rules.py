"""When a layer runs on padst's own Triton kernels, and their names: what is known without triton being there.

Triton asks for compute capability 8.0 or later on NVIDIA. The rules hold where nothing was measured (paths.py). They
are what one H200 said (BENCHMARKS.md, "GPU kernels"): a kernel runs where it beat the dense product there, at densities
that leave it a margin. Blocks did so with few tokens and many; diagonals and N:M with one token alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

STRUCTURES = frozenset({"block", "diag", "nm"})
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

FEW_TOKENS = 16
"""Tokens up to which a block layer's time is that of reading its weight."""

FEW_DENSITY = {"block": 0.25, "diag": 0.15, "nm": 0.15}
"""Densest layers that beat the dense product with one token (blocks: with few) on an H200, 4096 -> 11008 in bfloat16:
at a density of 0.1 they were 2.9, 1.7 and 1.8 times as fast, and their time grows with the density.
"""

BAND_SIDES = (64, 32, 16)
"""Sides of the tiles that bands are multiplied as."""

READ_COST = 136
"""Multiply-adds that a dense product does while a block layer reads one 16-bit activation from the second-level cache:
119 on an H200 (417 T/s against 3.5 T/s, blocks of 32, 4096 -> 11008), and some more because a gain should be seen.
"""

HAS_TRITON = importlib.util.find_spec("triton") is not None


def serves(
    structure: str,
    device: torch.device,
    tokens: int,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
    density: float,
    parameters: Mapping[str, Any],
) -> bool:
    """Whether a Triton kernel is the path for `tokens` rows of `dtype` on this device, from values of `value_dtype`."""
    if device.type != "cuda" or not computes(structure, dtype, value_dtype):
        return False
    if structure == "block" and tokens > FEW_TOKENS:
        return training_pays(structure, parameters, density)
    return density <= FEW_DENSITY[structure] and (structure == "block" or tokens == 1)


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
    """Whether they are predicted to beat dense products where tokens are many, as in training.

    Blocks of B use an activation B times for each time it is read; the dense product does 1 / density times the
    multiply-adds. Diagonals, also in bands, and N:M stay dense: on an H200 they were slower at GPT-2 small's sizes.
    """
    return structure == "block" and density * READ_COST <= float(parameters["block_size"])
