"""Unstructured sparsity: any mask of a given count. The control: trained and evaluated, never packed for speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from padst_cli.errors import PadstError
from padst_cli.structures.base import Structure, StructureOptions, TensorLayout, register
from padst_cli.structures.bits import pack_bits, packed_length, spare_bits_are_zero, unpack_bits


@register
@dataclass(frozen=True)
class Unstructured(Structure):
    """Any `count` entries of the matrix; one group in which every single weight is a unit.

    Packed (for the training form only): `values [count]` in row-major order and `mask` uint8 `[ceil(out * in / 8)]`,
    one bit an entry in row-major order, little-endian within the byte.
    """

    count: int

    name: ClassVar[str] = "unstructured"
    exportable: ClassVar[bool] = False

    @classmethod
    def for_density(
        cls,
        out_features: int,
        in_features: int,
        density: float,
        options: StructureOptions,  # noqa: ARG003 - part of the contract; single weights leave nothing to choose
    ) -> Self:
        """The spec with round(density * out * in) entries, at least one; takes no options."""
        return cls(out_features, in_features, max(1, round(density * out_features * in_features)))

    def at_density(self, density: float) -> Self:
        """With round(density * out * in) entries, at least as many as here."""
        return replace(self, count=max(self.count, round(density * self.out_features * self.in_features)))

    def check_parameters(self) -> None:
        """Raise `PadstError` unless 1 <= count <= out * in."""
        self._check_integer("count", 1, self.out_features * self.in_features)

    @property
    def nonzeros(self) -> int:
        """Exactly `count`."""
        return self.count

    @property
    def unit_shape(self) -> tuple[int, int]:
        """(1, out * in): single weights in row-major order."""
        return 1, self.out_features * self.in_features

    def unit_scores(self, score: Tensor) -> Tensor:
        """A copy of the score as `[1, out * in]`."""
        return score.clone(memory_format=torch.contiguous_format).view(self.unit_shape)

    def expand(self, active: Tensor) -> Tensor:
        """The mask `[out, in]` of active weights `[1, out * in]`."""
        return active.reshape(self.out_features, self.in_features).clone()

    def units_of(self, mask: Tensor) -> Tensor:
        """The mask as `[1, out * in]`."""
        return mask.reshape(self.unit_shape).clone()

    def select(self, unit_scores: Tensor) -> Tensor:
        """The `count` highest scores."""
        best = unit_scores.topk(self.count, dim=1, sorted=False).indices
        return torch.zeros(self.unit_shape, dtype=torch.bool, device=unit_scores.device).scatter_(1, best, True)

    def is_feasible(self, active: Tensor) -> bool:
        """Whether exactly `count` weights are active."""
        return int(active.sum()) == self.count

    def layout(self, value_dtype: torch.dtype) -> dict[str, TensorLayout]:
        """`values [count]` and `mask` uint8 `[ceil(out * in / 8)]`."""
        return {
            "values": ((self.count,), value_dtype),
            "mask": ((packed_length(self.unit_shape[1], 1),), torch.uint8),
        }

    def pack(self, weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Values in row-major order and the mask's bits; raises ValueError as the base class says."""
        self._check_packable(weight, mask)
        return {"values": weight[mask], "mask": pack_bits(mask.reshape(-1).to(torch.uint8), 1)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """S `[out, in]`."""
        values = tensors["values"]
        dense = values.new_zeros(self.out_features, self.in_features)
        dense[self.unpack_mask(tensors)] = values
        return dense

    def unpack_mask(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The support `[out, in]`."""
        flat = unpack_bits(tensors["mask"], 1, self.unit_shape[1])
        return flat.to(torch.bool).view(self.out_features, self.in_features)

    def check_indices(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `PadstError` unless the mask has `count` bits set and none behind its end."""
        found = int(self.unpack_mask(tensors).sum())
        if found != self.count:
            raise PadstError(f"packed 'unstructured' tensor 'mask' has {found} bits set, expected {self.count}")
        if not spare_bits_are_zero(tensors["mask"], 1, self.unit_shape[1]):
            raise PadstError("packed 'unstructured' tensor 'mask' has bits set behind the last entry of the matrix")
