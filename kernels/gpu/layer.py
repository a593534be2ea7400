"""A packed layer on a Triton kernel: the checkpoint's own tensors, and what little the kernels need beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..activations import activate
from ..differentiable import differentiable
from ..layout import Layout
from ..plain import transformed
from . import rules
from .block import block_gradient, block_linear, transposed_index
from .common import ACTIVATIONS
from .diag import classes_of, diag_gradient, diag_linear, spans_of
from .nm import nm_gradient, nm_linear
from .permute import inverse


@dataclass(frozen=True)
class Operands:
    """What an operator is given beside x, the bias and the permutations."""

    values: Tensor
    index: list[Tensor]
    parameters: list[int]


OPERATORS = {
    "block": (block_linear, block_gradient),
    "diag": (diag_linear, diag_gradient),
    "nm": (nm_linear, nm_gradient),
}
"""The product and the gradient of the values, by structure."""


class TritonKernel:
    """y = (S x[..., perm_in])[..., perm_out] + b; math in float32, x and y float32, bfloat16 or float16.

    Runs from the packed tensors as they are; beside them it holds the inverse of the output permutation and, for
    diagonals, two numbers for every 64 of the longer side and two for each diagonal with those that fill their classes
    up, for blocks, two for each and one for a block column.
    Gradients reach x and the bias. `epilogues` are the activations that a call can end in.
    """

    epilogues = frozenset(ACTIVATIONS[1:])

    def __init__(self, layout: Layout) -> None:
        self.name = rules.kernel_name(layout.structure)
        perm_in = None if layout.perm_in is None else layout.perm_in.to(torch.int32).contiguous()
        store = None if layout.perm_out is None else inverse(layout.perm_out)
        operands, made = operands_of(
            layout.structure, layout.parameters, layout.out_features, layout.in_features, layout.tensors
        )
        self._made = made if store is None else [*made, store]
        self._in_features = layout.in_features
        self._operator: Any = OPERATORS[layout.structure][0]
        self._packed = (
            operands.values, operands.index, perm_in, store, layout.out_features, operands.parameters, False
        )  # fmt: skip

    def __call__(self, x: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
        """`[..., in] -> [..., out]` in the dtype of x; `activation` is one of common.ACTIVATIONS."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}, choose one of {ACTIVATIONS}")
        bias = None if bias is None else bias.to(x.dtype)
        if not is_compiling() and transformed(x):  # of which operators know nothing: tangents would be lost
            return activate(
                differentiable(_Product(self._operator, *self._packed, self._in_features), x, bias), activation
            )
        result: Tensor = self._operator(x, bias, *self._packed, activation)
        return result

    def prepare(self, dtype: torch.dtype) -> None:
        """Nothing is left to make: the kernels take every dtype from the same tensors."""

    def ready(self, dtype: torch.dtype) -> bool:
        """Always."""
        del dtype
        return True

    def resident_bytes(self) -> int:
        """Bytes of what is held beside the packed tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._made)


@dataclass(frozen=True)
class _Product:
    """A layer's product as `differentiable` takes it; with S transposed and the permutations exchanged its gradient."""

    operator: Any
    values: Tensor
    index: list[Tensor]
    perm_in: Tensor | None
    store: Tensor | None
    out_features: int
    parameters: list[int]
    transposed: bool
    in_features: int

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in] -> [..., out]`."""
        packed = self.values, self.index, self.perm_in, self.store, self.out_features, self.parameters, self.transposed
        result: Tensor = self.operator(x, bias, *packed, "")
        return result

    def input_gradient(self, dy: Tensor) -> Tensor:
        """`[..., out] -> [..., in]`."""
        back = replace(
            self,
            perm_in=self.store,
            store=self.perm_in,
            out_features=self.in_features,
            in_features=self.out_features,
            transposed=not self.transposed,
        )
        return differentiable(back, dy, None)


def operands_of(
    structure: str, parameters: Mapping[str, Any], out_features: int, in_features: int, tensors: Mapping[str, Tensor]
) -> tuple[Operands, list[Tensor]]:
    """What the operator of a layer packed into `tensors` is given, and which of it was made beside them."""
    packed = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    if structure == "block":
        offsets, columns, size = packed["row_offsets"], packed["col_indices"], packed["values"].shape[-1]
        made = transposed_index(offsets, columns, -(-in_features // size))
        return Operands(packed["values"], [offsets, columns, *made], [size]), made
    if structure == "diag":
        sizes = packed["offsets"], out_features, in_features
        made = [spans_of(*sizes), classes_of(*sizes)]
        band = int(parameters["band"])
        return Operands(packed["values"], [packed["offsets"], *made], [band]), made
    return Operands(packed["values"], [packed["indices"]], [int(parameters["m"])]), []
