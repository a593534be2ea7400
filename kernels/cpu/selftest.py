"""Trust in an instruction set: its kernels must agree with the portable ones before they are used.

AVX-512 comes in many parts, and few who build padst can run it; so its kernels are not chosen by what the processor
claims alone. One small layer of every structure, with ragged sizes, is run by both, which takes a few milliseconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Largest difference, relative to the largest output: sums are taken in another order."""
_TOKENS = (1, 2, 3, 7, 20, 70)
_OUT, _IN = 75, 83


def agree(
    lib: ctypes.CDLL, header: type[ctypes.Structure], types: dict[torch.dtype, int], one: int, other: int
) -> bool:
    """Whether instruction sets `one` and `other` of the library give the same outputs for every structure and dtype.

    False also where one of them does not run here. Leaves `other` chosen, or what was chosen before where that fails.
    """
    generator = torch.Generator().manual_seed(0)
    before = lib.padst_isa()
    with torch.device("cpu"):  # kernels write to these tensors, whatever the caller's default device
        for dtype, code in types.items():
            for image in _images(lib, header, dtype, code, generator):
                for tokens in _TOKENS:
                    x = torch.randn(tokens, _IN, generator=generator)
                    found = [_run(lib, isa, image, x) for isa in (one, other)]
                    if any(y is None for y in found) or not _close(found):
                        lib.padst_use_isa(before)
                        return False
    return True


def _close(found: list[Tensor | None]) -> bool:
    first, second = (y for y in found if y is not None)
    limit = TOLERANCE * float(first.abs().max())
    return bool((first - second).abs().max() <= limit)  # NaN compares false


def _run(lib: ctypes.CDLL, isa: int, image: Tensor, x: Tensor) -> Tensor | None:
    if lib.padst_use_isa(isa):
        return None
    y = torch.full((len(x), _OUT), float("nan"))
    status = lib.padst_forward(image.data_ptr(), x.data_ptr(), 0, None, y.data_ptr(), len(x), 1)
    return None if status else y


def _images(
    lib: ctypes.CDLL, header: type[ctypes.Structure], dtype: torch.dtype, code: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Images of a diagonal layer, N:M layers for each width of an index, and a block layer, `[75, 83]`, permuted."""
    perms = [torch.randperm(size, generator=generator).to(torch.int32) for size in (_IN, _OUT)]
    layer = header(_OUT, _IN, code, perms[0].data_ptr(), perms[1].data_ptr())

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def packed(structure: str, *arguments: int | Tensor) -> Tensor:
        raw = [ctypes.byref(layer), *(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)]
        pack = getattr(lib, f"padst_pack_{structure}")
        image = torch.empty(pack(*raw, None), dtype=torch.uint8)
        pack(*raw, image.data_ptr())
        return image

    offsets = torch.tensor([0, 3, 40, 41, 82], dtype=torch.int32)
    yield packed("diag", len(offsets), offsets, random(len(offsets), _OUT))
    for n, m in ((2, 4), (1, 10), (3, 16), (2, 20)):
        bits = 2 if m <= 4 else 4 if m <= 16 else 8
        slots = -(-_IN // m) * n
        # Index 1 everywhere, by repeating it in every byte: any index below M is valid.
        indices = torch.full(
            (_OUT, -(-slots * bits // 8)), {2: 0b01010101, 4: 0b00010001, 8: 1}[bits], dtype=torch.uint8
        )
        yield packed("nm", n, m, indices, random(_OUT, slots))
    rows = torch.tensor([0, 2, 2, 4, 5, 6], dtype=torch.int32)
    columns = torch.tensor([0, 5, 1, 2, 3, 5], dtype=torch.int32)
    yield packed("block", 16, len(columns), rows, columns, random(len(columns), 16, 16))
