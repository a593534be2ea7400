"""When a layer runs on padst's own Triton kernels, and their names: what is known without triton being there.

Triton asks for compute capability 8.0 or later on NVIDIA. The rules hold where nothing was measured (paths.py); they
are simple and rest on arithmetic: blocks run on tensor cores and take any number of tokens; diagonals and N:M run on
CUDA cores, which win while reading the weight is what costs.
"""

from __future__ import annotations

import importlib.util

import torch

STRUCTURES = frozenset({"block", "diag", "nm"})
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

SCALAR_TOKENS = 64
"""Most tokens on CUDA cores. At a density of 0.1 the arithmetic of an H200 lets single diagonals win over the dense
product below about 70 to 180 tokens, by the layer's size; bands of diagonals run on the same kernel and share the
limit, and so does N:M.
"""

HAS_TRITON = importlib.util.find_spec("triton") is not None


def serves(structure: str, device: torch.device, tokens: int, dtype: torch.dtype, value_dtype: torch.dtype) -> bool:
    """Whether a Triton kernel computes `tokens` rows of `dtype` on this device, from values of `value_dtype`."""
    if device.type != "cuda" or not computes(structure, dtype, value_dtype):
        return False
    return structure == "block" or tokens <= SCALAR_TOKENS


def computes(structure: str, dtype: torch.dtype, value_dtype: torch.dtype) -> bool:
    """Whether there is a Triton kernel for the structure and these dtypes, for whatever number of tokens."""
    return HAS_TRITON and structure in STRUCTURES and dtype in DTYPES and value_dtype in DTYPES


def kernel_name(structure: str) -> str:
    """The name of the Triton kernel for a structure (AMD devices are `cuda` to torch, too)."""
    return f"cuda-triton-{structure}"
