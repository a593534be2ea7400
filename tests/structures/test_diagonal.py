"""Diagonals: the definition entry by entry, bands, and what their packed form refuses."""

from __future__ import annotations

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.structures import DoesNotFit, StructureOptions
from padst_cli.structures.diagonal import Diagonal


def entries(out_features: int, in_features: int, offset: int) -> list[tuple[int, int]]:
    if out_features >= in_features:
        return [((i + offset) % out_features, i) for i in range(in_features)]
    return [(i, (i + offset) % in_features) for i in range(out_features)]


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (1, 5), (5, 1), (1, 1)], ids=str)
def test_diagonals_hold_the_entries_of_the_definition(shape):
    spec = Diagonal(*shape, count=max(1, max(shape) // 2), band=1)
    score = torch.rand(shape, dtype=torch.float64)
    scores = spec.unit_scores(score)
    for offset in range(max(shape)):
        active = torch.zeros(spec.unit_shape, dtype=torch.bool)
        active[0, offset] = True
        cells = entries(*shape, offset)
        assert sorted(map(tuple, spec.expand(active).nonzero().tolist())) == sorted(cells)
        assert float(scores[0, offset]) == pytest.approx(sum(float(score[cell]) for cell in cells))


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)], ids=str)
def test_values_lie_in_order_of_offset_and_entry(shape):
    spec = Diagonal(*shape, count=2, band=1)
    active = torch.zeros(spec.unit_shape, dtype=torch.bool)
    active[0, [1, 4]] = True
    mask = spec.expand(active)
    weight = torch.randn(shape).where(mask, torch.zeros(()))
    tensors = spec.pack(weight, mask)
    assert tensors["offsets"].tolist() == [1, 4]
    for row, offset in enumerate([1, 4]):
        assert tensors["values"][row].tolist() == [float(weight[cell]) for cell in entries(*shape, offset)]


def test_count_is_the_rounded_share_of_the_longer_side():
    for shape, density, count in [
        ((768, 3072), 0.1, 307),
        ((3072, 768), 0.1, 307),
        ((64, 64), 0.001, 1),
        ((8, 8), 1, 8),
    ]:
        spec = Diagonal.for_density(*shape, density, StructureOptions())
        assert (spec.count, spec.band, spec.note) == (count, 1, None)


def test_bands_are_aligned_runs_of_neighbours():
    spec = Diagonal.for_density(100, 37, 0.33, StructureOptions(band=16))
    assert spec.parameters() == {"count": 32, "band": 16}
    assert spec.unit_shape == (1, 6)
    assert spec.note == "4 of 100 diagonals belong to no band of 16 and stay empty"
    mask = spec.project(torch.rand(100, 37))
    offsets = spec.pack(mask.float(), mask)["offsets"].tolist()
    for start in (0, 16):
        assert offsets[start] % 16 == 0
        assert offsets[start : start + 16] == list(range(offsets[start], offsets[start] + 16))


def test_a_mask_with_a_broken_band_is_not_packed():
    spec = Diagonal(32, 32, count=16, band=16)
    plain = Diagonal(32, 32, count=16, band=1)
    shifted = plain.expand((torch.arange(32) >= 8).logical_and(torch.arange(32) < 24)[None])
    with pytest.raises(ValueError, match="not a support"):
        spec.pack(shifted.float(), shifted)


def test_bands_that_fit_nowhere_are_refused():
    with pytest.raises(DoesNotFit, match="hold 0 whole bands of 16"):
        Diagonal.for_density(15, 9, 0.5, StructureOptions(band=16))
    with pytest.raises(DoesNotFit, match="too few for density 1"):
        Diagonal.for_density(31, 31, 1.0, StructureOptions(band=16))
    with pytest.raises(PadstError, match="at least 1"):
        Diagonal.for_density(31, 31, 0.5, StructureOptions(band=0))


def test_spread_gives_each_entry_the_value_of_its_unit_and_carries_gradients():
    for shape in [(6, 6), (9, 4), (4, 9)]:
        spec = Diagonal(*shape, count=2, band=2)
        values = torch.rand(spec.unit_shape, dtype=torch.float64, requires_grad=True)
        spread = spec.spread(values)
        for offset in range(max(shape)):
            unit = offset // 2
            expected = float(values.detach()[0, unit]) if unit < spec.unit_shape[1] else 0.0
            assert all(float(spread.detach()[cell]) == expected for cell in entries(*shape, offset))
        weight = torch.rand(shape, dtype=torch.float64)
        (spread * weight).sum().backward()
        torch.testing.assert_close(values.grad, spec.unit_scores(weight))


@pytest.mark.parametrize(
    ("band", "offsets", "message"),
    [
        (1, [0, 1, 2, 40], "outside 0 to 39"),
        (1, [-1, 1, 2, 3], "outside 0 to 39"),
        (1, [0, 2, 1, 3], "not ascending"),
        (1, [0, 1, 1, 3], "not ascending"),
        (2, [0, 1, 3, 4], "aligned bands of 2"),
        (2, [0, 2, 4, 5], "aligned bands of 2"),
    ],
)
def test_bad_offsets_are_refused(band, offsets, message):
    spec = Diagonal(40, 24, count=4, band=band)
    tensors = {"values": torch.ones(4, 24), "offsets": torch.tensor(offsets, dtype=torch.int32)}
    with pytest.raises(PadstError, match=message):
        spec.validate(tensors)


@pytest.mark.parametrize(("count", "band"), [(3, 2), (42, 2), (0, 1), (16, 41), (40, 16)])
def test_bad_parameters_are_refused(count, band):
    with pytest.raises(PadstError):
        Diagonal.from_parameters(40, 24, {"count": count, "band": band})
