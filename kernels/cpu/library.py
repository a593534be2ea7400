"""The compiled kernels as a shared library: found, opened, told about threads, and tested before it is trusted.

A call through ctypes costs half a microsecond with four arguments, one with seven, and a torch custom operator twenty:
with one token that is the layer.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .isa import ISAS, allowed
from .selftest import agree

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class LayerHeader(ctypes.Structure):
    """`struct padst_layer` of padst.h."""

    _fields_ = (
        ("out_features", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("value_type", ctypes.c_int32),
        ("perm_in", _POINTER),
        ("perm_out", _POINTER),
    )


class ImageHeader(ctypes.Structure):
    """`struct padst_image` of padst.h."""

    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("structure", ctypes.c_int32),
        ("value_type", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("bytes", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("inv_in", "perm_out", "values", "indices", "starts")),
        ("parameter", ctypes.c_int32 * 8),
    )


class CallHeader(ctypes.Structure):
    """`struct padst_call` of padst.h."""

    _fields_ = (
        ("image", _POINTER),
        ("tokens", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("activation", ctypes.c_int32),
    )


def image_values(image: Tensor, count: int) -> Tensor:
    """The first `count` values of a float32 image, a view `[count]` into it."""
    first = ImageHeader.from_address(image.data_ptr()).values
    return image[first : first + 4 * count].view(torch.float32)


_HEADER = ctypes.POINTER(LayerHeader)
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "padst_pack_diag": (_LONG, (_HEADER, _INT, _POINTER, _POINTER, _POINTER)),
    "padst_pack_nm": (_LONG, (_HEADER, _INT, _INT, _POINTER, _POINTER, _POINTER)),
    "padst_pack_block": (_LONG, (_HEADER, _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER)),
    "padst_pack_rows": (_LONG, (_HEADER, _INT, _POINTER, _POINTER, _POINTER, _POINTER)),
    "padst_gradient": (_INT, (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _INT)),
    "padst_unpack": (_INT, (_POINTER, _POINTER, _POINTER, _POINTER)),
    "padst_unpack_permutations": (None, (_POINTER, _POINTER, _POINTER)),
    "padst_forward": (_INT, (_POINTER, _POINTER, _INT, _POINTER, _POINTER, _LONG, _INT)),
    "padst_run": (_INT, (_POINTER, _POINTER, _POINTER, _POINTER)),
    "padst_dense": (_INT, (_POINTER, _POINTER, _INT, _INT)),
    "padst_isa": (_INT, ()),
    "padst_use_isa": (_INT, (_INT,)),
    "padst_runs": (_INT, (_INT,)),
    "padst_set_team": (None, (_POINTER,)),
}


def find() -> Path | None:
    """The file of the library, None where padst was installed without a C compiler."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_native{suffix}"
        if path.is_file():
            return path
    return None


def open_library(path: Path) -> ctypes.CDLL:
    """Open the library at `path`, its functions typed, its threads those of torch's own OpenMP pool.

    A pool of our own would fight torch's for the cores, whose threads wait by spinning. Where the process holds no
    OpenMP library that knows GCC's entry, kernels run on the calling thread.
    """
    lib = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    team = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if team is not None:
        lib.padst_set_team(ctypes.cast(team, _POINTER))
    return lib


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library of this installation, opened once; None, after one warning, where there is none.

    Its kernels use no more than `isa.allowed()`, which may raise ValueError.
    """
    path = find()
    if path is None:
        warnings.warn(
            "padst was installed without its compiled kernels (no C compiler was found then): sparse layers run "
            "through plain torch operations, mostly slower; install a C compiler and padst again",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    lib = open_library(path)
    most = ISAS.index(allowed())
    portable, avx512 = ISAS.index("portable"), ISAS.index("avx512")
    if most < lib.padst_isa():
        lib.padst_use_isa(most)
    if most < avx512 or not lib.padst_runs(avx512):
        return lib
    if not agree(lib, LayerHeader, TYPES, portable, avx512):
        warnings.warn(
            "padst's AVX-512 kernels failed their test on this machine; AVX2 is used", RuntimeWarning, stacklevel=2
        )
    return lib


def isa_name() -> str:
    """The instruction set that the kernels run on, `none` without the library."""
    lib = library()
    return "none" if lib is None else ISAS[lib.padst_isa()]
