"""Small unsigned numbers packed several to a byte, little-endian within the byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def packed_length(count: int, bits: int) -> int:
    """Bytes that `count` numbers of `bits` bits (1, 2, 4 or 8) take."""
    return -(-count * bits // 8)


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """uint8 `[..., count]`, each below 2**bits, to uint8 `[..., packed_length(count, bits)]`; spare high bits are 0."""
    per_byte = 8 // bits
    padded = functional.pad(numbers, (0, -numbers.shape[-1] % per_byte))
    packed = torch.zeros_like(padded[..., ::per_byte], memory_format=torch.contiguous_format)
    for slot in range(per_byte):
        packed |= padded[..., slot::per_byte] << (slot * bits)
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: the first `count` numbers, uint8 `[..., count]`."""
    per_byte = 8 // bits
    numbers = packed.new_empty(*packed.shape, per_byte)
    for slot in range(per_byte):
        numbers[..., slot] = (packed >> (slot * bits)) & (2**bits - 1)
    return numbers.flatten(-2)[..., :count]


def spare_bits_are_zero(packed: Tensor, bits: int, count: int) -> bool:
    """Whether the bits behind the first `count` numbers of `packed` `[..., bytes]` are all 0."""
    used = count * bits - 8 * (packed.shape[-1] - 1)
    return not bool((packed[..., -1].to(torch.int16) >> used).any())
