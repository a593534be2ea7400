"""Forward and backward of a sparse layer in training, through the C kernels: nothing dense but where it is asked for.

y = (S x[..., perm_in])[..., perm_out] + b, whose support stays while the values change with every step. The layer is
held as two images (csrc/rows.h, csrc/block.h), of S and of S transposed, which takes dy to dx; the gradient of the
values is computed on the support alone (csrc/gradient.h). Indices are made once a support; each pass copies the values
in, whether or not they have changed: no version tells of a change through `.data` or by a foreign fused optimizer.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import rows_of
from ..plain import plain, version_of
from .isa import ISAS
from .library import LayerHeader, image_values, library
from .native import call, failed, make_image, pointer

MOST_FEATURES = 65_000
"""Kernels keep positions in 16 bits."""


_BREAK_EVEN = {"rows": (0.4, 48.0), "block": (0.85, 100.0)}
"""Densities at which forward and backward together take as long as dense ones: (with many tokens, tokens at which it
is half of that, because values are copied in and out once a step). Measured on one AVX2 core, 3072 x 768, 64 to 2048
tokens. A constant and not a measurement of this machine: a run must give the same weights when it is repeated.
"""


def pays(density: float, tokens: int, block_size: int | None) -> bool:
    """Whether the kernels beat the dense products at this density with so many tokens a step."""
    limit, half = _BREAK_EVEN["rows" if block_size is None else "block"]
    return density <= limit / (1.0 + half / max(tokens, 1))


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled training kernels take this product: plain float32 on the CPU, not too wide."""
    return (
        plain(x)
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and max(weight.shape) <= MOST_FEATURES
        and not torch.is_autocast_enabled("cpu")
        and library() is not None
    )


