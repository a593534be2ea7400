"""Forward and backward of a sparse layer in training on Triton kernels: nothing dense but where it is asked for.

y = (S x[..., perm_in])[..., perm_out] + b, whose support stays while the values change with every step. The support is
packed once, into places in the dense weight; every product takes the values from there in the dtype it computes in, and
keeps them for its gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import rows_of
from ..plain import version_of
from . import rules
from .layer import OPERATORS, operands_of
from .permute import inverse, permute


class TritonTraining:
    """The product of one layer and its gradients, for one support and one pair of permutations.

    `mask` bool `[out, in]` in the coordinates of S; `places` are the packed tensors of a structure whose values are
    integers: 1 + the place of each value in the flat weight, 0 for values that must stay zero. `perm_in` int32 `[in]`,
    `perm_out` int32 `[out]` or None.
    """

    def __init__(
        self,
        structure: str,
        parameters: Mapping[str, Any],
        mask: Tensor,
        places: Mapping[str, Tensor],
        perm_in: Tensor | None,
        perm_out: Tensor | None,
    ) -> None:
        self.name = rules.kernel_name(structure)
        self.shape = mask.shape
        self._made_for = _identity(mask, perm_in, perm_out)
        self._held = (mask, perm_in, perm_out)  # so that no other tensor comes to their addresses
        self._perm_in = perm_in
        self._store = None if perm_out is None else inverse(perm_out)
        self._product, self._gradient = OPERATORS[structure]
        operands, _ = operands_of(structure, parameters, mask.shape[0], mask.shape[1], places)
        self._index, self._parameters = operands.index, operands.parameters
        outside = operands.values == 0
        # Behind the weight's last entry there is one that takes what belongs nowhere.
        self._places = torch.where(outside, mask.numel(), operands.values - 1)
        self._outside = outside if bool(outside.any()) else None
        self._sources = self._places if self._outside is None else self._places.clamp(max=mask.numel() - 1)

    def fits(self, mask: Tensor, perm_in: Tensor | None, perm_out: Tensor | None) -> bool:
        """Whether this kernel was made for these very tensors, none of which was changed since."""
        return self._made_for == _identity(mask, perm_in, perm_out)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, dense_gradient: bool = False) -> Tensor:
        """`[..., in] -> [..., out]` with `weight` `[out, in]` in the coordinates of S; its support alone counts.

        Computed in the dtype of x, or autocast's. The gradient of `weight` is zero outside the support, unless
        `dense_gradient` asks for that of a dense weight.
        """
        dtype = rules.product_dtype(x)
        result: Tensor = _Product.apply(
            x.to(dtype), weight, None if bias is None else bias.to(dtype), self, dense_gradient
        )
        return result

    def values(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The packed values of `weight` `[out, in]` as it is now, in `dtype`, which the methods below take.

        Taken anew for every product: whether a weight was changed in between cannot be told of all ways to do so.
        """
        values = weight.detach().take(self._sources).to(dtype)
        return values if self._outside is None else values.masked_fill_(self._outside, 0.0)

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """The product without a record for gradients."""
        y: Tensor = self._product(
            x, bias, values, self._index, self._perm_in, self._store, self.shape[0], self._parameters, False, ""
        )
        return y

    def structured(self, dy: Tensor) -> Tensor:
        """dy `[..., out]` in the coordinates of S, which both gradients below take it in."""
        return dy if self._store is None or dy.numel() == 0 else permute(dy.contiguous(), self._store)

    def input_gradient(self, dz: Tensor, values: Tensor) -> Tensor:
        """dx `[..., in]` for dz `[..., out]`, as `structured` gives it."""
        dx: Tensor = self._product(
            dz, None, values, self._index, None, self._perm_in, self.shape[1], self._parameters, True, ""
        )
        return dx

    def weight_gradient(self, x: Tensor, dz: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of the weight `[out, in]` in `dtype`, zero outside the support; dz as `structured` gives it."""
        found = self._gradient(x, dz, values, self._index, self._perm_in, None, self._parameters)
        dense = torch.zeros(self.shape.numel() + 1, dtype=dtype, device=values.device)
        dense.scatter_(0, self._places.flatten(), found.flatten().to(dtype))
        return dense[:-1].view(self.shape)

    def dense_weight_gradient(self, x: Tensor, dz: Tensor, _: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient that a dense weight `[out, in]` in the coordinates of S would have; as `weight_gradient`."""
        u = x if self._perm_in is None else permute(x.contiguous(), self._perm_in)
        return (rows_of(dz).T @ rows_of(u)).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernel: TritonTraining, dense_gradient: bool
    ) -> Tensor:
        values = kernel.values(weight, x.dtype)
        ctx.kernel, ctx.dense_gradient, ctx.dtype = kernel, dense_gradient, weight.dtype
        ctx.save_for_backward(x, values)
        return kernel.forward(x, values, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        kernel: TritonTraining = ctx.kernel
        x, values = ctx.saved_tensors
        dx = dw = db = None
        dz = kernel.structured(dy)
        if ctx.needs_input_grad[0]:
            dx = kernel.input_gradient(dz, values)
        if ctx.needs_input_grad[1]:
            gradient = kernel.dense_weight_gradient if ctx.dense_gradient else kernel.weight_gradient
            dw = gradient(x, dz, values, ctx.dtype)
        if ctx.needs_input_grad[2]:
            db = rows_of(dy).sum(dim=0)
        return dx, dw, db, None, None


def _identity(*tensors: Tensor | None) -> tuple[tuple[int, int] | None, ...]:
    return tuple(None if tensor is None else (id(tensor), version_of(tensor)) for tensor in tensors)
