"""N:M: the choice of N and M, the rule group by group, and what the packed form refuses."""

from __future__ import annotations

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.structures import DoesNotFit, StructureOptions
from padst_cli.structures.nm import NM


def chosen(in_features: int, density: float, nm: tuple[int, int] | None = None) -> tuple[int, int]:
    spec = NM.for_density(8, in_features, density, StructureOptions(nm=nm))
    return spec.n, spec.m


@pytest.mark.parametrize("in_features", [64, 172, 256, 768, 3072, 4096])
def test_choice_by_sparsity(in_features):
    assert chosen(in_features, 0.5) == (8, 16)
    assert chosen(in_features, 1 - 0.8) == (3, 15)
    assert chosen(in_features, 1 - 0.9) == (1, 10)
    assert chosen(in_features, 1 - 0.95) == (1, 20)
    assert chosen(in_features, 0.25) == (4, 16)


def test_an_explicit_choice_wins():
    assert chosen(768, 0.1, nm=(2, 4)) == (2, 4)
    with pytest.raises(DoesNotFit, match="4:32 needs at least 32 inputs, this layer has 16"):
        chosen(16, 0.1, nm=(4, 32))
    with pytest.raises(PadstError, match="needs n to be"):
        chosen(768, 0.1, nm=(5, 4))


def test_groups_are_never_longer_than_a_row():
    assert chosen(10, 0.05) == (1, 10)
    with pytest.raises(DoesNotFit, match="at least 2 inputs"):
        chosen(1, 0.5)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.6])
def test_padding_never_takes_a_wide_layer_off_its_density(density):
    for in_features in range(256, 420):
        spec = NM.for_density(4, in_features, density, StructureOptions())
        assert abs(spec.density - density) <= 0.01


@pytest.mark.parametrize(("in_features", "n", "m"), [(32, 2, 4), (30, 3, 8), (37, 8, 16), (33, 5, 32), (9, 1, 2)])
def test_every_group_keeps_its_n_best(in_features, n, m):
    spec = NM(6, in_features, n, m)
    score = torch.rand(6, in_features)
    mask = spec.project(score)
    for row in range(6):
        for start in range(0, in_features, m):
            group = score[row, start : start + m]
            kept = mask[row, start : start + m]
            assert int(kept.sum()) == min(n, len(group))
            assert kept.tolist() == (group >= group.sort(descending=True).values[min(n, len(group)) - 1]).tolist()


def test_padding_is_never_selected_even_against_impossible_scores():
    spec = NM(3, 10, n=3, m=4)
    scores = spec.unit_scores(torch.full((3, 10), float("-inf")))
    active = spec.select(scores)
    assert spec.is_feasible(active)
    assert not active.view(3, 3, 4)[:, 2, 2:].any()
    assert spec.note == "last group of each row padded (2 of 4 inputs)"
    assert NM(3, 12, n=3, m=4).note is None


@pytest.mark.parametrize(("m", "bits"), [(2, 1), (3, 2), (4, 2), (5, 4), (16, 4), (17, 8), (32, 8)])
def test_indices_take_the_fewest_bits(m, bits):
    spec = NM(5, 64, n=1, m=m)
    groups = -(-64 // m)
    assert spec.index_bits == bits
    assert spec.layout(torch.float16)["indices"] == ((5, -(-groups * bits // 8)), torch.uint8)


def test_packed_form_is_as_documented():
    spec = NM(1, 10, n=3, m=4)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    weight = torch.arange(1.0, 11.0)[None].where(mask, torch.zeros(()))
    tensors = spec.pack(weight, mask)
    assert tensors["values"].tolist() == [[[1, 3, 4], [6, 7, 8], [9, 10, 0]]]
    assert spec.unpack_indices(tensors).tolist() == [[[0, 2, 3], [1, 2, 3], [0, 1, 1]]]
    # Two bits a slot, the first slot lowest: 0,2,3,1 | 2,3,0,1 | 1.
    assert tensors["indices"].tolist() == [[0 | 2 << 2 | 3 << 4 | 1 << 6, 2 | 3 << 2 | 0 << 4 | 1 << 6, 1]]


def packed() -> tuple[NM, dict[str, torch.Tensor]]:
    spec = NM(2, 22, n=3, m=5)
    mask = spec.project(torch.rand(2, 22))
    return spec, spec.pack(mask.float(), mask)


def with_slots(spec: NM, tensors: dict[str, torch.Tensor], group: int, slots: list[int]) -> dict[str, torch.Tensor]:
    """The tensors with the four-bit slots of one group of row 1 replaced."""
    indices = tensors["indices"].clone()
    for position, slot in enumerate(slots, start=group * spec.n):
        shift = 4 * (position % 2)
        indices[1, position // 2] = int(indices[1, position // 2]) & ~(15 << shift) & 255 | slot << shift
    return {**tensors, "indices": indices}


@pytest.mark.parametrize(
    ("group", "slots", "message"),
    [
        (1, [0, 1, 5], "columns outside a group of 5"),
        (1, [0, 1, 15], "columns outside a group of 5"),
        (4, [0, 2, 2], "columns outside a group of 2"),
        (2, [1, 0, 2], "not ascending"),
        (2, [1, 1, 2], "not ascending"),
        (4, [1, 1, 1], "not ascending"),
        (4, [0, 1, 0], "unused slots"),
    ],
)
def test_bad_indices_are_refused(group, slots, message):
    spec, tensors = packed()
    spec.validate(with_slots(spec, tensors, 1, [0, 2, 4]))
    with pytest.raises(PadstError, match=message):
        spec.validate(with_slots(spec, tensors, group, slots))


def test_values_in_unused_slots_and_stray_bits_are_refused():
    spec, tensors = packed()
    for junk in (1.0, float("nan")):
        values = tensors["values"].clone()
        values[0, -1, -1] = junk
        with pytest.raises(PadstError, match="unused slots"):
            spec.validate({**tensors, "values": values})
    with pytest.raises(PadstError, match="behind the last slot"):
        spec.validate(with_slots(spec, tensors, 5, [1]))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (1, 33), (1, 23), (1, 0)])
def test_bad_parameters_are_refused(n, m):
    with pytest.raises(PadstError):
        NM.from_parameters(4, 22, {"n": n, "m": m})
