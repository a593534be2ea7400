"""The dense product of a packed layer: its image unpacked into a scratch weight that all layers of a thread share.

Pays with many tokens and high densities, where unpacking costs little beside the product. Nothing dense is kept but
the one scratch weight, of the largest layer that took this way.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from ..cost import NEVER, Work
from ..layout import rows_of
from . import machine
from .library import TYPES, ImageHeader, library

NAME = "torch-dense-transient"

_STRUCTURES = ("diag", "nm", "block")
_scratch = threading.local()


class Limits(dict[tuple[int, torch.dtype], int]):
    """(threads, dtype of x) -> entries of x from which on the transient product wins, computed when missing."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __missing__(self, key: tuple[int, torch.dtype]) -> int:
        threads, dtype = key
        tokens = machine.costs(threads).transient_from(self.work, str(dtype).removeprefix("torch."))
        self[key] = limit = NEVER if tokens == NEVER else tokens * self.work.in_features
        return limit


@functools.lru_cache(maxsize=4096)
def limits(work: Work) -> Limits:
    """The limits of such a layer, shared by all layers that are alike."""
    return Limits(work)


def work_of(image: int) -> Work:
    """What the image at an address is to the cost model."""
    header = ImageHeader.from_address(image)
    structure, first = _STRUCTURES[header.structure], header.parameter
    if structure == "diag":
        entries = first[0] * min(header.out_features, header.in_features)
    elif structure == "nm":
        entries = first[2] * header.out_features
    else:
        entries = first[1] * first[0] ** 2
    dtype = next(str(dtype).removeprefix("torch.") for dtype, code in TYPES.items() if code == header.value_type)
    return Work.of(structure, first[1], dtype, header.out_features, header.in_features, entries)


def fill_dense(image: int, weight: Tensor, threads: int) -> Tensor:
    """Fill `weight` `[out, in]` (contiguous, float32, bfloat16 or float16) with W of the image at an address."""
    lib = library()
    if lib is None:
        raise RuntimeError("padst's compiled kernels are not installed")
    status = lib.padst_dense(image, weight.data_ptr(), TYPES[weight.dtype], threads)
    if status:
        raise MemoryError(f"padst could not unpack a weight {list(weight.shape)} (status {status})")
    return weight


def linear(image: int, x: Tensor, bias: Tensor | None, out_features: int, threads: int) -> Tensor:
    """`[..., in] -> [..., out]` in the dtype of x, without a record for gradients."""
    rows = rows_of(x)
    weight = fill_dense(image, _scratch_weight(out_features, x.shape[-1], x.dtype), threads).t()
    y = torch.empty((len(rows), out_features), dtype=x.dtype, device="cpu")
    # Into a given output, for autocast would choose another dtype otherwise: paths must not differ in that.
    if bias is None:
        torch.mm(rows, weight, out=y)
    else:
        torch.addmm(bias.to(x.dtype), rows, weight, out=y)
    return y.view(*x.shape[:-1], out_features)


def scratch_bytes() -> int:
    """Bytes of this thread's scratch weight, 0 before the first call that needs one."""
    room: Tensor | None = getattr(_scratch, "room", None)
    return 0 if room is None else room.numel()


def _scratch_weight(out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    size = out_features * in_features * dtype.itemsize
    if scratch_bytes() < size:
        with torch.inference_mode(False):
            _scratch.room = torch.empty(size, dtype=torch.uint8, device="cpu")
    room: Tensor = _scratch.room
    return room[:size].view(dtype).view(out_features, in_features)
