"""The header of padst's checkpoint format: what `config.json` says under `quantization_config`.

A padst folder is an ordinary transformers folder. Each sparse layer's dense `NAME.weight` is replaced in the
safetensors files by the structure's packed tensors (`NAME.values` and its indices), `NAME.perm_in` and
`NAME.perm_out` where the layer is permuted, and an empty `NAME.weight` of shape [0], on which a program that does not
know the format stops with a size mismatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from padst_cli.errors import PadstError
from padst_cli.structures import Structure, structure_class
from padst_cli.structures.base import TensorLayout

FORMAT_VERSION = 1
QUANT_METHOD = "padst"

Form = Literal["training", "packed"]
VALUE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def value_dtype_name(dtype: torch.dtype) -> str:
    """The name under which a value dtype is stored; raises `PadstError` for one the format does not have."""
    for name, known in VALUE_DTYPES.items():
        if known == dtype:
            return name
    raise PadstError(f"packed values cannot be stored as {dtype}; choose one of {', '.join(VALUE_DTYPES)}")


@dataclass(frozen=True)
class LayerFormat:
    """How one sparse layer is stored: its structure, which permutations and whether a bias are there.

    `transposed` says that the dense layer was GPT-2's `Conv1D`, whose weight is `[in, out]`.
    """

    structure: Structure
    perm_in: bool = False
    perm_out: bool = False
    bias: bool = False
    transposed: bool = False

    def tensors(self, value_dtype: torch.dtype) -> dict[str, TensorLayout]:
        """Name within the layer -> (shape, dtype) of what the format fixes; `bias` and the empty `weight` follow the
        model.
        """
        found = dict(self.structure.layout(value_dtype))
        if self.perm_in:
            found["perm_in"] = ((self.structure.in_features,), torch.int32)
        if self.perm_out:
            found["perm_out"] = ((self.structure.out_features,), torch.int32)
        return found

    def to_json(self) -> dict[str, Any]:
        """The layer's entry as JSON values; inverse of `from_json`."""
        return {
            "structure": self.structure.name,
            "out_features": self.structure.out_features,
            "in_features": self.structure.in_features,
            "parameters": self.structure.parameters(),
            "perm_in": self.perm_in,
            "perm_out": self.perm_out,
            "bias": self.bias,
            "transposed": self.transposed,
        }

    @classmethod
    def from_json(cls, raw: object, where: str) -> LayerFormat:
        """Read an entry strictly; raises `PadstError` that names `where` and what is wrong."""
        entry = _mapping(raw, where)
        flags = ("perm_in", "perm_out", "bias", "transposed")
        _exact_keys(entry, ("structure", "out_features", "in_features", "parameters", *flags), where)
        for key in ("out_features", "in_features"):
            if type(entry[key]) is not int or entry[key] < 1:
                raise PadstError(f"{where}: '{key}' is {entry[key]!r}, expected a positive integer")
        for key in flags:
            if type(entry[key]) is not bool:
                raise PadstError(f"{where}: '{key}' is {entry[key]!r}, expected true or false")
        if not isinstance(entry["structure"], str):
            raise PadstError(f"{where}: 'structure' is {entry['structure']!r}, expected a name")
        parameters = _mapping(entry["parameters"], f"{where}, parameters")
        try:
            structure = structure_class(entry["structure"]).from_parameters(
                entry["out_features"], entry["in_features"], parameters
            )
        except PadstError as error:
            raise PadstError(f"{where}: {error}") from None
        return cls(structure, *(entry[key] for key in flags))


@dataclass(frozen=True)
class PadstFormat:
    """The whole header: `training` form is what sparsify writes, `packed` what export writes (never unstructured)."""

    layers: Mapping[str, LayerFormat]
    form: Form
    value_dtype: str
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.form == "packed":
            for name, layer in self.layers.items():
                if not layer.structure.exportable:
                    raise PadstError(
                        f"layer '{name}' is {layer.structure.name}, which has no packed form; "
                        "choose diag, nm or block, or export with --format dense"
                    )

    @property
    def torch_value_dtype(self) -> torch.dtype:
        """The dtype of every layer's `values`."""
        return VALUE_DTYPES[self.value_dtype]

    def tensors(self) -> Iterator[tuple[str, TensorLayout]]:
        """Full name and (shape, dtype) of every tensor whose layout the header fixes, in layer order."""
        for name, layer in self.layers.items():
            for key, layout in layer.tensors(self.torch_value_dtype).items():
                yield f"{name}.{key}", layout

    def to_json(self) -> dict[str, Any]:
        """The header as JSON values, `quant_method` included; inverse of `from_json`."""
        return {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            "form": self.form,
            "value_dtype": self.value_dtype,
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
        }

    @classmethod
    def from_json(cls, raw: object, where: str = "config.json") -> PadstFormat:
        """Read a header strictly; raises `PadstError` for a newer version, unknown or missing keys and ill-typed
        values.
        """
        header = _mapping(raw, where)
        version = header.get("version")
        if type(version) is not int or version < 1:
            raise PadstError(f"{where}: the padst format version is {version!r}, expected an integer of 1 or more")
        if version > FORMAT_VERSION:
            raise PadstError(
                f"{where}: format version {version} was written by a newer padst, this one reads up to "
                f"{FORMAT_VERSION}; upgrade padst"
            )
        _exact_keys(header, ("quant_method", "version", "form", "value_dtype", "layers"), where)
        if header["quant_method"] != QUANT_METHOD:
            raise PadstError(f"{where}: quant_method is {header['quant_method']!r}, not '{QUANT_METHOD}'")
        if header["form"] not in get_args(Form):
            raise PadstError(f"{where}: form is {header['form']!r}, expected one of {', '.join(get_args(Form))}")
        if header["value_dtype"] not in tuple(VALUE_DTYPES):
            raise PadstError(
                f"{where}: value_dtype is {header['value_dtype']!r}, expected one of {', '.join(VALUE_DTYPES)}"
            )
        entries = _mapping(header["layers"], f"{where}, layers")
        if not entries:
            raise PadstError(f"{where}: no sparse layer is listed; the file is damaged")
        layers = {name: LayerFormat.from_json(entry, f"{where}, layer '{name}'") for name, entry in entries.items()}
        return cls(layers=layers, form=header["form"], value_dtype=header["value_dtype"], version=version)


def _mapping(raw: object, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise PadstError(f"{where}: found {type(raw).__name__}, expected a mapping; the file is damaged")
    return raw


def _exact_keys(found: Mapping[str, Any], expected: tuple[str, ...], where: str) -> None:
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has the unknown key {', '.join(unknown)}"
        raise PadstError(f"{where}: {what}; it is damaged or was written by another version of padst")
