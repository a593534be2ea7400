"""Sparse layers through plain torch operations: what runs everywhere, and what every other kernel is compared with.

y = (S x[..., perm_in])[..., perm_out] + b, in the dtype of x. All work under torch.compile, under autocast and on any
device (the one in place on the CPU), and pass gradients to x.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..layout import Layout

GATHERED_ENTRIES = 1 << 22
"""Most entries of gathered input held at a time (16 MiB in float32): longer inputs are taken in pieces."""


class DenseMatmul:
    """y = W x + b with W `[out, in]` dense and the permutations folded in, made at the first call and kept.

    Costs the memory of the dense weight beside the packed one; one product and no pass over the activations.
    """

    name = "torch-dense"

    def __init__(self, layout: Layout) -> None:
        self._materialise = layout.materialise
        self._weight: Tensor | None = None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in] -> [..., out]` in the dtype of x."""
        weight = self._weight
        if weight is None or weight.dtype != x.dtype:
            weight = self._make(x.dtype)
        return _linear(x, weight, bias)

    def prepare(self, dtype: torch.dtype) -> None:
        """Make the dense copy."""
        if not self.ready(dtype):
            self._make(dtype)

    def ready(self, dtype: torch.dtype) -> bool:
        """Whether the dense copy is there."""
        return self._weight is not None and self._weight.dtype == dtype

    def resident_bytes(self) -> int:
        """Bytes of the dense copy."""
        return _bytes(self._weight)

    def _make(self, dtype: torch.dtype) -> Tensor:
        with _outside_inference_mode():
            self._weight = self._materialise().to(dtype)
        return self._weight


