"""A packed layer on a Triton kernel: the checkpoint's own tensors, and what little the kernels need beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from . import rules
from .block import block_linear
from .diag import diag_linear, spans_of
from .nm import nm_linear


class TritonKernel:
    """y = (S x[..., perm_in])[..., perm_out] + b; math in float32, x and y float32, bfloat16 or float16.

    Runs from the packed tensors as they are; beside them it holds the inverse of the output permutation and, for
    diagonals, two numbers for every 64 outputs. Gradients reach x and the bias.
    """

    def __init__(self, layout: Layout) -> None:
        self.name = rules.kernel_name(layout.structure)
        packed = {key: tensor.detach().contiguous() for key, tensor in layout.tensors.items()}
        perm_in = None if layout.perm_in is None else layout.perm_in.to(torch.int32).contiguous()
        store = None if layout.perm_out is None else _inverse(layout.perm_out)
        self._made = [] if store is None else [store]
        self._operator: Any
        tensors: tuple[Tensor, ...]
        rest: tuple[int, ...] = ()
        if layout.structure == "block":
            self._operator = block_linear
            tensors = (packed["values"], packed["row_offsets"], packed["col_indices"])
        elif layout.structure == "diag":
            self._operator = diag_linear
            self._made.append(spans_of(packed["offsets"], layout.out_features, layout.in_features))
            tensors = (packed["values"], packed["offsets"], self._made[-1])
        else:
            self._operator, rest = nm_linear, (int(layout.parameters["m"]),)
            tensors = (packed["values"], packed["indices"])
        self._packed = (*tensors, perm_in, store, layout.out_features, *rest)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in] -> [..., out]` in the dtype of x."""
        result: Tensor = self._operator(x, None if bias is None else bias.to(x.dtype), *self._packed)
        return result

    def prepare(self, dtype: torch.dtype) -> None:
        """Nothing is left to make: the kernels take every dtype from the same tensors."""

    def resident_bytes(self) -> int:
        """Bytes of what is held beside the packed tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._made)


def _inverse(permutation: Tensor) -> Tensor:
    """int32 `[n]`, contiguous: inverse[permutation[i]] = i."""
    inverse = torch.empty_like(permutation, dtype=torch.int32)
    inverse[permutation.long()] = torch.arange(len(permutation), dtype=torch.int32, device=permutation.device)
    return inverse