@dataclass(frozen=True)
class _Image:
    """One direction: the image, a view of its values, and for each of these its place in the flat weight.

    Where an edge block reaches beyond the weight, `outside` marks the values that must stay zero.
    """

    image: Tensor
    values: Tensor
    places: Tensor
    outside: Tensor | None

    def load(self, weight: Tensor) -> None:
        torch.take(weight, self.places, out=self.values)
        if self.outside is not None:
            self.values.masked_fill_(self.outside, 0.0)

    def spread(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """Gradients of the values as a weight `shape`, zero elsewhere."""
        if self.outside is not None:
            gradient = gradient.masked_fill_(self.outside, 0.0)
        dense = gradient.new_zeros(shape)
        return dense.put_(self.places, gradient, accumulate=self.outside is not None)


class TrainingKernel:
    """The product of one layer and its gradients, for one support and one pair of permutations.

    `mask` bool `[out, in]` in the coordinates of S; `perm_in` int32 `[in]`, `perm_out` int32 `[out]` or None. With
    `block_size` the support consists of aligned blocks of that size, otherwise of anything.
    """

    def __init__(
        self, mask: Tensor, perm_in: Tensor | None, perm_out: Tensor | None, block_size: int | None = None
    ) -> None:
        self.shape = mask.shape
        self._made_for = _identity(mask, perm_in, perm_out)
        self._mask = mask  # held, so that no other tensor comes to its address
        self.perm_in, self.perm_out = perm_in, perm_out
        make = _rows_image if block_size is None else partial(_block_image, size=block_size)
        # Values are written into the images step by step: made inside inference mode, these would take none outside it.
        with torch.inference_mode(False), torch.device("cpu"):
            self._inverse_out = None if perm_out is None else _inverse(perm_out)
            numbers = torch.arange(mask.numel(), dtype=torch.int32).view(mask.shape)
            self._forth: _Image = make(mask, numbers, perm_in, perm_out)
            inverse_in = None if perm_in is None else _inverse(perm_in)
            self._back: _Image = make(mask.T, numbers.T, self._inverse_out, inverse_in)
        lib = library()
        assert lib is not None
        self._lib = lib
        self.name = f"cpu-{ISAS[lib.padst_isa()]}-{'rows' if block_size is None else 'block'}"

    def fits(self, mask: Tensor, perm_in: Tensor | None, perm_out: Tensor | None) -> bool:
        """Whether this kernel was made for these very tensors, none of which was changed since."""
        return self._made_for == _identity(mask, perm_in, perm_out)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, dense_gradient: bool = False) -> Tensor:
        """`[..., in] -> [..., out]` with `weight` `[out, in]` in the coordinates of S; its support alone counts.

        The gradient of `weight` is zero outside the support, unless `dense_gradient` asks for that of a dense weight.
        """
        if x.shape[-1] != self.shape[1]:
            raise ValueError(f"input has {x.shape[-1]} features, the layer takes {self.shape[1]}")
        result: Tensor = _Product.apply(x, weight, bias, self, dense_gradient)
        return result

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product without a record for gradients."""
        self._forth.load(weight)
        return call(
            self._lib.padst_forward, self._forth.image.data_ptr(), x, bias, self.shape[0], torch.get_num_threads()
        )

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dx `[..., in]` for dy `[..., out]`."""
        self._back.load(weight)
        return call(
            self._lib.padst_forward, self._back.image.data_ptr(), dy, None, self.shape[1], torch.get_num_threads()
        )

    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """The gradient of the weight `[out, in]`, zero outside the support."""
        x, dy = x.contiguous(), dy.resolve_neg().contiguous()
        found = torch.zeros_like(self._forth.values)
        status = self._lib.padst_gradient(
            self._forth.image.data_ptr(),
            self._back.image.data_ptr(),
            x.data_ptr(),
            dy.data_ptr(),
            found.data_ptr(),
            x.numel() // x.shape[-1],
            torch.get_num_threads(),
        )
        if status:
            raise failed(f"{self.name}, the gradient of {tuple(self.shape)}", status)
        return self._forth.spread(found, self.shape)

    def dense_weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """The gradient that a dense weight `[out, in]` in the coordinates of S would have."""
        u = x if self.perm_in is None else x.index_select(-1, self.perm_in)
        dz = dy if self._inverse_out is None else dy.index_select(-1, self._inverse_out)
        return rows_of(dz).T @ rows_of(u)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernel: TrainingKernel, dense_gradient: bool
    ) -> Tensor:
        ctx.kernel, ctx.dense_gradient = kernel, dense_gradient
        ctx.save_for_backward(x, weight)
        return kernel.forward(x.detach(), weight.detach(), None if bias is None else bias.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        kernel: TrainingKernel = ctx.kernel
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = kernel.input_gradient(dy, weight)
        if ctx.needs_input_grad[1]:
            dw = kernel.dense_weight_gradient(x, dy) if ctx.dense_gradient else kernel.weight_gradient(x, dy)
        if ctx.needs_input_grad[2]:
            db = rows_of(dy).sum(dim=0)
        return dx, dw, db, None, None


def _identity(*tensors: Tensor | None) -> tuple[tuple[int, int] | None, ...]:
    return tuple(None if tensor is None else (id(tensor), version_of(tensor)) for tensor in tensors)


def _inverse(perm: Tensor) -> Tensor:
    return torch.argsort(perm).to(torch.int32)


def _header(shape: torch.Size, perm_in: Tensor | None, perm_out: Tensor | None) -> LayerHeader:
    return LayerHeader(*shape, 0, pointer(perm_in), pointer(perm_out))


def _rows_image(mask: Tensor, numbers: Tensor, perm_in: Tensor | None, perm_out: Tensor | None) -> _Image:
    rows, columns = mask.nonzero().unbind(1)
    starts = torch.zeros(len(mask) + 1, dtype=torch.int32)
    torch.cumsum(mask.sum(1), 0, dtype=torch.int32, out=starts[1:])
    columns32 = columns.to(torch.int32)
    header = _header(mask.shape, perm_in, perm_out)
    image = make_image("rows", ctypes.byref(header), len(columns32), starts.data_ptr(), columns32.data_ptr(), None)
    return _Image(image, image_values(image, len(columns32)), numbers[rows, columns].long(), None)


def _block_image(mask: Tensor, numbers: Tensor, perm_in: Tensor | None, perm_out: Tensor | None, size: int) -> _Image:
    """Blocks keep their values in an order of the kernels' own: packing the places instead of values tells it."""
    out_features, in_features = mask.shape
    padded = [-(-length // size) * size for length in mask.shape]
    wide = torch.full(padded, -1, dtype=torch.int32)
    wide[:out_features, :in_features] = numbers
    grid = wide.view(padded[0] // size, size, padded[1] // size, size).transpose(1, 2)
    used = torch.zeros(padded, dtype=torch.bool)
    used[:out_features, :in_features] = mask
    active = used.view(padded[0] // size, size, padded[1] // size, size).transpose(1, 2).flatten(2).any(2)
    starts = torch.zeros(len(active) + 1, dtype=torch.int32)
    torch.cumsum(active.sum(1), 0, dtype=torch.int32, out=starts[1:])
    columns = active.nonzero()[:, 1].to(torch.int32)
    places = grid[active].contiguous()
    header = _header(mask.shape, perm_in, perm_out)
    image = make_image(
        "block", ctypes.byref(header), size, len(columns), starts.data_ptr(), columns.data_ptr(), places.data_ptr()
    )
    values = image_values(image, places.numel())
    order = values.view(torch.int32).long()
    outside = order < 0
    return _Image(image, values, order.clamp_(min=0), outside if bool(outside.any()) else None)
