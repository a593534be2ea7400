"""Diagonal sparsity: K wrapped diagonals of the matrix, alone or in aligned bands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from padst_cli.errors import PadstError
from padst_cli.structures.base import DoesNotFit, Structure, StructureOptions, TensorLayout, register


@register
@dataclass(frozen=True)
class Diagonal(Structure):
    """`count` wrapped diagonals; with `band` b > 1 in runs of b neighbours whose first offset is a multiple of b.

    Diagonal o holds the entries ((i + o) mod out, i), i < in, where out >= in, else (i, (i + o) mod in), i < out (after
    DynaDiag, Tyagi et al., 2025, and PA-DST, arXiv 2510.14812). The one group of the unit table holds max(out, in)
    diagonals, or as many whole bands as fit; diagonals behind the last whole band belong to no unit.

    Packed: `values [K, min(out, in)]`, entry i of each diagonal at column i, and `offsets` int32 `[K]`, ascending.
    """

    count: int
    band: int

    name: ClassVar[str] = "diag"

    @classmethod
    def for_density(cls, out_features: int, in_features: int, density: float, options: StructureOptions) -> Self:
        """The spec with round(density * max(out, in) / band) bands, at least one.

        Raises `DoesNotFit` when there is no whole band, or when the diagonals left over by the bands are so many that
        the density cannot be reached.
        """
        diagonals, band = max(out_features, in_features), options.band
        if band < 1:
            raise PadstError(f"structure 'diag' needs a band of at least 1 diagonal, not {band}")
        bands = max(1, round(density * diagonals / band))
        if bands > diagonals // band:
            raise DoesNotFit(
                f"{diagonals} diagonals hold {diagonals // band} whole bands of {band}, "
                f"too few for density {density:.4g}"
            )
        spec = cls(out_features, in_features, bands * band, band)
        spec.check_parameters()
        return spec

    def at_density(self, density: float) -> Self:
        """With as many whole bands, at least as many as here and at most all that fit."""
        bands = min(round(density * self.diagonals / self.band), self.diagonals // self.band)
        return replace(self, count=max(self.count, bands * self.band))

    def check_parameters(self) -> None:
        """Raise `PadstError` unless the diagonals make whole bands and the matrix has as many."""
        diagonals = max(self.out_features, self.in_features)
        self._check_integer("band", 1, diagonals)
        self._check_integer("count", self.band, diagonals // self.band * self.band)
        if self.count % self.band:
            raise PadstError(f"structure 'diag' has {self.count} diagonals, which make no whole bands of {self.band}")

    @property
    def length(self) -> int:
        """Entries of one diagonal: min(out, in)."""
        return min(self.out_features, self.in_features)

    @property
    def diagonals(self) -> int:
        """Diagonals of the whole matrix: max(out, in)."""
        return max(self.out_features, self.in_features)

    @property
    def nonzeros(self) -> int:
        """K * min(out, in)."""
        return self.count * self.length

    @property
    def note(self) -> str | None:
        """How many diagonals belong to no band."""
        left = self.diagonals % self.band
        return f"{left} of {self.diagonals} diagonals belong to no band of {self.band} and stay empty" if left else None

    @property
    def unit_shape(self) -> tuple[int, int]:
        """(1, max(out, in) // band)."""
        return 1, self.diagonals // self.band

    def unit_scores(self, score: Tensor) -> Tensor:
        """The sum over each diagonal or band."""
        per_diagonal = self._sheared(self._wide(score)).sum(dim=0)
        _, bands = self.unit_shape
        return per_diagonal[: bands * self.band].view(bands, self.band).sum(dim=1)[None]

    def spread(self, unit_values: Tensor) -> Tensor:
        """Give every entry `[out, in]` the value of its unit `[1, units]`, 0 where it has none; differentiable."""
        per_diagonal = unit_values[0].repeat_interleave(self.band)
        left = per_diagonal.new_zeros(self.diagonals - len(per_diagonal))
        twice = torch.cat([per_diagonal, left, per_diagonal, left])
        # Entry (i, c) of the wide matrix lies on diagonal (c - i) mod D: row i is the window of `twice` at D - i.
        windows = twice[self.diagonals - self.length + 1 :].unfold(0, self.diagonals, 1)
        return self._wide(windows[: self.length].flip(0)).contiguous()

    def expand(self, active: Tensor) -> Tensor:
        """The mask `[out, in]` of the active diagonals or bands."""
        return self.spread(active)

    def units_of(self, mask: Tensor) -> Tensor:
        """The active diagonals or bands, read off the first row (or column), whose entry o lies on diagonal o."""
        _, bands = self.unit_shape
        return self._wide(mask)[0, : bands * self.band : self.band].clone(memory_format=torch.contiguous_format)[None]

    def select(self, unit_scores: Tensor) -> Tensor:
        """The highest scores."""
        best = unit_scores.topk(self.count // self.band, dim=1, sorted=False).indices
        return torch.zeros(self.unit_shape, dtype=torch.bool, device=unit_scores.device).scatter_(1, best, True)

    def is_feasible(self, active: Tensor) -> bool:
        """Whether exactly K diagonals are active."""
        return int(active.sum()) * self.band == self.count

    def layout(self, value_dtype: torch.dtype) -> dict[str, TensorLayout]:
        """`values [K, min(out, in)]` and `offsets [K]`."""
        return {
            "values": ((self.count, self.length), value_dtype),
            "offsets": ((self.count,), torch.int32),
        }

    def pack(self, weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Values and offsets of the diagonals of S; raises ValueError as the base class says."""
        active = self._check_packable(weight, mask)
        offsets = active[0].repeat_interleave(self.band).nonzero().squeeze(1)
        values = self._sheared(self._wide(weight)).index_select(1, offsets).t().contiguous()
        return {"values": values, "offsets": offsets.to(torch.int32)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """S `[out, in]`."""
        values, length, diagonals = tensors["values"], self.length, self.diagonals
        overhang = values.new_zeros(length, diagonals + length - 1)
        sheared = overhang.as_strided((length, diagonals), (diagonals + length, 1))
        sheared.index_copy_(1, tensors["offsets"].long(), values.t())
        # What reaches over the right edge comes in again at the left, before the row's own start.
        wide = overhang[:, :diagonals].clone(memory_format=torch.contiguous_format)
        wide[:, : length - 1] = torch.where(
            torch.ones_like(wide[:, : length - 1], dtype=torch.bool).tril(-1),
            overhang[:, diagonals:],
            wide[:, : length - 1],
        )
        return self._wide(wide).contiguous()

    def unpack_mask(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The support `[out, in]`."""
        offsets = tensors["offsets"].long()
        active = torch.zeros(self.unit_shape, dtype=torch.bool, device=offsets.device)
        active[0, offsets[:: self.band] // self.band] = True
        return self.expand(active)

    def check_indices(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `PadstError` for offsets out of range or order, or that make no aligned bands."""
        offsets = tensors["offsets"].long()
        if bool((offsets < 0).any()) or bool((offsets >= self.diagonals).any()):
            raise PadstError(f"packed 'diag' tensor 'offsets' has entries outside 0 to {self.diagonals - 1}")
        if bool((offsets.diff() <= 0).any()):
            raise PadstError("packed 'diag' tensor 'offsets' is not ascending")
        bands = offsets.view(-1, self.band)
        steps = torch.arange(self.band, device=offsets.device)
        if bool((bands[:, 0] % self.band != 0).any()) or bool((bands != bands[:, :1] + steps).any()):
            raise PadstError(f"packed 'diag' tensor 'offsets' does not come in aligned bands of {self.band}")

    def _wide(self, matrix: Tensor) -> Tensor:
        """`[out, in]` as a view `[min, max]` in which diagonal o starts at (0, o); its own inverse up to the shape."""
        return matrix.t() if self.out_features >= self.in_features else matrix

    def _sheared(self, wide: Tensor) -> Tensor:
        """`[min, max]` with its diagonals as columns: entry (i, o) is (i, (i + o) mod max).

        Repeating the first columns behind the last turns the wrap-around into one constant stride, which spares an
        index matrix as large as the weight.
        """
        length, diagonals = wide.shape
        repeated = torch.cat([wide, wide[:, : length - 1]], dim=1)
        return repeated.as_strided((length, diagonals), (diagonals + length, 1))
