"""Sparse layers through padst's own C kernels (csrc/padst.h): one image a layer, which replaces the packed tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from ..layout import Layout
from .library import ISAS, TYPES, LayerHeader, library

ALIGN = 64
MOST_INPUTS = 65_000
"""Diagonals keep their starts in 16 bits."""

_TENSORS = {"diag": ("offsets",), "nm": ("indices",), "block": ("row_offsets", "col_indices")}


def supports(layout: Layout) -> bool:
    """Whether the compiled kernels are there and take this layer."""
    return (
        layout.structure in _TENSORS
        and layout.in_features <= MOST_INPUTS
        and layout.tensors["values"].dtype in TYPES
        and layout.tensors["values"].device.type == "cpu"
        and library() is not None
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def pack_image(layout: Layout) -> Tensor:
    """The layer's image, uint8 `[bytes]` on a 64-byte boundary, from its packed tensors and permutations."""
    lib = library()
    assert lib is not None
    values = layout.tensors["values"].contiguous()
    perms = [None if perm is None else perm.to(torch.int32).contiguous() for perm in (layout.perm_in, layout.perm_out)]
    header = LayerHeader(
        layout.out_features, layout.in_features, TYPES[values.dtype], _pointer(perms[0]), _pointer(perms[1])
    )
    indices = [layout.tensors[key].contiguous() for key in _TENSORS[layout.structure]]
    sizes = {
        "diag": lambda: (len(values),),
        "nm": lambda: (int(layout.parameters["n"]), int(layout.parameters["m"])),
        "block": lambda: (int(layout.parameters["block_size"]), len(values)),
    }[layout.structure]()
    pack = getattr(lib, f"padst_pack_{layout.structure}")
    arguments = (ctypes.byref(header), *sizes, *(index.data_ptr() for index in indices), values.data_ptr())
    size = pack(*arguments, None)
    if size < 0:
        raise MemoryError(f"no image of a {layout.structure} layer [{layout.out_features}, {layout.in_features}]")
    image = aligned(size)
    pack(*arguments, image.data_ptr())
    return image


def aligned(size: int) -> Tensor:
    """An uninitialised uint8 `[size]` that begins on a 64-byte boundary."""
    room = torch.empty(size + ALIGN, dtype=torch.uint8)
    shift = -room.data_ptr() % ALIGN
    return room[shift : shift + size]


def unpack_image(image: Tensor, tensors: Mapping[str, Tensor], structure: str) -> None:
    """Fill `tensors` (the packed tensors of the checkpoint, allocated) with what the image was made of, bit for bit."""
    lib = library()
    assert lib is not None
    indices = [tensors[key].data_ptr() for key in _TENSORS[structure]]
    status = lib.padst_unpack(image.data_ptr(), tensors["values"].data_ptr(), indices[0], (indices[1:] or [None])[0])
    if status:
        raise MemoryError(f"the image of a {structure} layer could not be read back (status {status})")


class NativeKernel:
    """y = (S x[perm_in])[perm_out] + b from the layer's image; math in float32, x and y float32, bfloat16 or float16.

    Gradients reach neither x nor the weight: callers that need them take another kernel.
    """

    def __init__(self, layout: Layout) -> None:
        lib = library()
        assert lib is not None
        self._forward = lib.padst_forward
        self._shape = (layout.out_features, layout.in_features)
        self.image = pack_image(layout)
        self._address = self.image.data_ptr()
        self.name = f"cpu-{ISAS[lib.padst_isa()]}-{layout.structure}"

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in] -> [..., out]` in the dtype of x."""
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self._shape[0])
        at_bias = None
        if bias is not None:
            if bias.dtype != x.dtype:
                bias = bias.to(x.dtype)
            at_bias = bias.data_ptr()
        status = self._forward(
            self._address,
            x.data_ptr(),
            TYPES[x.dtype],
            at_bias,
            y.data_ptr(),
            x.numel() // self._shape[1],
            torch.get_num_threads(),
        )
        if status:
            raise MemoryError(f"{self.name} ran out of memory")
        return y

    def prepare(self, dtype: torch.dtype) -> None:
        """Nothing is left to make: the image serves every dtype of x."""
        del dtype

    def resident_bytes(self) -> int:
        """Bytes of the image."""
        return self.image.numel()
