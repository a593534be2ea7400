"""N:M sparsity: at most N nonzeros in every M consecutive inputs of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from padst_cli.errors import PadstError
from padst_cli.structures.base import DoesNotFit, Structure, StructureOptions, TensorLayout, register
from padst_cli.structures.bits import pack_bits, packed_length, spare_bits_are_zero, unpack_bits

LARGEST_M = 32
PREFERRED_M = 16
CLOSE_ENOUGH = 0.005
WIDE, WIDE_TOLERANCE = 256, 0.01


@register
@dataclass(frozen=True)
class NM(Structure):
    """`n` nonzeros in each group of `m` consecutive inputs of a row (2:4 hardware's convention).

    When M does not divide the inputs the last group is padded: its `rest` real columns hold min(N, rest) nonzeros. The
    groups of the unit table are the row's groups, row by row; their candidates are the M slots.

    Packed: `values [out, G, N]` with slots ascending in column, and `indices` uint8 `[out, ceil(G * N * b / 8)]`, the
    columns within their groups in b = 1, 2, 4 or 8 bits each (the smallest that holds M - 1), little-endian within the
    byte. Slots that a short last group leaves unused repeat its last index and hold the value 0, so that a kernel may
    gather through them blindly.
    """

    n: int
    m: int

    name: ClassVar[str] = "nm"
    permute_inputs_only: ClassVar[bool] = True

    @classmethod
    def for_density(cls, out_features: int, in_features: int, density: float, options: StructureOptions) -> Self:
        """`options.nm`, or the largest M <= 16 with N / M within 0.005 of the density, or else the closest M <= 32.

        Where padding puts a layer of 256 inputs or more off by over 0.01, the M whose padded density is closest.
        Raises `DoesNotFit` when M exceeds the inputs.
        """
        if options.nm is None:
            if in_features < 2:
                raise DoesNotFit(f"a group needs at least 2 inputs, this layer has {in_features}")
            n, m = _choose(in_features, density)
        else:
            n, m = options.nm
            if m > in_features:
                raise DoesNotFit(f"{n}:{m} needs at least {m} inputs, this layer has {in_features}")
        spec = cls(out_features, in_features, n, m)
        spec.check_parameters()
        return spec

    def at_density(self, density: float) -> Self:
        """With round(density * M) of every M, at least as many as here."""
        return replace(self, n=max(self.n, round(density * self.m)))

    def check_parameters(self) -> None:
        """Raise `PadstError` unless 1 <= N <= M <= 32 and M <= inputs."""
        self._check_integer("m", 1, min(LARGEST_M, self.in_features))
        self._check_integer("n", 1, self.m)

    @property
    def groups(self) -> int:
        """Groups of a row, the padded one included."""
        return -(-self.in_features // self.m)

    @property
    def rest(self) -> int:
        """Real columns of a padded last group, 0 where M divides the inputs."""
        return self.in_features % self.m

    @property
    def index_bits(self) -> int:
        """Bits of one packed index."""
        return next(bits for bits in (1, 2, 4, 8) if self.m <= 2**bits)

    @property
    def nonzeros(self) -> int:
        """Out * (N for every whole group, min(N, rest) for a padded one)."""
        return self.out_features * _row_nonzeros(self.in_features, self.n, self.m)

    @property
    def note(self) -> str | None:
        """How many inputs a padded last group has."""
        return f"last group of each row padded ({self.rest} of {self.m} inputs)" if self.rest else None

    @property
    def unit_shape(self) -> tuple[int, int]:
        """(out * groups of a row, M)."""
        return self.out_features * self.groups, self.m

    def unit_scores(self, score: Tensor) -> Tensor:
        """The score itself, a group to a row, with -inf in the padding."""
        padding = self.groups * self.m - self.in_features
        padded = functional.pad(score, (0, padding), value=float("-inf")) if padding else score.clone()
        return padded.reshape(self.unit_shape)

    def expand(self, active: Tensor) -> Tensor:
        """The mask `[out, in]` of the active slots."""
        return active.reshape(self.out_features, -1)[:, : self.in_features].clone(memory_format=torch.contiguous_format)

    def units_of(self, mask: Tensor) -> Tensor:
        """The slots of a mask, False in the padding."""
        padded = functional.pad(mask, (0, self.groups * self.m - self.in_features))
        return padded.reshape(self.unit_shape).clone()

    def select(self, unit_scores: Tensor) -> Tensor:
        """The N best of each group, out of its real columns."""
        scores = unit_scores.reshape(self.out_features, self.groups, self.m)
        active = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        for groups, width in self._spans():
            best = scores[:, groups, :width].topk(min(self.n, width), dim=2, sorted=False).indices
            active[:, groups, :width].scatter_(2, best, True)
        return active.view(self.unit_shape)

    def is_feasible(self, active: Tensor) -> bool:
        """Whether every group has N active slots (a short last one min(N, rest)), none of them in the padding."""
        table = active.reshape(self.out_features, self.groups, self.m)
        return all(
            bool((table[:, groups].sum(dim=2) == min(self.n, width)).all()) and not bool(table[:, groups, width:].any())
            for groups, width in self._spans()
        )

    def layout(self, value_dtype: torch.dtype) -> dict[str, TensorLayout]:
        """`values [out, G, N]` and bit-packed `indices`."""
        slots = self.groups * self.n
        return {
            "values": ((self.out_features, self.groups, self.n), value_dtype),
            "indices": ((self.out_features, packed_length(slots, self.index_bits)), torch.uint8),
        }

    def pack(self, weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Values and bit-packed indices of S; raises ValueError as the base class says."""
        active = self._check_packable(weight, mask).view(self.out_features, self.groups, self.m)
        padded = functional.pad(weight, (0, self.groups * self.m - self.in_features)).reshape(active.shape)
        values, indices = [], []
        for groups, width in self._spans():
            chosen, used = active[:, groups], min(self.n, width)
            # A mask's True entries come out row by row and ascending, equally many from each group.
            shape = (self.out_features, chosen.shape[1], used)
            slots = chosen.reshape(-1).nonzero().squeeze(1).remainder_(self.m).to(torch.uint8).view(shape)
            indices.append(torch.cat([slots, slots[..., -1:].expand(*shape[:2], self.n - used)], dim=2))
            values.append(functional.pad(padded[:, groups][chosen].view(shape), (0, self.n - used)))
        flat = torch.cat(indices, dim=1).reshape(self.out_features, -1)
        return {"values": torch.cat(values, dim=1), "indices": pack_bits(flat, self.index_bits)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """S `[out, in]`."""
        return self._scatter(tensors, tensors["values"])

    def unpack_mask(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The support `[out, in]`."""
        return self._scatter(tensors, torch.ones_like(tensors["values"], dtype=torch.bool))

    def unpack_indices(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The column of each slot within its group, uint8 `[out, G, N]`."""
        flat = unpack_bits(tensors["indices"], self.index_bits, self.groups * self.n)
        return flat.reshape(self.out_features, self.groups, self.n)

    def check_indices(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `PadstError` for columns out of range or order, or unused slots that are not as `pack` leaves them."""
        indices, values = self.unpack_indices(tensors), tensors["values"]
        for groups, width in self._spans():
            used = min(self.n, width)
            slots = indices[:, groups, :used]
            if bool((slots >= width).any()):
                raise PadstError(f"packed 'nm' tensor 'indices' has columns outside a group of {width}")
            if bool((slots[..., 1:] <= slots[..., :-1]).any()):
                raise PadstError("packed 'nm' tensor 'indices' is not ascending within a group")
            if bool((indices[:, groups, used:] != slots[..., -1:]).any()) or bool(
                (values[:, groups, used:] != 0).any()
            ):
                raise PadstError("packed 'nm' tensors do not leave the unused slots of the last group empty")
        if not spare_bits_are_zero(tensors["indices"], self.index_bits, self.groups * self.n):
            raise PadstError("packed 'nm' tensor 'indices' has bits set behind the last slot of a row")

    def _spans(self) -> list[tuple[slice, int]]:
        """The whole groups and the padded one, each with its number of real columns."""
        whole = self.in_features // self.m
        spans = [(slice(0, whole), self.m)]
        return [*spans, (slice(whole, None), self.rest)] if self.rest else spans

    def _scatter(self, tensors: Mapping[str, Tensor], values: Tensor) -> Tensor:
        indices = self.unpack_indices(tensors)
        dense = values.new_zeros(self.out_features, self.groups, self.m)
        for groups, width in self._spans():
            used = min(self.n, width)
            dense[:, groups].scatter_(2, indices[:, groups, :used].long(), values[:, groups, :used])
        return dense.view(self.out_features, -1)[:, : self.in_features].contiguous()


def _row_nonzeros(in_features: int, n: int, m: int) -> int:
    whole, rest = divmod(in_features, m)
    return whole * n + min(n, rest)


def _choose(in_features: int, density: float) -> tuple[int, int]:
    """N and M for a density; see `NM.for_density`."""
    options = [(max(1, round(density * m)), m) for m in range(2, min(LARGEST_M, in_features) + 1)]

    def error(option: tuple[int, int]) -> float:
        return abs(option[0] / option[1] - density)

    def padded_error(option: tuple[int, int]) -> float:
        return abs(_row_nonzeros(in_features, *option) / in_features - density)

    # Equal fractions must compare equal (1 - 0.9 is not 0.1), hence the slack and the rounding; the larger M wins.
    close = [option for option in options if option[1] <= PREFERRED_M and error(option) <= CLOSE_ENOUGH + 1e-9]
    chosen = close[-1] if close else min(reversed(options), key=lambda option: round(error(option), 9))
    if in_features >= WIDE and padded_error(chosen) > WIDE_TOLERANCE:
        return min(reversed(options), key=lambda option: round(padded_error(option), 9))
    return chosen
