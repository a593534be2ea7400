"""Sparse layers through padst's own C kernels (csrc/padst.h).

A layer runs from its *image*, one block of bytes in the kernels' order that replaces the packed tensors of the
checkpoint and gives them back bit for bit, so that nothing is held twice.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, empty_like, get_num_threads, is_grad_enabled
from torch.autograd import forward_ad

from ..activations import BY_TORCH, activate
from ..cost import FEW
from ..differentiable import differentiable, over_batch
from ..layout import Layout, rows_of
from . import transient
from .arena import image_memory
from .library import ACTIVATIONS, TYPES, CallHeader, ImageHeader, LayerHeader, isa_name, library

MOST_INPUTS = 65_000
"""Kernels keep positions of inputs in 16 bits."""

NO_DATA = -4
"""PADST_NO_DATA of csrc/padst.h."""

_NO_CALLS: tuple[Any, ...] = (None, None, 0, "", None, 0, None)

_TENSORS = {"diag": ("offsets",), "nm": ("indices",), "block": ("row_offsets", "col_indices")}


STRUCTURES = frozenset(_TENSORS)
"""Structures that have compiled kernels."""


def serves(structure: str, in_features: int, device: torch.device, values: torch.dtype) -> bool:
    """Whether the compiled kernels are there and take such a layer, its values of this dtype, on this device."""
    fits = structure in STRUCTURES and in_features <= MOST_INPUTS and values in TYPES
    return fits and device.type == "cpu" and library() is not None


def kernel_name(structure: str) -> str:
    """The name of the compiled kernel for a structure: the instruction set it runs on, and the structure."""
    return f"cpu-{isa_name()}-{structure}"


class NativeKernel:
    """y = (S x[perm_in])[perm_out] + b from the layer's image; math in float32, x and y float32, bfloat16 or float16.

    A call may end in an activation, one of `epilogues`: it is taken of sums before these leave the kernel. Gradients
    reach x and the bias, and their tangents in forward mode reach y, unless in `no_grad`, where nothing looks for any.
    """

    epilogues = frozenset(BY_TORCH)

    def __init__(self, layout: Layout) -> None:
        self.name = kernel_name(layout.structure)
        self.structure = layout.structure
        self.out_features, self.in_features = layout.out_features, layout.in_features
        self.image = _pack(layout)
        self._address = self.image.data_ptr()
        self._limits = transient.limits(transient.work_of(self._address))
        self._run = _library().padst_run
        self._recent = _NO_CALLS

    def __call__(self, x: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
        """`[..., in] -> [..., out]` in the dtype of x, which is plain (../plain.py) and on the CPU; raises ValueError
        for another width.

        With one token a layer takes no longer than a dozen calls into torch: whatever a call shares with the one before
        is kept in `_recent`, which is one tuple, so that threads can only replace it as a whole.
        """
        if is_grad_enabled() and (
            x.requires_grad or (bias is not None and bias.requires_grad) or forward_ad._current_level >= 0
        ):
            result = differentiable(self, x, bias)
            return activate(result, activation)
        # `_header` lies at the address; held while C reads it, for another thread may replace `_recent` meanwhile.
        shape, dtype, threads, ending, like, address, _header = self._recent
        if x.shape != shape or x.dtype is not dtype or get_num_threads() != threads or activation != ending:
            dtype, threads, like, address, _header = self._prepare(x, activation)
        if not address:
            result = transient.linear(self._address, x, bias, self.out_features, threads)
            return activate(result, activation)
        if not x.is_contiguous():
            x = x.contiguous()
        y = empty_like(like)
        if bias is None:
            status = self._run(address, x.data_ptr(), None, y.data_ptr())
        else:
            if bias.numel() != self.out_features:
                raise _wrong_bias(bias, self.out_features)
            if bias.dtype is not dtype or not bias.is_contiguous():
                bias = bias.to(dtype).contiguous()
            status = self._run(address, x.data_ptr(), bias.data_ptr(), y.data_ptr())
        if status:
            raise failed(self.name, status)
        return y

    def _prepare(self, x: Tensor, activation: str) -> tuple[torch.dtype, int, Tensor, int, CallHeader | None]:
        """What calls like the one with `x` share: dtype, threads, a tensor like y, and the address of their header with
        the header itself, 0 and None where the dense product is the faster.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input has {x.shape[-1]} features, the layer takes {self.in_features}")
        dtype, threads, entries = x.dtype, get_num_threads(), x.numel()
        # Not of y's size: it stays.
        like = torch.empty(1, dtype=dtype, device="cpu").expand(*x.shape[:-1], self.out_features)
        header, address = None, 0
        if entries <= FEW * self.in_features or entries < self._limits[threads, dtype]:
            header = CallHeader(
                self._address, entries // self.in_features, TYPES[dtype], threads, ACTIVATIONS[activation]
            )
            address = ctypes.addressof(header)
        self._recent = (x.shape, dtype, threads, activation, like, address, header)
        return dtype, threads, like, address, header

    def compute(self, x: Tensor, bias: Tensor | None, threads: int) -> Tensor:
        """The compiled kernel, however many tokens there are; no record for gradients."""
        return call(_library().padst_forward, self._address, x, bias, self.out_features, threads)

    def name_at(self, tokens: int, dtype: torch.dtype) -> str:
        """The name of what computes `tokens` rows of `dtype`."""
        limit = self._limits[torch.get_num_threads(), dtype]
        return transient.NAME if tokens * self.in_features >= limit else self.name

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W `[out, in]`, permutations folded in, in float32, bfloat16 or float16."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device="cpu")
        return transient.fill_dense(self._address, weight, torch.get_num_threads())

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors`, allocated as the checkpoint has them (`values`, indices, permutations), bit for bit."""
        keys = _TENSORS[self.structure]
        indices = [tensors[key].data_ptr() for key in keys] + [None] * (2 - len(keys))
        status = _library().padst_unpack(self._address, tensors["values"].data_ptr(), *indices)
        if status:
            raise MemoryError(f"{self.name}: the image could not be read back (status {status})")
        perms = (pointer(tensors.get("perm_in")), pointer(tensors.get("perm_out")))
        _library().padst_unpack_permutations(self._address, *perms)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As a call, without an activation; for `differentiable`."""
        return self(x, bias)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """`[..., out] -> [..., in]`, out of the image, for the layer may have another by the time of a backward pass.

        Through an operator, which transforms leave as it is.
        """
        return dy @ torch.ops.padst.sparse_weight(self.image, self.out_features, self.in_features, dy.dtype)

    def resident_bytes(self) -> int:
        """Bytes of the image."""
        return self.image.numel()


@torch.library.custom_op("padst::sparse_linear", mutates_args=())
def sparse_linear(x: Tensor, image: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """The kernel as a torch operator, for graphs: x `[..., in]`, image uint8 `[bytes]` -> `[..., out_features]`.

    Eager code calls `NativeKernel`: an operator costs ten times as much a call.
    """
    address, threads = image.data_ptr(), torch.get_num_threads()
    header = ImageHeader.from_address(address)
    if (x.shape[-1], out_features) != (header.in_features, header.out_features):
        shape = header.out_features, header.in_features
        raise ValueError(f"a sparse layer {list(shape)} was called from {x.shape[-1]} features to {out_features}")
    if x.numel() >= transient.limits(transient.work_of(address))[threads, x.dtype]:
        return transient.linear(address, x, bias, out_features, threads)
    return call(_library().padst_forward, address, x, bias, out_features, threads)


@sparse_linear.register_fake
def _(x: Tensor, image: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    del image, bias
    return x.new_empty((*x.shape[:-1], out_features))


@sparse_linear.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, image: Tensor, bias: Tensor | None, out_features: int
) -> tuple[Tensor, int]:
    x_dim, image_dim, bias_dim, _ = in_dims
    if image_dim is not None:
        raise ValueError("a sparse layer's image cannot be one of a batch")
    product = torch.ops.padst.sparse_linear
    return over_batch(info, (x_dim, bias_dim), x, bias, lambda u, b: product(u, image, b, out_features)), 0


@torch.library.custom_op("padst::sparse_weight", mutates_args=())
def sparse_weight(image: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """W `[out, in]` of an image, dense: what the backward pass of a graph needs, and makes anew."""
    weight = torch.empty((out_features, in_features), dtype=dtype, device=image.device)
    return transient.fill_dense(image.data_ptr(), weight, torch.get_num_threads())


@sparse_weight.register_fake
def _(image: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return image.new_empty((out_features, in_features), dtype=dtype)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, image, bias, out_features = inputs
    del output
    ctx.save_for_backward(image)
    ctx.shape = out_features, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    (image,) = ctx.saved_tensors
    dx = dy @ torch.ops.padst.sparse_weight(image, *ctx.shape, dy.dtype) if ctx.needs_input_grad[0] else None
    db = rows_of(dy).sum(dim=0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dx, None, db, None


sparse_linear.register_autograd(_backward, setup_context=_keep_for_backward)


def call(
    forward: Callable[..., int], image: int, x: Tensor, bias: Tensor | None, out_features: int, threads: int
) -> Tensor:
    """One call of the C kernel on the image at an address: `[..., in] -> [..., out_features]`."""
    x = x.resolve_neg().contiguous()
    dtype, tokens = x.dtype, x.numel() // x.shape[-1]
    y = x.new_empty((*x.shape[:-1], out_features))
    at_bias = None
    if bias is not None:
        if bias.numel() != out_features:
            raise _wrong_bias(bias, out_features)
        if bias.dtype != dtype or not bias.is_contiguous():
            bias = bias.to(dtype).contiguous()
        at_bias = bias.data_ptr()
    status = forward(image, x.data_ptr(), TYPES[dtype], at_bias, y.data_ptr(), tokens, threads)
    if status:
        raise failed(f"padst's kernel for {out_features} outputs", status)
    return y


def failed(name: str, status: int) -> Exception:
    """What to raise where a kernel returned a status that is not 0."""
    if status == NO_DATA:
        return ValueError(f"{name} was called on a tensor that has no memory: its storage was freed")
    return MemoryError(f"{name} failed with status {status}")


def _wrong_bias(bias: Tensor, out_features: int) -> ValueError:
    return ValueError(f"the bias is {list(bias.shape)}, the layer has {out_features} outputs")


def _library() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise RuntimeError("padst's compiled kernels are not installed")
    return lib


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's data, for a C function that takes NULL for none."""
    return None if tensor is None else tensor.data_ptr()


def _pack(layout: Layout) -> Tensor:
    """The layer's image, uint8 `[bytes]` on a 64-byte boundary, from its packed tensors and permutations."""
    values = layout.tensors["values"].contiguous()
    perms = [None if perm is None else perm.to(torch.int32).contiguous() for perm in (layout.perm_in, layout.perm_out)]
    header = LayerHeader(
        layout.out_features, layout.in_features, TYPES[values.dtype], pointer(perms[0]), pointer(perms[1])
    )
    indices = [layout.tensors[key].contiguous() for key in _TENSORS[layout.structure]]
    if layout.structure == "nm":
        sizes: tuple[int, ...] = (int(layout.parameters["n"]), int(layout.parameters["m"]))
    elif layout.structure == "block":
        sizes = (int(layout.parameters["block_size"]), len(values))
    else:
        sizes = (len(values),)
    addresses = (index.data_ptr() for index in indices)
    return make_image(layout.structure, ctypes.byref(header), *sizes, *addresses, values.data_ptr())


def make_image(structure: str, *arguments: Any) -> Tensor:
    """What the packer of a structure makes of its arguments (csrc/padst.h): uint8 `[bytes]` on a 64-byte boundary."""
    pack = getattr(_library(), f"padst_pack_{structure}")
    size = pack(*arguments, None)
    if size < 0:
        raise MemoryError(f"padst's packer for {structure} failed with status {size}")
    image = image_memory(size)
    pack(*arguments, image.data_ptr())
    return image