class DenseInPlace:
    """y = W x + b with W `[out, in]` dense and the permutations folded in, *instead of* the packed tensors, which come
    back bit for bit from W and a bit an entry that says whether it is in the support.

    For the densest layers, where a dense weight takes no more memory than a packed one may and is the faster.
    """

    name = "torch-dense"

    def __init__(self, layout: Layout) -> None:
        if layout.support is None or layout.repack is None:
            raise ValueError("this layout cannot give its tensors back from a dense weight")
        self.weight = layout.materialise().contiguous()
        self._support = _pack_bits(layout.support())
        self._permutations = layout.permutations()
        self._repack = layout.repack

    @staticmethod
    def fits(layout: Layout) -> bool:
        """Whether the dense weight with its support and permutations stays within the layer's memory bound."""
        entries = layout.out_features * layout.in_features
        size = entries * layout.tensors["values"].element_size() + -(-entries // 8)
        return size + _bytes(*layout.permutations().values()) <= layout.resident_bound()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in] -> [..., out]` in the dtype of x; gradients reach x and the bias. ValueError for another width."""
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"input has {x.shape[-1]} features, the layer takes {self.weight.shape[1]}")
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        return _linear(x, weight, bias)

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors`, allocated as the checkpoint has them (`values`, indices, permutations), bit for bit."""
        support = _unpack_bits(self._support, self.weight.numel()).view(self.weight.shape)
        for key, tensor in {**self._permutations, **self._repack(self.weight, support)}.items():
            tensors[key].copy_(tensor)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """A copy of W `[out, in]`."""
        return self.weight.to(dtype, copy=True)

    def name_at(self, tokens: int, dtype: torch.dtype) -> str:
        """The name of what computes any number of rows of any dtype."""
        del tokens, dtype
        return self.name

    def resident_bytes(self) -> int:
        """Bytes of the dense weight, the support and the permutations."""
        return _bytes(self.weight, self._support, *self._permutations.values())


@dataclass(frozen=True)
class _RowGroup:
    """Block rows with equally many blocks: `rows [g]`, `inputs [g * k * B]`, `values [g, k * B, B]` (transposed
    blocks).
    """

    rows: Tensor
    inputs: Tensor
    values: Tensor


class GatherBmm:
    """Block-CSR: for every block row gather the inputs that its blocks read, then one batched product per group of
    rows.

    y[r] = sum over blocks (r, c) of values[r, c] x[c]. Block rows with equally many blocks form one batch, so nothing
    is padded: with even rows there are at most two. The input permutation is folded into the gather. Memory beside
    the activations: one reordered copy of the values, and at most `GATHERED_ENTRIES` of gathered input.
    """

    name = "torch-gather-bmm"

    def __init__(self, layout: Layout) -> None:
        self._layout_size = (layout.out_features, layout.in_features)
        self._tensors = layout.tensors
        self._perm_in = layout.perm_in
        self._perm_out = layout.perm_out
        self._size = int(layout.parameters["block_size"])
        self._groups: list[_RowGroup] | None = None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in] -> [..., out]` in the dtype of x."""
        groups = self._groups
        if groups is None or groups[0].values.dtype != x.dtype:
            groups = self._make(x.dtype)
        out_features, in_features = self._layout_size
        flat = x.reshape(x.numel() // in_features, in_features)
        widest = max(group.inputs.numel() for group in groups)
        pieces = flat.split(max(1, GATHERED_ENTRIES // widest))
        with _in_given_dtypes(x):
            parts = [self._multiply(piece, groups) for piece in pieces]
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
        return (y if bias is None else y + bias.to(x.dtype)).reshape(*x.shape[:-1], out_features)

    def prepare(self, dtype: torch.dtype) -> None:
        """Make the reordered copy of the values."""
        if not self.ready(dtype):
            self._make(dtype)

    def ready(self, dtype: torch.dtype) -> bool:
        """Whether the reordered copy is there."""
        return self._groups is not None and self._groups[0].values.dtype == dtype

    def resident_bytes(self) -> int:
        """Bytes of the reordered values and their index vectors."""
        return sum(_bytes(group.rows, group.inputs, group.values) for group in self._groups or ())

    def _multiply(self, flat: Tensor, groups: list[_RowGroup]) -> Tensor:
        tokens, (out_features, _) = len(flat), self._layout_size
        block_rows = len(self._tensors["row_offsets"]) - 1
        parts = []
        for group in groups:
            gathered = flat.index_select(1, group.inputs)
            batches = gathered.view(tokens, len(group.rows), group.values.shape[1]).transpose(0, 1)
            parts.append(torch.bmm(batches, group.values))
        if len(parts) == 1 and len(groups[0].rows) == block_rows:
            y = parts[0]
        else:
            y = parts[0].new_zeros(block_rows, tokens, self._size)
            for group, part in zip(groups, parts, strict=True):
                y = y.index_copy(0, group.rows, part)
        y = y.transpose(0, 1).reshape(tokens, block_rows * self._size)
        if self._perm_out is not None:
            return y.index_select(1, self._perm_out)
        return y[:, :out_features]

    def _make(self, dtype: torch.dtype) -> list[_RowGroup]:
        with _outside_inference_mode(), torch.no_grad():
            self._groups = self._group_rows(dtype)
        return self._groups

    def _group_rows(self, dtype: torch.dtype) -> list[_RowGroup]:
        values = self._tensors["values"].to(dtype)
        offsets = self._tensors["row_offsets"].long()
        columns = self._tensors["col_indices"].long()
        lengths, size = offsets.diff(), self._size
        steps = torch.arange(size, device=columns.device)
        groups = []
        for length in lengths.unique().tolist():
            if length == 0:
                continue
            rows = (lengths == length).nonzero().squeeze(1)
            blocks = offsets[rows][:, None] + torch.arange(length, device=rows.device)
            inputs = (columns[blocks][..., None] * size + steps).flatten()
            # A padded column reads the last real one: the values stored for it are zero.
            inputs = inputs.clamp_(max=self._layout_size[1] - 1)
            if self._perm_in is not None:
                inputs = self._perm_in.long()[inputs]
            stacked = values[blocks].transpose(2, 3).reshape(len(rows), length * size, size).contiguous()
            groups.append(_RowGroup(rows, inputs, stacked))
        return groups


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if not _autocast(x):
        return functional.linear(x, weight, bias)
    with _in_given_dtypes(x):
        return functional.linear(x, weight, bias)


def _autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _in_given_dtypes(x: Tensor) -> AbstractContextManager[object]:
    # Autocast would choose another dtype for a product, which compiled kernels do not: paths must not differ in that.
    return torch.autocast(x.device.type, enabled=False) if _autocast(x) else nullcontext()


def _outside_inference_mode() -> torch.inference_mode:
    # What is made inside inference mode could not be used by a later call that records gradients.
    return torch.inference_mode(False)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _pack_bits(mask: Tensor) -> Tensor:
    """A mask as uint8, eight entries to a byte, the first one lowest."""
    flat = functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(dim=1).to(torch.uint8)


def _unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` entries of the mask, bool."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[:count].bool()
