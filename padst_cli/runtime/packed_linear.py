"""A linear layer whose weight lives in packed form: the module that replaces `nn.Linear` and GPT-2's `Conv1D`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from padst_kernels.dispatch import Layout, kernel_name, prepare, select
from torch import Tensor, nn

from padst_cli.checkpoint.format import LayerFormat, value_dtype_name
from padst_cli.permutation.apply import from_structure
from padst_cli.structures import Structure


class PackedLinear(nn.Module):
    """y = (S x[..., perm_in])[..., perm_out] + b for x `[..., in]`, with S packed after its structure.

    `values` is a frozen parameter, indices and permutations are int buffers. The product is computed in the dtype of
    x: the values, stored in their own dtype, are converted to it (exact where x is the wider, rounded once where it
    is not). The empty parameter `weight` stands in the file under the dense weight's name, so that a program that
    does not know the format stops on its shape; it also answers code that asks a layer for its weight's dtype or
    device.
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
        self._layout: tuple[Any, Layout] | None = None
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
        """`[..., in] -> [..., out]`."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input has {x.shape[-1]} features, the layer takes {self.in_features}")
        tracing = torch.compiler.is_compiling()
        if tracing:
            _prepare_for_tracing(self, x.dtype)
        layout = self._layout[1] if tracing and self._layout else self._current_layout()
        result: Tensor = select(layout, x.device, x.numel() // self.in_features)(x, self.bias)
        return result

    def packed_tensors(self) -> dict[str, Tensor]:
        """The structure's packed tensors by their names in the file, permutations and bias excluded."""
        keys = self.format.structure.layout(self.values.dtype)
        return {key: getattr(self, key).detach() for key in keys}

    def structured_weight(self) -> Tensor:
        """S `[out, in]`, dense, in the dtype of the values."""
        return self.format.structure.unpack(self.packed_tensors())

    def support(self) -> Tensor:
        """The mask of the support in the coordinates of S, bool `[out, in]`."""
        return self.format.structure.unpack_mask(self.packed_tensors())

    def permutations(self) -> tuple[Tensor | None, Tensor | None]:
        """(perm_in, perm_out), None where the layer has none."""
        buffers = dict(self.named_buffers(recurse=False))
        return buffers.get("perm_in"), buffers.get("perm_out")

    def dense_weight(self) -> Tensor:
        """W `[out, in]` with the permutations multiplied in, in the dtype of the values; computed anew at each call."""
        return _materialise(self.format.structure, self.packed_tensors(), *self.permutations())

    def kernel_name(self, tokens: int) -> str:
        """The name of the kernel that serves an input of `tokens` rows where the layer now lives."""
        structure = self.format.structure
        return str(kernel_name(structure.name, structure.density, self.values.device, tokens))

    def prepared_bytes(self) -> int:
        """Bytes that its kernels keep beside its tensors (a dense copy, for one), 0 before the first call."""
        kernels = self._layout[1].prepared.values() if self._layout else ()
        return sum(kernel.resident_bytes() for kernel in kernels)

    def extra_repr(self) -> str:
        """Shape, structure and sides, for `print(model)`."""
        structure = self.format.structure
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, structure={structure.name}, "
            f"density={structure.density:.4f}, perm_in={self.format.perm_in}, perm_out={self.format.perm_out}, "
            f"bias={self.format.bias}"
        )

    def _current_layout(self) -> Layout:
        state = _state_of(self.values)
        if self._layout is not None and self._layout[0] == state:
            return self._layout[1]
        perm_in, perm_out = self.permutations()
        structure, tensors = self.format.structure, self.packed_tensors()
        layout = Layout(
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
        )
        self._layout = (state, layout)
        return layout

    # What kernels prepared is dropped wherever the tensors can change behind it, and never copied or pickled.

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; training mode drops what kernels prepared."""
        if mode:
            self._layout = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._layout = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._layout = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layout": None}


@torch.compiler.assume_constant_result
def _prepare_for_tracing(layer: PackedLinear, dtype: torch.dtype) -> bool:
    # Runs while torch.compile traces, not in the graph: reordering blocks depends on data and would break it. A graph
    # keeps the values it was traced with until the module is moved, cast or loaded anew.
    prepare(layer._current_layout(), layer.values.device, dtype)
    return True


def _state_of(values: Tensor) -> tuple[int, int]:
    # Inference tensors cannot be changed in place outside inference mode and count no versions.
    return id(values), 0 if values.is_inference() else values._version


def _materialise(
    structure: Structure, tensors: Mapping[str, Tensor], perm_in: Tensor | None, perm_out: Tensor | None
) -> Tensor:
    with torch.no_grad():
        return from_structure(structure.unpack(tensors), perm_in, perm_out)
