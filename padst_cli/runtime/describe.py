"""What is in a folder that padst wrote, layer by layer, verified on the way: the substance of `padst inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from padst_cli.checkpoint.format import LayerFormat, PadstFormat
from padst_cli.checkpoint.reader import open_source, skeleton, weight_files
from padst_cli.errors import PadstError
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.quantizer import check_files, packed_layers, swap_layers
from padst_cli.runtime.verify import StoredTensor, read

TOKENS = (1, 512)


@dataclass(frozen=True)
class SideDescription:
    """One side's permutation: its length and how many entries it leaves in place."""

    size: int
    fixed_points: int


@dataclass(frozen=True)
class LayerDescription:
    """One sparse layer as it is stored. `dead_rows` and `dead_columns` count those of S without any supported entry."""

    name: str
    out_features: int
    in_features: int
    structure: str
    parameters: Mapping[str, Any]
    density: float
    nonzeros: int
    bias: bool
    packed_bytes: int
    perm_in: SideDescription | None
    perm_out: SideDescription | None
    dead_rows: int
    dead_columns: int
    kernels: Mapping[str, str]


@dataclass(frozen=True)
class Description:
    """A whole folder: what it is, its sparse layers, and its size on disk. It exists only where verification passed."""

    folder: str
    architecture: str
    task: str
    form: str
    version: int
    value_dtype: str
    layers: tuple[LayerDescription, ...]
    density: float
    packed_bytes: int
    total_bytes: int
    files: tuple[str, ...]


def describe(model: str, *, device: str | torch.device = "cpu") -> Description:
    """Verify a padst folder (or hub id) to the last index and describe it; `device` is the one whose kernels are named.

    Raises `PadstError` for the first thing that is wrong, and for a model that padst did not write.
    """
    source = open_source(model)
    if source.padst is None:
        raise PadstError(f"'{model}' is a dense model ({source.architecture}); padst inspect reads what padst wrote")
    files = weight_files(source.folder, model)
    whole = skeleton(source)
    header = swap_layers(whole, source.padst)
    stored = check_files(whole, header, files)
    modules = packed_layers(whole)
    layers = tuple(
        _describe_layer(name, layer, header, stored, modules[name], torch.device(device))
        for name, layer in header.layers.items()
    )
    entries = sum(layer.out_features * layer.in_features for layer in layers)
    return Description(
        folder=str(source.folder),
        architecture=source.architecture,
        task=source.task,
        form=header.form,
        version=header.version,
        value_dtype=header.value_dtype,
        layers=layers,
        density=sum(layer.nonzeros for layer in layers) / entries,
        packed_bytes=sum(layer.packed_bytes for layer in layers),
        total_bytes=sum(tensor.bytes for tensor in stored.values()),
        files=tuple(file.name for file in files),
    )


def _describe_layer(
    name: str,
    layer: LayerFormat,
    header: PadstFormat,
    stored: Mapping[str, StoredTensor],
    module: PackedLinear,
    device: torch.device,
) -> LayerDescription:
    structure = layer.structure
    names = layer.tensors(header.torch_value_dtype)
    tensors = {key: read(stored[f"{name}.{key}"]) for key in names}
    support = structure.unpack_mask(tensors)
    return LayerDescription(
        name=name,
        out_features=structure.out_features,
        in_features=structure.in_features,
        structure=structure.name,
        parameters=structure.parameters(),
        density=structure.density,
        nonzeros=structure.nonzeros,
        bias=layer.bias,
        packed_bytes=sum(stored[f"{name}.{key}"].bytes for key in names),
        perm_in=_side(tensors.get("perm_in")),
        perm_out=_side(tensors.get("perm_out")),
        dead_rows=int((~support.any(dim=1)).sum()),
        dead_columns=int((~support.any(dim=0)).sum()),
        kernels={str(count): module.kernel_name(count, device) for count in TOKENS},
    )


def _side(perm: Tensor | None) -> SideDescription | None:
    if perm is None:
        return None
    return SideDescription(perm.numel(), int((perm == torch.arange(perm.numel())).sum()))


def verify(folder: Path) -> None:
    """Raise `PadstError` unless `folder` holds a whole, sound padst checkpoint."""
    describe(str(folder))
