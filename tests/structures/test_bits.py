"""Numbers packed several to a byte."""

from __future__ import annotations

import pytest
import torch

from padst_cli.structures.bits import pack_bits, packed_length, spare_bits_are_zero, unpack_bits


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 33])
def test_unpacking_gives_back_the_numbers(bits, count):
    numbers = torch.randint(2**bits, (3, 2, count), dtype=torch.uint8)
    packed = pack_bits(numbers, bits)
    assert packed.shape == (3, 2, packed_length(count, bits))
    assert torch.equal(unpack_bits(packed, bits, count), numbers)
    assert spare_bits_are_zero(packed, bits, count)
    for bit in range(8):
        stray = packed.clone()
        stray[1, 0, -1] |= 1 << bit
        used = count * bits - 8 * (packed.shape[-1] - 1)
        assert spare_bits_are_zero(stray, bits, count) == (bit < used)
