"""2:4 layers on the tensor cores' own 2:4 product, through `torch.sparse`: for many tokens.

y = (S x[..., perm_in])[..., perm_out] + b with S compressed by cuSPARSELt, or by CUTLASS where torch comes without it.
The product knows nothing of permutations, so activations are gathered before it (and after it for an output side).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..layout import Layout

NAME = "cuda-semi-structured"
DTYPES = frozenset({torch.bfloat16, torch.float16})

_PROBE = 64
"""Tokens of the product that is tried before a layer counts as served."""


class Unavailable(Exception):
    """torch has no 2:4 product for this layer here; the message says why."""


def applies(layout: Layout) -> bool:
    """Whether the layer is one of exactly 2:4."""
    return layout.structure == "nm" and (layout.parameters["n"], layout.parameters["m"]) == (2, 4)


class SemiStructured:
    """One 2:4 layer; holds the compressed values beside the packed tensors. Gradients reach x and the bias."""

    name = NAME

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._dtype: torch.dtype | None = None
        self._weight: tuple[str, Tensor, Tensor | None] | None = None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in] -> [..., out]` in the dtype of x; raises `Unavailable` where torch has no product for it."""
        if self._dtype is not x.dtype:
            self.prepare(x.dtype)
        assert self._weight is not None
        backend, packed, meta = self._weight
        layout = self._layout
        rows = x.reshape(-1, layout.in_features)
        if layout.perm_in is not None:
            rows = rows.index_select(1, layout.perm_in)
        bias = None if bias is None else bias.to(x.dtype)
        inside = bias if layout.perm_out is None else None
        y = semi_linear(rows, inside, packed, meta, backend, layout.out_features)
        if layout.perm_out is not None:
            y = y.index_select(1, layout.perm_out)
            y = y if bias is None else y + bias
        return y.reshape(*x.shape[:-1], layout.out_features)

    def prepare(self, dtype: torch.dtype) -> None:
        """Compress the values for activations of `dtype`; raises `Unavailable` where torch has no product for it."""
        if dtype not in DTYPES:
            raise Unavailable(f"it takes activations of 16 bits, these are {dtype}")
        if not self.ready(dtype):
            with torch.inference_mode(False), torch.no_grad():
                self._weight = compressed(_structured(self._layout).to(dtype).contiguous())
            self._dtype = dtype

    def ready(self, dtype: torch.dtype) -> bool:
        """Whether the values are compressed for activations of `dtype`."""
        return self._dtype is dtype

    def resident_bytes(self) -> int:
        """Bytes of the compressed values."""
        tensors = () if self._weight is None else self._weight[1:]
        return sum(each.numel() * each.element_size() for each in tensors if each is not None)


def compressed(weight: Tensor) -> tuple[str, Tensor, Tensor | None]:
    """(backend, values, indices where they are apart) of S `[out, in]`, 2:4; raises `Unavailable`."""
    reasons = []
    for backend, kind in _backends().items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that torch's interface is a prototype
                found = kind.from_dense(weight)
            probe = weight.new_zeros(_PROBE, weight.shape[1])
            _product(probe, None, found.packed, found.meta, backend, weight.shape[0])
        except (RuntimeError, AttributeError) as error:  # AttributeError: a torch built without the backend's operators
            reasons.append(f"{backend}: {str(error).splitlines()[0]}")
        else:
            return backend, found.packed, found.meta
    raise Unavailable("; ".join(reasons))


def _backends() -> dict[str, Any]:
    return {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }


def _product(
    rows: Tensor, bias: Tensor | None, packed: Tensor, meta: Tensor | None, backend: str, out_features: int
) -> Tensor:
    shape = torch.Size((out_features, rows.shape[1]))
    weight = _backends()[backend](shape, packed, meta, None, None, None)
    return functional.linear(rows, weight, bias)


@torch.library.custom_op("padst::semi_structured", mutates_args=())
def semi_linear(
    rows: Tensor, bias: Tensor | None, packed: Tensor, meta: Tensor | None, backend: str, out_features: int
) -> Tensor:
    """rows `[tokens, in]` -> `[tokens, out]` through compressed values; an operator, so that graphs hold it."""
    if len(rows) == 0:
        return rows.new_empty(0, out_features)
    return _product(rows, bias, packed, meta, backend, out_features).contiguous()


@semi_linear.register_fake
def _(
    rows: Tensor, bias: Tensor | None, packed: Tensor, meta: Tensor | None, backend: str, out_features: int
) -> Tensor:
    del bias, packed, meta, backend
    return rows.new_empty(rows.shape[0], out_features)


def _setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    del output
    rows, _, packed, meta, *ctx.rest = inputs
    ctx.in_features, ctx.has_meta = rows.shape[1], meta is not None
    ctx.save_for_backward(packed, *([meta] if ctx.has_meta else []))


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    drows = db = None
    if ctx.needs_input_grad[0]:
        # The product of the transposed is none of the hardware's: through S, which the identity gives.
        packed, *meta = ctx.saved_tensors
        identity = torch.eye(ctx.in_features, dtype=dy.dtype, device=dy.device)
        drows = dy @ semi_linear(identity, None, packed, meta[0] if ctx.has_meta else None, *ctx.rest).t()
    if ctx.needs_input_grad[1]:
        db = dy.sum(dim=0)
    return drows, db, None, None, None, None


semi_linear.register_autograd(_backward, setup_context=_setup)


def _structured(layout: Layout) -> Tensor:
    """S `[out, in]` from W with the permutations multiplied in."""
    weight = layout.materialise()
    if layout.perm_out is not None:
        weight = weight.index_select(0, torch.argsort(layout.perm_out))
    return weight if layout.perm_in is None else weight.index_select(1, layout.perm_in)
