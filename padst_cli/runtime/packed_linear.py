"""A linear layer whose weight lives in packed form: the module that replaces `nn.Linear` and GPT-2's `Conv1D`."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from padst_kernels.dispatch import (
    COMPACT_DTYPES,
    Compact,
    DenseInPlace,
    Layout,
    NativeKernel,
    compact,
    differentiable,
    kernel_name,
    made,
    prepare,
    select,
)
from padst_kernels.plain import plain, transformed, version_of, watched
from padst_kernels.steps import GRID
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn import functional

from padst_cli.checkpoint.format import LayerFormat, value_dtype_name
from padst_cli.permutation.apply import check_permutation, from_structure, to_structure
from padst_cli.structures import Structure

_log = logging.getLogger("padst")


class PackedLinear(nn.Module):
    """y = (S x[..., perm_in])[..., perm_out] + b for x `[..., in]`, with S packed after its structure.

    `values` is a frozen parameter, indices and permutations are int buffers. The product is computed in the dtype of x,
    under autocast too: the values, stored in their own dtype, are converted to it (exact where x is the wider, rounded
    once where it is not). `epilogue` is an activation that follows, as kernels call it and as a module (`fusion.py`);
    none by default. The empty parameter `weight` stands in the file under the dense weight's name, so that a program
    that does not know the format stops on its shape; it also answers code that asks a layer for its weight's dtype or
    device.

    A layer is *compact* from its first call on, where compiled kernels serve it: their image holds the values and
    indices in the order they are read in, and the packed tensors are freed, so that `parameters()` and `buffers()` are
    without them. Whatever asks for these (an attribute, a state dict, a move or cast, a copy) gets them back bit for
    bit, and the next call compacts again. Threads may do either at any time: a lock is held while tensors and image
    change places, and calls of a compact layer take none. Values put in their place for a call, as by
    `torch.func.functional_call`, are used through a dense weight.
    """

    def __init__(
        self,
        layer_format: LayerFormat,
        value_dtype: torch.dtype = torch.float32,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate without values, as before loading; `dtype` is that of bias and activations, torch's default if
        None.
        """
        super().__init__()
        self.format = layer_format
        self.out_features = layer_format.structure.out_features
        self.in_features = layer_format.structure.in_features
        self.epilogue: tuple[str, nn.Module] | None = None
        self._lock = threading.RLock()
        self._layout: tuple[list[tuple[int, int]], Layout, list[Tensor | None]] | None = None
        self._native: Compact | None = None
        self._kept = tuple(layer_format.tensors(value_dtype))
        self._value_dtype = value_dtype
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        for key, (shape, kind) in layer_format.tensors(value_dtype).items():
            tensor = torch.empty(shape, dtype=kind, device=device)
            if key == "values":
                self.values = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(key, tensor)
        self.bias: nn.Parameter | None
        if layer_format.bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_sparse(
        cls,
        structure: Structure,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None = None,
        perm_in: Tensor | None = None,
        perm_out: Tensor | None = None,
        value_dtype: torch.dtype | None = None,
        *,
        transposed: bool = False,
    ) -> Self:
        """Pack S `[out, in]`, zero outside `mask` `[out, in]`; permutations int32 `[in]` and `[out]`.

        `value_dtype` None keeps the weight's. Raises `PadstError` for a dtype that the format cannot store.
        """
        value_dtype = weight.dtype if value_dtype is None else value_dtype
        value_dtype_name(value_dtype)
        layer_format = LayerFormat(structure, perm_in is not None, perm_out is not None, bias is not None, transposed)
        dtype = weight.dtype if bias is None else bias.dtype
        layer = cls(layer_format, value_dtype, dtype=dtype, device=weight.device)
        packed = dict(structure.pack(weight.detach().to(value_dtype), mask))
        for key, perm in (("perm_in", perm_in), ("perm_out", perm_out)):
            if perm is not None:
                packed[key] = perm
        with torch.no_grad():
            for key, tensor in packed.items():
                getattr(layer, key).copy_(tensor)
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in] -> [..., out]`; raises ValueError for another width or dtypes that are no floating point."""
        if not plain(x):
            return self._watched(x)
        native = self._native
        if native is not None and x.is_cpu and x.dtype in COMPACT_DTYPES:
            if self._parameters["values"] is not None:
                return self._with_given(x)
            bias, epilogue = self._parameters["bias"], self.epilogue
            if epilogue is None:
                return native(x, bias)
            if isinstance(native, NativeKernel) and epilogue[0] in native.epilogues:
                return native(x, bias, epilogue[0])
            return self._activated(native(x, bias))
        self._check(x)
        if x.is_cpu and x.dtype in COMPACT_DTYPES and self._compact(x.dtype) is not None:
            return self.forward(x)
        return self._run(select(self.layout(), x.numel() // self.in_features, x.dtype), x)

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype of the stored values."""
        return self._value_dtype if self._native is not None else self.values.dtype

    def packed_tensors(self) -> dict[str, Tensor]:
        """The structure's packed tensors by their names in the file, permutations and bias excluded."""
        stored = self._stored()
        return {key: stored[key] for key in self.format.structure.layout(self.value_dtype)}

    def structured_weight(self) -> Tensor:
        """S `[out, in]`, dense, in the dtype of the values."""
        return self.format.structure.unpack(self.packed_tensors())

    def support(self) -> Tensor:
        """The mask of the support in the coordinates of S, bool `[out, in]`."""
        return self.format.structure.unpack_mask(self.packed_tensors())

    def permutations(self) -> tuple[Tensor | None, Tensor | None]:
        """(perm_in, perm_out), None where the layer has none."""
        stored = self._stored()
        return stored.get("perm_in"), stored.get("perm_out")

    def dense_weight(self) -> Tensor:
        """W `[out, in]` with the permutations multiplied in, in the dtype of the values; computed anew at each call."""
        native = self._native
        if native is not None:
            return native.dense(self._value_dtype)
        return _materialise(self.format.structure, self.packed_tensors(), *self.permutations())

    def kernel_name(self, tokens: int, device: torch.device | None = None) -> str:
        """The name of the kernel that serves `tokens` rows of the layer's dtype where it now lives, or on `device`."""
        dtype, here, native = self.weight.dtype, self.weight.device, self._native
        if native is not None and device in (None, here):
            return str(native.name_at(tokens, dtype))
        return str(kernel_name(self.layout(), device or here, tokens, dtype))

    def prepared_bytes(self) -> int:
        """Bytes that its kernels keep beside its tensors (an image in their stead, a dense copy), 0 before the first
        call.
        """
        with self._lock:
            kernels = [
                *(self._layout[1].prepared.values() if self._layout else ()),
                *([self._native] if self._native else []),
            ]
            return sum(kernel.resident_bytes() for kernel in kernels)

    def extra_repr(self) -> str:
        """Shape, structure and sides, for `print(model)`."""
        structure = self.format.structure
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, structure={structure.name}, "
            f"density={structure.density:.4f}, perm_in={self.format.perm_in}, perm_out={self.format.perm_out}, "
            f"bias={self.format.bias}" + (f", epilogue={self.epilogue[0]}" if self.epilogue else "")
        )

    def _with_given(self, x: Tensor) -> Tensor:
        """With the values that somebody put into the table of a compact layer for one call, as functional_call does."""
        given = {key: table[key] for table in (self._parameters, self._buffers) for key in self._kept if key in table}
        tensors = {**self._stored(), **{key: tensor for key, tensor in given.items() if tensor is not None}}
        weight = self.format.structure.unpack(tensors)
        weight = from_structure(weight, tensors.get("perm_in"), tensors.get("perm_out")).to(x.dtype)
        return self._activated(functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype)))

    def _run(self, kernel: Any, x: Tensor) -> Tensor:
        """What a kernel computes, with the activation that follows in it where it has that."""
        result: Tensor
        if self.epilogue is not None and self.epilogue[0] in getattr(kernel, "epilogues", ()):
            result = kernel(x, self.bias, self.epilogue[0])
        else:
            result = self._activated(kernel(x, self.bias))
        return result

    def _activated(self, y: Tensor) -> Tensor:
        if self.epilogue is None:
            return y
        result: Tensor = self.epilogue[1](y)
        return result

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input has {x.shape[-1]} features, the layer takes {self.in_features}")
        if not (x.is_floating_point() or x.is_complex()):
            raise ValueError(f"input is {x.dtype}, the layer takes floating point")

    def layout(self) -> Layout:
        """What kernels are given of the layer, the same as long as its tensors are unchanged."""
        with self._lock:
            self._expand()
            tensors = [self._parameters["values"], *map(self._buffers.get, self._kept)]
            state = [_state_of(tensor) for tensor in tensors if tensor is not None]
            if self._layout is None or self._layout[0] != state:
                # With the tensors, so that no other comes to the id of one of them.
                self._layout = (state, self._make_layout(), tensors)
            return self._layout[1]

    def _make_layout(self) -> Layout:
        perm_in, perm_out = self.permutations()
        structure, tensors = self.format.structure, self.packed_tensors()
        self._validate(tensors, perm_in, perm_out)
        if self.values.requires_grad:
            _say_frozen()
        return Layout(
            structure=structure.name,
            out_features=self.out_features,
            in_features=self.in_features,
            density=structure.density,
            parameters=structure.parameters(),
            tensors=tensors,
            perm_in=perm_in,
            perm_out=perm_out,
            # Not a method of this module: a cycle would keep the dense copy until the garbage collector comes by.
            materialise=partial(_materialise, structure, tensors, perm_in, perm_out),
            support=partial(structure.unpack_mask, tensors),
            repack=partial(_repack, structure, perm_in, perm_out),
        )

    def _validate(self, tensors: Mapping[str, Tensor], perm_in: Tensor | None, perm_out: Tensor | None) -> None:
        """Raise `PadstError` for tensors that are not as the format says: kernels go where the indices lead.

        A file was checked when it was loaded, but not a state dict, which a cast as a whole spoils.
        """
        device = tensors["values"].device
        # No device may be asked for values while a CUDA graph is captured; that layers are new there is said later.
        if device.type == "meta" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        self.format.structure.validate(tensors)
        for side, perm, size in (("perm_in", perm_in, self.in_features), ("perm_out", perm_out, self.out_features)):
            if perm is not None:
                check_permutation(perm, size, side)

    def _compact(self, dtype: torch.dtype) -> Compact | None:
        """Put what kernels run from in the place of the packed tensors; None where no compiled kernel serves the layer.

        `dtype` is that of the activations.
        """
        with self._lock:
            if self._native is not None:
                return self._native  # another thread was the first
            kernel = compact(self.layout(), dtype)
            if kernel is not None:
                self._layout = None
                self._value_dtype = self.values.dtype
                self._native = kernel
                for table in (self._parameters, self._buffers):
                    table.update((key, None) for key in self._kept if key in table)
            return kernel

    def _stored(self) -> dict[str, Tensor]:
        """Packed tensors and permutations as the file holds them: the layer's own, or read back from the image."""
        with self._lock:
            layouts = self.format.tensors(self.value_dtype)
            if self._native is None:
                return {key: getattr(self, key).detach() for key in layouts}
            tensors = {key: torch.empty(shape, dtype=dtype, device="cpu") for key, (shape, dtype) in layouts.items()}
            self._native.unpack(tensors)
            return tensors

    def _expand(self) -> None:
        """Bring the packed tensors back from the image, but where others were put in their places; the lock is held."""
        if self._native is None:
            return
        with torch.inference_mode(False):  # what is made inside inference mode could not be changed outside it
            tensors = self._stored()
            values = nn.Parameter(tensors.pop("values"), requires_grad=False)
        if self._parameters["values"] is None:
            self._parameters["values"] = values
        self._buffers.update((key, tensor) for key, tensor in tensors.items() if self._buffers[key] is None)
        self._native = None

    @contextmanager
    def _expanded(self) -> Iterator[None]:
        """Keep the packed tensors in their places meanwhile, and let go of whatever was prepared."""
        with self._lock:
            self._layout = None
            self._expand()
            yield

    def _watched(self, x: Tensor) -> Tensor:
        """The same while somebody looks or x is more than its memory: the kernel as an operator, its image a constant.

        Under `torch.export` stand-ins take the place of tensors, of which no image can be made, and `torch.jit.trace`
        would record how one is: the graph of a layer that was never called with so many tokens holds the packed tensors
        and unpacks them at each call, which is said.
        """
        self._check(x)
        # In this order: what a graph's tracer has read of the layer it takes for settled, before the image is made.
        if is_dynamo_compiling():
            self._prepare_for_tracing(x.dtype)
        elif self._native is None and watched():
            return self._as_made(x)
        elif x.is_cpu and x.dtype in COMPACT_DTYPES:
            self._compact(x.dtype)
        if self._native is not None and x.is_cpu and x.dtype in COMPACT_DTYPES:
            if self._parameters["values"] is not None:
                return self._with_given(x)
            if isinstance(self._native, DenseInPlace):
                return self._activated(self._native(x, self._parameters["bias"]))
            if not is_dynamo_compiling() and transformed(x):
                return self._activated(differentiable(self._native, x, self._parameters["bias"]))
            return self._activated(
                torch.ops.padst.sparse_linear(x, self._native.image, self._parameters["bias"], self.out_features)
            )
        layout = self._layout[1] if self._layout else self.layout()
        return self._run(select(layout, x.numel() // self.in_features, x.dtype), x)

    def _as_made(self, x: Tensor) -> Tensor:
        """By the kernel of an earlier call like this one; where there was none, by the weight, unpacked."""
        kernel = self._made(x)
        if kernel is not None:
            return self._run(kernel, x)
        _say_unpacked()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._activated(functional.linear(x, self.dense_weight().to(x.dtype), bias))

    def _made(self, x: Tensor) -> Any:
        """The kernel of an earlier call like this one, None where there was none or the layer has changed since.

        A graph for any number of tokens gets the kernel for that of its example: asking the number would fix it.
        """
        if self._layout is None:
            return None
        state, layout, tensors = self._layout
        if state != [_state_of(tensor) for tensor in tensors if tensor is not None]:
            return None
        tokens: Any = x.numel() // self.in_features
        if isinstance(tokens, torch.SymInt):
            tokens = tokens.node.hint  # torch's own names for this change with its versions
        return made(layout, GRID[-1] if tokens is None else int(tokens), x.dtype)

    @torch.compiler.assume_constant_result
    def _prepare_for_tracing(self, dtype: torch.dtype) -> bool:
        # Runs while torch.compile traces, not in the graph: reordering values depends on data and would break it. A
        # graph keeps the values it was traced with until the module is moved, cast or loaded anew. A method, for torch
        # up to 2.11 takes no module as the argument of such a function.
        if dtype not in COMPACT_DTYPES or (self._native is None and self._compact(dtype) is None):
            prepare(self.layout(), dtype)
        return True

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get("_kept", ()):
            return super().__getattr__(name)
        with self._lock:
            self._expand()
            return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("_kept", ()):
            super().__setattr__(name, value)
            return
        with self._expanded():
            super().__setattr__(name, value)

    # The tensors come back wherever they can be read or changed from outside; images are never copied or pickled.

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; training mode drops what kernels prepared."""
        if not mode:
            return super().train(mode)
        with self._expanded():
            return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        with self._expanded():
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._expanded():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._expanded():
            super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        with self._expanded():
            # With tables of its own, for a shallow copy would see those of this layer emptied; a lock is not copied.
            state = {**self.__dict__, "_parameters": dict(self._parameters), "_buffers": dict(self._buffers)}
            del state["_lock"]
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_lock": threading.RLock()})


@functools.cache
def _say_unpacked() -> None:
    _log.warning(
        "a packed layer that was never called is traced as one that unpacks its weight at each call, which is slow: "
        "call the model once before torch.export or torch.jit.trace, with as many tokens, on the device it will run on"
    )


@functools.cache
def _say_frozen() -> None:
    _log.warning(
        "a packed layer's values ask for gradients, but are frozen: none reach them, and an optimizer will not change "
        "them; `padst sparsify` trains sparse layers"
    )


def _state_of(tensor: Tensor) -> tuple[int, int]:
    return id(tensor), version_of(tensor)


def _materialise(
    structure: Structure, tensors: Mapping[str, Tensor], perm_in: Tensor | None, perm_out: Tensor | None
) -> Tensor:
    with torch.no_grad():
        return from_structure(structure.unpack(tensors), perm_in, perm_out)


def _repack(
    structure: Structure, perm_in: Tensor | None, perm_out: Tensor | None, weight: Tensor, support: Tensor
) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(structure.pack(to_structure(weight, perm_in, perm_out), support))
