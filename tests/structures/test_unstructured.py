"""The unstructured control: exact counts, the bitmask, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.structures import StructureOptions
from padst_cli.structures.unstructured import Unstructured


def test_it_is_never_exported():
    assert Unstructured.exportable is False


@pytest.mark.parametrize(("density", "count"), [(0.1, 1720), (0.5, 8600), (1e-9, 1), (1.0, 17200)])
def test_count_is_the_rounded_share_of_the_entries(density, count):
    spec = Unstructured.for_density(100, 172, density, StructureOptions())
    assert spec.count == spec.nonzeros == count


def test_the_largest_scores_are_kept():
    score = torch.rand(9, 31)
    mask = Unstructured(9, 31, count=50).project(score)
    assert torch.equal(mask, score >= score.flatten().sort(descending=True).values[49])


def test_packed_form_is_values_and_a_little_endian_bitmask():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = mask[1, 4] = True
    tensors = Unstructured(2, 5, count=3).pack(torch.arange(1.0, 11.0).view(2, 5) * mask, mask)
    assert tensors["values"].tolist() == [1, 4, 10]
    assert tensors["mask"].tolist() == [1 | 1 << 3, 1 << 1]


def test_a_bitmask_of_another_count_or_with_stray_bits_is_refused():
    spec = Unstructured(2, 5, count=3)
    values = torch.ones(3)
    spec.validate({"values": values, "mask": torch.tensor([9, 2], dtype=torch.uint8)})
    for mask, message in [([9, 0], "2 bits set"), ([255, 2], "9 bits set"), ([9, 2 | 128], "behind the last entry")]:
        with pytest.raises(PadstError, match=message):
            spec.validate({"values": values, "mask": torch.tensor(mask, dtype=torch.uint8)})
