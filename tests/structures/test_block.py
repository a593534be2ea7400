"""Blocks: even and free rows, ragged edges, and what block-CSR refuses."""

from __future__ import annotations

import itertools

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.structures import DoesNotFit, StructureOptions
from padst_cli.structures.block import Block


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("rows", ["even", "free"])
def test_count_is_the_rounded_share_of_the_blocks(size, rows):
    for density in (0.05, 0.1, 0.2, 0.5, 0.999):
        spec = Block.for_density(768, 2304, density, StructureOptions(block_size=size, block_rows=rows))
        blocks = 768 * 2304 // size**2
        assert spec.count == max(1, int(density * blocks + 0.5))
        assert spec.note is None


def test_a_block_larger_than_the_matrix_does_not_fit():
    with pytest.raises(DoesNotFit, match="32 x 32 block is larger than the 17 x 300 matrix"):
        Block.for_density(17, 300, 0.5, StructureOptions(block_size=32))
    with pytest.raises(PadstError, match="block_size to be one of"):
        Block.for_density(17, 300, 0.5, StructureOptions(block_size=8))
    with pytest.raises(PadstError, match="rows to be one of"):
        Block.for_density(17, 300, 0.5, StructureOptions(block_rows="odd"))


@pytest.mark.parametrize("count", range(1, 13))
@pytest.mark.parametrize("rows", ["even", "free"])
def test_nonzeros_are_the_most_that_so_many_blocks_cover(count, rows):
    spec = Block(5, 7, block_size=2, count=count, rows=rows)
    masks = (spec.expand(torch.tensor(bits).view(spec.unit_shape)) for bits in choices(spec))
    assert spec.nonzeros == max(int(mask.sum()) for mask in masks)


def choices(spec: Block) -> list[tuple[bool, ...]]:
    tables = itertools.product((False, True), repeat=12)
    return [
        bits
        for bits in tables
        if sum(bits) == spec.count and spec.is_feasible(torch.tensor(bits).view(spec.unit_shape))
    ]


def test_even_rows_hold_equally_many_blocks_give_or_take_one():
    spec = Block(5 * 16, 7 * 16, block_size=16, count=12, rows="even")
    score = torch.rand(80, 112)
    score[:16] += 10.0
    per_row = spec.units_of(spec.project(score)).sum(dim=1).tolist()
    assert sorted(per_row) == [2, 2, 2, 3, 3]
    assert per_row[0] == 3


def test_free_rows_take_the_best_blocks_anywhere():
    spec = Block(5 * 16, 7 * 16, block_size=16, count=7, rows="free")
    score = torch.rand(80, 112)
    score[16:32] += 10.0
    mask = spec.project(score)
    assert bool(mask[16:32].all())
    assert int(mask.sum()) == 7 * 256


def test_note_names_the_padded_edges():
    note = Block.for_density(100, 37, 0.2, StructureOptions()).note
    assert note is not None
    assert "4 of 16 rows in the last block row, 5 of 16 columns in the last block column" in note


def test_packed_form_is_block_csr():
    spec = Block(3, 5, block_size=2, count=3, rows="free")
    active = torch.tensor([[True, False, True], [False, True, False]])
    weight = torch.arange(1.0, 16.0).view(3, 5)
    mask = spec.expand(active.view(1, 6))
    tensors = spec.pack(weight.where(mask, torch.zeros(())), mask)
    assert tensors["row_offsets"].tolist() == [0, 2, 3]
    assert tensors["col_indices"].tolist() == [0, 2, 1]
    assert tensors["values"].tolist() == [[[1, 2], [6, 7]], [[5, 0], [10, 0]], [[13, 14], [0, 0]]]


def packed(rows: str) -> tuple[Block, dict[str, torch.Tensor]]:
    spec = Block(70, 100, block_size=16, count=7, rows=rows)
    values = torch.zeros(7, 16, 16)
    offsets, columns = torch.tensor([0, 2, 3, 4, 6, 7]), torch.tensor([1, 4, 0, 3, 2, 6, 5])
    return spec, {"values": values, "row_offsets": offsets.int(), "col_indices": columns.int()}


@pytest.mark.parametrize(
    ("rows", "key", "content", "message"),
    [
        ("even", "col_indices", [1, 7, 0, 3, 2, 6, 5], "outside 0 to 6"),
        ("even", "col_indices", [-1, 4, 0, 3, 2, 6, 5], "outside 0 to 6"),
        ("even", "col_indices", [4, 1, 0, 3, 2, 6, 5], "not ascending"),
        ("even", "col_indices", [4, 4, 0, 3, 2, 6, 5], "not ascending"),
        ("free", "row_offsets", [0, 2, 3, 4, 6, 6], "rise from 0 to 7"),
        ("free", "row_offsets", [1, 2, 3, 4, 6, 7], "rise from 0 to 7"),
        ("free", "row_offsets", [0, 3, 2, 4, 6, 7], "rise from 0 to 7"),
        ("free", "row_offsets", [0, 9, 3, 4, 6, 7], "rise from 0 to 7"),
        ("even", "row_offsets", [0, 0, 2, 3, 5, 7], "evenly"),
    ],
)
def test_bad_indices_are_refused(rows, key, content, message):
    spec, tensors = packed(rows)
    spec.validate(tensors)
    with pytest.raises(PadstError, match=message):
        spec.validate({**tensors, key: torch.tensor(content, dtype=torch.int32)})


@pytest.mark.parametrize("place", [(6, 6, 0), (5, 0, 4)], ids=["below", "right"])
def test_values_in_the_padding_are_refused(place):
    spec, tensors = packed("even")
    for junk in (1.0, float("nan")):
        values = tensors["values"].clone()
        values[place] = junk
        with pytest.raises(PadstError, match="padding"):
            spec.validate({**tensors, "values": values})


@pytest.mark.parametrize(
    ("size", "count", "rows"), [(8, 1, "even"), (16, 36, "even"), (16, 0, "free"), (16, 1, "both")]
)
def test_bad_parameters_are_refused(size, count, rows):
    with pytest.raises(PadstError):
        Block.from_parameters(70, 100, {"block_size": size, "count": count, "rows": rows})


@pytest.mark.parametrize(("columns", "rows"), [(4, "even"), (7, "even"), (8, "free"), (48, "free")])
def test_auto_is_free_where_there_are_many_columns(columns, rows):
    assert Block.for_density(320, columns * 16, 0.1, StructureOptions()).rows == rows
