"""Block sparsity: dense B x B blocks on an aligned grid, stored as block-CSR."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from padst_cli.errors import PadstError
from padst_cli.structures.base import DoesNotFit, Structure, StructureOptions, TensorLayout, register

BLOCK_SIZES = (16, 32, 64)
ROW_RULES = ("even", "free")

FREE_FROM = 8
"""Columns of blocks from which on "auto" lets score decide (BENCHMARKS.md, "Rows of blocks")."""


@register
@dataclass(frozen=True)
class Block(Structure):
    """`count` blocks of `block_size` x `block_size` on a grid of ceil(out / B) x ceil(in / B); edge blocks are padded.

    With `rows` "even" every block row has floor(count / block rows) blocks, some one more: a unit table of block rows x
    block columns. With "free" they lie anywhere: one group of all blocks. A free choice by score is the better one, but
    where there are few columns: there it leaves too many block rows empty, and their outputs dead.

    Packed as block-CSR (the vocabulary is that of stanford-futuredata/stk): `values [count, B, B]`, `row_offsets` int32
    `[block rows + 1]`, `col_indices` int32 `[count]`, ascending within a block row; padding is stored as 0.
    """

    block_size: int
    count: int
    rows: str

    name: ClassVar[str] = "block"

    @classmethod
    def for_density(cls, out_features: int, in_features: int, density: float, options: StructureOptions) -> Self:
        """The number of blocks whose `nonzeros` come closest to density * out * in, the greater on a tie.

        Where B divides both sides that is round(density * blocks), at least one. Raises `DoesNotFit` when a block is
        larger than the matrix.
        """
        size = options.block_size
        rows = options.block_rows
        if rows == "auto":
            rows = "free" if in_features >= FREE_FROM * size else "even"
        cls(out_features, in_features, size, 1, rows).check_parameters()
        if min(out_features, in_features) < size:
            raise DoesNotFit(f"a {size} x {size} block is larger than the {out_features} x {in_features} matrix")

        def nonzeros(count: int) -> int:
            return cls(out_features, in_features, size, count, rows).nonzeros

        target = density * out_features * in_features
        block_rows, block_columns = -(-out_features // size), -(-in_features // size)
        above = min(
            1 + bisect_left(range(1, block_rows * block_columns), target, key=nonzeros), block_rows * block_columns
        )
        if above > 1 and target - nonzeros(above - 1) < nonzeros(above) - target:
            above -= 1
        return cls(out_features, in_features, size, above, rows)

    def at_density(self, density: float) -> Self:
        """With the blocks that `for_density` would choose, at least as many as here."""
        options = StructureOptions(block_size=self.block_size, block_rows=self.rows)
        wider = self.for_density(self.out_features, self.in_features, density, options)
        return replace(self, count=max(self.count, wider.count))

    def check_parameters(self) -> None:
        """Raise `PadstError` for an unknown block size or row rule, or a count that the grid cannot hold."""
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise PadstError(f"structure 'block' needs block_size to be one of {BLOCK_SIZES}, not {self.block_size!r}")
        if self.rows not in ROW_RULES:
            raise PadstError(f"structure 'block' needs rows to be one of {ROW_RULES}, not {self.rows!r}")
        block_rows, block_columns = self.grid
        self._check_integer("count", 1, block_rows * block_columns)

    @property
    def grid(self) -> tuple[int, int]:
        """(block rows, block columns)."""
        return -(-self.out_features // self.block_size), -(-self.in_features // self.block_size)

    @property
    def nonzeros(self) -> int:
        """The most entries that a support of this many blocks can cover.

        Blocks at a ragged edge cover fewer, so the support of a given mask is never larger than this figure, and as
        large where B divides both sides.
        """
        size = self.block_size
        heights, widths = _ragged(self.out_features, size), _ragged(self.in_features, size)
        if self.rows == "free":
            kinds = sorted(((h * w, m * n) for h, m in heights for w, n in widths), reverse=True)
            covered, left = 0, self.count
            for area, available in kinds:
                taken = min(left, available)
                covered += taken * area
                left -= taken
            return covered
        each, extra = divmod(self.count, self.grid[0])
        covered = 0
        for height, available in heights:
            taken = min(extra, available)
            extra -= taken
            longer, shorter = min((each + 1) * size, self.in_features), min(each * size, self.in_features)
            covered += height * (taken * longer + (available - taken) * shorter)
        return covered

    @property
    def note(self) -> str | None:
        """Which edge blocks are padded."""
        edges = []
        if self.out_features % self.block_size:
            edges.append(f"{self.out_features % self.block_size} of {self.block_size} rows in the last block row")
        if self.in_features % self.block_size:
            edges.append(f"{self.in_features % self.block_size} of {self.block_size} columns in the last block column")
        return f"edge blocks padded ({', '.join(edges)}); density is the most the blocks can cover" if edges else None

    @property
    def unit_shape(self) -> tuple[int, int]:
        """(block rows, block columns) for "even", (1, blocks) for "free"."""
        block_rows, block_columns = self.grid
        return (block_rows, block_columns) if self.rows == "even" else (1, block_rows * block_columns)

    def unit_scores(self, score: Tensor) -> Tensor:
        """The sum over each block."""
        return self._blocks(score).sum(dim=(2, 3)).view(self.unit_shape)

    def expand(self, active: Tensor) -> Tensor:
        """The mask `[out, in]` of the active blocks."""
        size = self.block_size
        grid = active.reshape(self.grid)
        full = grid.repeat_interleave(size, dim=0).repeat_interleave(size, dim=1)
        return full[: self.out_features, : self.in_features].contiguous()

    def units_of(self, mask: Tensor) -> Tensor:
        """The active blocks: those whose first entry is in the mask."""
        return (
            mask[:: self.block_size, :: self.block_size]
            .clone(memory_format=torch.contiguous_format)
            .view(self.unit_shape)
        )

    def select(self, unit_scores: Tensor) -> Tensor:
        """The best blocks of each block row, the spare ones to the rows whose next best scores highest ("even").

        "free" takes the best blocks anywhere.
        """
        groups, candidates = self.unit_shape
        each, extra = divmod(self.count, groups)
        ranked = unit_scores.sort(dim=1, descending=True, stable=True)
        quota = torch.full((groups,), each, device=unit_scores.device)
        if extra:
            quota[ranked.values[:, each].topk(extra).indices] += 1
        taken = torch.arange(candidates, device=unit_scores.device) < quota[:, None]
        return torch.zeros_like(taken).scatter_(1, ranked.indices, taken)

    def is_feasible(self, active: Tensor) -> bool:
        """Whether `count` blocks are active and, for "even", no block row has more than one more than another."""
        return self._counts_are_right(active.sum(dim=1))

    def layout(self, value_dtype: torch.dtype) -> dict[str, TensorLayout]:
        """Block-CSR: `values`, `row_offsets`, `col_indices`."""
        return {
            "values": ((self.count, self.block_size, self.block_size), value_dtype),
            "row_offsets": ((self.grid[0] + 1,), torch.int32),
            "col_indices": ((self.count,), torch.int32),
        }

    def pack(self, weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Block-CSR of S; raises ValueError as the base class says."""
        active = self._check_packable(weight, mask).view(self.grid)
        ends = active.sum(dim=1).cumsum(0)
        return {
            "values": self._blocks(weight)[active],
            "row_offsets": functional.pad(ends, (1, 0)).to(torch.int32),
            "col_indices": active.nonzero()[:, 1].to(torch.int32),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """S `[out, in]`."""
        values, size = tensors["values"], self.block_size
        block_rows, block_columns = self.grid
        dense = values.new_zeros(block_rows, size, block_columns, size)
        dense.transpose(1, 2)[self._block_row(tensors), tensors["col_indices"].long()] = values
        return dense.view(block_rows * size, -1)[: self.out_features, : self.in_features].contiguous()

    def unpack_mask(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The support `[out, in]`."""
        columns = tensors["col_indices"].long()
        active = torch.zeros(self.grid, dtype=torch.bool, device=columns.device)
        active[self._block_row(tensors), columns] = True
        return self.expand(active)

    def check_indices(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `PadstError` for broken row offsets, columns out of range or order, or values in the padding."""
        offsets, columns = tensors["row_offsets"].long(), tensors["col_indices"].long()
        lengths = offsets.diff()
        if int(offsets[0]) != 0 or int(offsets[-1]) != self.count or bool((lengths < 0).any()):
            raise PadstError(f"packed 'block' tensor 'row_offsets' does not rise from 0 to {self.count}")
        if not self._counts_are_right(lengths if self.rows == "even" else lengths.sum(dim=0, keepdim=True)):
            raise PadstError(
                "packed 'block' tensor 'row_offsets' does not spread the blocks evenly over the block rows"
            )
        if bool((columns < 0).any()) or bool((columns >= self.grid[1]).any()):
            raise PadstError(f"packed 'block' tensor 'col_indices' has entries outside 0 to {self.grid[1] - 1}")
        row = self._block_row(tensors)
        if bool(((columns.diff() <= 0) & (row.diff() == 0)).any()):
            raise PadstError("packed 'block' tensor 'col_indices' is not ascending within a block row")
        self._check_padding(tensors["values"], row, columns)

    def _check_padding(self, values: Tensor, row: Tensor, columns: Tensor) -> None:
        below, right = self.out_features % self.block_size, self.in_features % self.block_size
        last_row, last_column = self.grid[0] - 1, self.grid[1] - 1
        if (below and bool((values[row == last_row, below:] != 0).any())) or (
            right and bool((values[columns == last_column, :, right:] != 0).any())
        ):
            raise PadstError("packed 'block' tensor 'values' is not zero in the padding of an edge block")

    def _counts_are_right(self, per_group: Tensor) -> bool:
        each = self.count // len(per_group)
        inside = bool((per_group >= each).all()) and bool((per_group <= each + 1).all())
        return inside and int(per_group.sum()) == self.count

    def _block_row(self, tensors: Mapping[str, Tensor]) -> Tensor:
        lengths = tensors["row_offsets"].long().diff()
        rows = torch.arange(self.grid[0], device=lengths.device)
        return rows.repeat_interleave(lengths, output_size=len(tensors["col_indices"]))

    def _blocks(self, matrix: Tensor) -> Tensor:
        """`[out, in]` as blocks `[block rows, block columns, B, B]`, zeros in the padding."""
        size = self.block_size
        padded = functional.pad(matrix, (0, -self.in_features % size, 0, -self.out_features % size))
        return padded.reshape(self.grid[0], size, self.grid[1], size).transpose(1, 2)


def _ragged(length: int, size: int) -> list[tuple[int, int]]:
    """(extent, number) of the pieces when `length` is cut into runs of `size`; the last may be shorter."""
    whole, rest = divmod(length, size)
    return [(size, whole), (rest, 1)] if rest else [(size, whole)]
