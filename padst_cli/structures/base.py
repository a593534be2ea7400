"""What every sparsity structure promises: a frozen spec, its units, and an exact packed form.

All tensors here live in the coordinates of S, the structured factor of W = S P or W = P S (DESIGN.md): permutations
are somebody else's business. A *unit* is what dynamic sparse training drops and grows as a whole: a diagonal (or a
band of them), a slot of an N:M group, a block, a single weight. Units form a table `[groups, candidates]`; a group
keeps its number of active units throughout training, so a drop in a group is always answered by a growth in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from padst_cli.errors import PadstError, nearest

TensorLayout = tuple[tuple[int, ...], torch.dtype]


class DoesNotFit(PadstError):
    """A structure cannot be laid over a layer of this shape; the message is the reason printed by the plan."""


@dataclass(frozen=True)
class StructureOptions:
    """What a user may fix about a structure; None leaves the choice to it.

    `nm`: (N, M) overrides the choice by density. `block_size`: B. `band`: diagonals come in aligned runs of this many.
    `block_rows`: "even" keeps equally many blocks (give or take one) in every block row, "free" lets score decide;
    "auto" is free where the matrix has many columns of blocks.
    """

    nm: tuple[int, int] | None = None
    block_size: int = 16
    band: int = 1
    block_rows: str = "auto"


@dataclass(frozen=True)
class Structure(ABC):
    """A sparsity pattern family fitted to one `[out_features, in_features]` matrix; subclasses add their parameters."""

    out_features: int
    in_features: int

    name: ClassVar[str]
    exportable: ClassVar[bool] = True
    permute_inputs_only: ClassVar[bool] = False
    """True where a permutation of the rows maps the family to itself (N:M), so only the input side gains."""

    # -- choosing parameters -------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def for_density(cls, out_features: int, in_features: int, density: float, options: StructureOptions) -> Self:
        """The member of the family closest to `density`, never under it by more than half a unit.

        Raises `DoesNotFit` with the reason when the shape admits no member.
        """

    @abstractmethod
    def at_density(self, density: float) -> Self:
        """The same layout (M, block size, band) at the nearest reachable density, never sparser than this one.

        As `density` falls, each choice of units can be made among those of the last one.
        """

    def parameters(self) -> dict[str, Any]:
        """The structure's own parameters as JSON values (shape excluded); inverse of `from_parameters`."""
        shape = {"out_features", "in_features"}
        return {key: value for key, value in asdict(self).items() if key not in shape}

    @classmethod
    def from_parameters(cls, out_features: int, in_features: int, parameters: Mapping[str, Any]) -> Self:
        """Rebuild a spec from a file; raises `PadstError` for missing, unknown or ill-typed parameters."""
        known = {field.name for field in fields(cls)} - {"out_features", "in_features"}
        if not isinstance(parameters, Mapping) or set(parameters) != known:
            raise PadstError(
                f"structure '{cls.name}' takes the parameters {sorted(known)}, the file gives {parameters!r}; "
                "it was written by another version of padst or is damaged"
            )
        spec = cls(out_features=out_features, in_features=in_features, **parameters)
        spec._check_integer("out_features", 1, 2**31 - 1)
        spec._check_integer("in_features", 1, 2**31 - 1)
        spec.check_parameters()
        return spec

    @abstractmethod
    def check_parameters(self) -> None:
        """Raise `PadstError` where a parameter read from a file is of the wrong type or out of range."""

    def _check_integer(self, key: str, low: int, high: int) -> None:
        value = getattr(self, key)
        if type(value) is not int or not low <= value <= high:
            raise PadstError(
                f"structure '{self.name}' needs {key} to be a whole number from {low} to {high} "
                f"for a matrix [{self.out_features}, {self.in_features}], not {value!r}"
            )

    # -- figures -------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def nonzeros(self) -> int:
        """How many entries of the `[out, in]` matrix the support covers (padding excluded)."""

    @property
    def density(self) -> float:
        """Nonzeros / (out * in)."""
        return self.nonzeros / (self.out_features * self.in_features)

    @property
    def note(self) -> str | None:
        """What the plan must say about this fit (padded last group or block, diagonals left out of bands), or None."""
        return None

    # -- units ---------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def unit_shape(self) -> tuple[int, int]:
        """(groups, candidates) of the unit table."""

    @abstractmethod
    def unit_scores(self, score: Tensor) -> Tensor:
        """Sum a score `[out, in]` over the entries of each unit: `[groups, candidates]`, -inf where no unit can be.

        The result never shares memory with `score`, so that it may be changed in place.
        """

    @abstractmethod
    def expand(self, active: Tensor) -> Tensor:
        """The bool mask `[out, in]` of the active units, bool `[groups, candidates]`."""

    @abstractmethod
    def units_of(self, mask: Tensor) -> Tensor:
        """The active units, bool `[groups, candidates]`, of a mask that `expand` could have made."""

    @abstractmethod
    def select(self, unit_scores: Tensor) -> Tensor:
        """The feasible choice of active units with the largest summed score, bool `[groups, candidates]`."""

    @abstractmethod
    def is_feasible(self, active: Tensor) -> bool:
        """Whether `active`, bool `[groups, candidates]`, has as many active units in each group as the spec allows."""

    def project(self, score: Tensor) -> Tensor:
        """The feasible support, bool `[out, in]`, that keeps the most of a nonnegative score `[out, in]`."""
        return self.expand(self.select(self.unit_scores(score)))

    # -- packing -------------------------------------------------------------------------------------------------

    @abstractmethod
    def layout(self, value_dtype: torch.dtype) -> dict[str, TensorLayout]:
        """Name -> (shape, dtype) of the packed tensors; `values` is always among them. Enough to allocate on meta."""

    @abstractmethod
    def pack(self, weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Pack S `[out, in]`, zero outside `mask`, into the tensors that `layout(weight.dtype)` names (contiguous).

        Raises ValueError when the mask is none of this spec's or the weight is not zero outside it.
        """

    def _check_packable(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The units of a mask that `pack` can hold; ValueError for any other mask or weight: a caller's mistake."""
        shape = (self.out_features, self.in_features)
        if tuple(weight.shape) != shape or tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"pack expects weight and bool mask {list(shape)}, "
                f"not {list(weight.shape)} and {mask.dtype} {list(mask.shape)}"
            )
        active = self.units_of(mask)
        if not self.is_feasible(active) or not torch.equal(self.expand(active), mask):
            raise ValueError(f"the mask is not a support of {self}")
        if bool(((weight != 0) & ~mask).any()):
            raise ValueError(f"the weight has nonzeros outside its mask, which {self} cannot hold")
        return active

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Exact inverse of `pack`: S `[out, in]` in the dtype of `values`."""

    @abstractmethod
    def unpack_mask(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The bool support `[out, in]` that was packed, also where a supported value is zero."""

    @abstractmethod
    def check_indices(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `PadstError` where an index is out of range, unsorted or repeated."""

    def validate(self, tensors: Mapping[str, Tensor]) -> None:
        """Check names, shapes, dtypes and indices of packed tensors; raises `PadstError` with one sentence."""
        if "values" not in tensors:
            raise PadstError(f"packed '{self.name}' tensors lack 'values'")
        if not tensors["values"].is_floating_point():
            raise PadstError(f"packed '{self.name}' tensor 'values' is {tensors['values'].dtype}, not floating point")
        for key, (shape, dtype) in self.layout(tensors["values"].dtype).items():
            if key not in tensors:
                raise PadstError(f"packed '{self.name}' tensors lack '{key}'")
            found = tensors[key]
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise PadstError(
                    f"packed '{self.name}' tensor '{key}' is {found.dtype} {list(found.shape)}, "
                    f"expected {dtype} {list(shape)}"
                )
        self.check_indices(tensors)

    def packed_bytes(self, value_dtype: torch.dtype) -> int:
        """Bytes of all packed tensors of this layer, permutation and bias excluded."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.layout(value_dtype).values())


_REGISTRY: dict[str, type[Structure]] = {}


def register(cls: type[Structure]) -> type[Structure]:
    """Class decorator: make a structure known under its `name`."""
    _REGISTRY[cls.name] = cls
    return cls


def structure_names() -> list[str]:
    """Names of all registered structures, in order of registration."""
    return list(_REGISTRY)


def structure_class(name: str) -> type[Structure]:
    """The class registered under `name`; raises `PadstError` that names the choices."""
    if name not in _REGISTRY:
        raise PadstError(
            f"unknown structure '{name}'{nearest(name, list(_REGISTRY))}; choose one of {', '.join(_REGISTRY)}"
        )
    return _REGISTRY[name]
