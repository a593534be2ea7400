"""Checking a padst checkpoint's files before anything is built on them: presence, shapes, dtypes, indices,
finiteness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from padst_cli.checkpoint.format import PadstFormat
from padst_cli.errors import PadstError
from padst_cli.permutation.apply import check_permutation

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * (self.dtype.itemsize if self.dtype else 0)


def read_headers(files: Iterable[Path], rename: Callable[[str], str] = str) -> dict[str, StoredTensor]:
    """Every tensor of safetensors files by `rename(name)`; no tensor data is read.

    Raises `PadstError` for a file that is not whole, is not safetensors, or repeats a tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (not a mapping)
                    name, part = rename(key), opened.get_slice(key)
                    if name in found:
                        raise PadstError(f"'{file.name}' repeats the tensor '{name}' of '{found[name].file.name}'")
                    found[name] = StoredTensor(file, key, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise PadstError(
                f"'{file}' is damaged or no safetensors file ({error}); fetch or export it again"
            ) from error
    return found


def verify_layers(header: PadstFormat, stored: Mapping[str, StoredTensor], *, where: str) -> None:
    """Check every packed tensor that the header lists, shapes and dtypes first, then indices and permutations.

    Raises `PadstError` that names the tensor or layer and what is wrong.
    """
    for name, (shape, dtype) in header.tensors():
        tensor = stored.get(name)
        if tensor is None:
            raise PadstError(f"{where} lacks the tensor '{name}'; the checkpoint is not whole")
        if tensor.shape != shape or tensor.dtype != dtype:
            raise PadstError(
                f"{where}: tensor '{name}' is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
            )
    for name, layer in header.layers.items():
        marker = stored.get(f"{name}.weight")
        if marker is None or marker.shape != (0,):
            raise PadstError(f"{where}: '{name}.weight' is not the empty tensor of a packed layer; the file is damaged")
        names = layer.tensors(header.torch_value_dtype)
        _verify_layer(header, name, {key: read(stored[f"{name}.{key}"]) for key in names}, where)


def verify_finite(stored: Mapping[str, StoredTensor], *, where: str) -> None:
    """Raise `PadstError` that names the first stored tensor with a NaN or infinite entry; reads them one by one."""
    for name, tensor in stored.items():
        if tensor.dtype is not None and tensor.dtype.is_floating_point and not bool(torch.isfinite(read(tensor)).all()):
            raise PadstError(f"{where}: '{name}' holds NaN or infinite values; the checkpoint is damaged")


def read(tensor: StoredTensor) -> Tensor:
    """Read one tensor into memory."""
    with safe_open(tensor.file, framework="pt") as opened:
        value: Tensor = opened.get_tensor(tensor.key)
    return value


def _verify_layer(header: PadstFormat, name: str, tensors: Mapping[str, Tensor], where: str) -> None:
    layer = header.layers[name]
    try:
        layer.structure.validate(tensors)
        for side in ("perm_in", "perm_out"):
            if side in tensors:
                check_permutation(tensors[side], tensors[side].numel(), side)
    except PadstError as error:
        raise PadstError(f"{where}, layer '{name}': {error}") from None
