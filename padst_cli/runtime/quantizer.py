"""padst's format as a transformers quantization method, so that `from_pretrained` and `save_pretrained` just work.

transformers builds the dense skeleton on the meta device, this plug-in swaps the sparse layers for empty
`PackedLinear`s, and transformers' own loading fills them. All files are checked before that.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from padst_cli.checkpoint.format import QUANT_METHOD, LayerFormat, PadstFormat, value_dtype_name
from padst_cli.errors import PadstError
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.verify import StoredTensor, read_headers, verify_finite, verify_layers
from padst_cli.targets import linear_shape


class PadstConfig(QuantizationConfigMixin):
    """The format's header as transformers carries it, under `config.quantization_config`."""

    def __init__(self, header: PadstFormat) -> None:
        self.quant_method = QUANT_METHOD
        self.header = header

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read `quantization_config` of a config.json; raises `PadstError` as `PadstFormat.from_json` does."""
        config = cls(PadstFormat.from_json(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The header as JSON values."""
        return self.header.to_json()

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict: transformers asks so where a loaded model's config is passed to `from_pretrained`."""
        return self.to_dict().get(key, default)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: every value of the header counts."""
        return self.to_dict()


class PadstQuantizer(HfQuantizer):
    """Swaps sparse layers before the weights are loaded, after checking the files; serializes what it loaded."""

    requires_calibration = False

    def __init__(self, quantization_config: PadstConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise PadstError("padst makes no model sparse while loading it; use `padst sparsify` or padst_cli.sparsify")
        self._dtypes: dict[str, torch.dtype] = {}

    def is_serializable(self) -> bool:
        """Packed tensors are stored as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed values are frozen: a sparse model is trained by `padst sparsify`."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The torch paths trace without breaks."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        del kwargs
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise PadstError("a padst model loads from its own safetensors files only, not from a state dict or pickle")
        stored: PadstFormat = self.quantization_config.header
        whole = _as_saved(model)
        header = swap_layers(whole, stored)
        check_files(whole, header, [Path(file) for file in checkpoint_files])
        # A class without the head leaves a sparse head in the file, as transformers does with a dense one.
        opened = header if whole is model else swap_layers(model, stored, leave_out_absent=True)
        self.quantization_config.header = opened
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        _restore_dtypes(model, self._dtypes)
        for layer in packed_layers(model).values():
            layer.requires_grad_(False)
        _mark(model, self)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called by `save_pretrained`: brings the header up to the model as it is now (a `.to(dtype)` changes the
        values).
        """
        self.quantization_config.header = header_of(model, self.quantization_config.header.form)
        model.config.quantization_config = self.quantization_config
        return None, {}


def register() -> None:
    """Make transformers know padst's format; a second call changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(PadstConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(PadstQuantizer)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by module name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def kernels_of(model: nn.Module, *tokens: int) -> list[str]:
    """The names of the kernels that serve a model's packed layers at these token counts, sorted; empty for a dense
    one.
    """
    return sorted({layer.kernel_name(count) for layer in packed_layers(model).values() for count in tokens})


def header_of(model: nn.Module, form: Any) -> PadstFormat:
    """The header that describes a model's packed layers; raises `PadstError` where their value dtypes differ."""
    layers = packed_layers(model)
    if not layers:
        raise PadstError("the model has no packed layers to save in padst's format")
    dtypes = {layer.value_dtype for layer in layers.values()}
    if len(dtypes) > 1:
        raise PadstError(f"the packed layers hold values of several dtypes ({', '.join(sorted(map(str, dtypes)))})")
    formats = {name: layer.format for name, layer in layers.items()}
    return PadstFormat(layers=formats, form=form, value_dtype=value_dtype_name(dtypes.pop()))


def attach(model: Any, form: Any) -> None:
    """Tell a transformers model that its packed layers are padst's, so that `save_pretrained` writes the format."""
    config = PadstConfig(header_of(model, form))
    model.config.quantization_config = config
    _mark(model, PadstQuantizer(config, pre_quantized=True))


def _mark(model: Any, quantizer: PadstQuantizer) -> None:
    """Have `save_pretrained` ask the quantizer, that of the model without its head, which shares its config, too."""
    for each in {id(one): one for one in (model, model.base_model)}.values():
        each.hf_quantizer = quantizer
        each.is_quantized = True
        each.quantization_method = QUANT_METHOD


def swap_layers(model: Any, header: PadstFormat, *, leave_out_absent: bool = False) -> PadstFormat:
    """Replace the layers that the header lists by empty `PackedLinear`s on the meta device; returns the header of those
    replaced, by the model's names.

    A model opened without (or with) its head names its layers without (or with) the base model's prefix. Raises
    `PadstError` where a layer is absent (all of them, with `leave_out_absent`) or is not the linear layer that the
    header says.
    """
    modules = dict(model.named_modules())
    renamed: dict[str, LayerFormat] = {}
    for name, layer in header.layers.items():
        own_name = _own_name(name, modules, getattr(model, "base_model_prefix", ""))
        if own_name is None:
            if leave_out_absent:
                continue
            raise PadstError(f"the file lists the sparse layer '{name}', which {type(model).__name__} does not have")
        dense = modules[own_name]
        expected = (layer.structure.out_features, layer.structure.in_features, layer.transposed)
        if linear_shape(dense) != expected or (dense.bias is not None) != layer.bias:
            raise PadstError(f"the file's sparse layer '{name}' does not fit the model's layer {dense}")
        packed = PackedLinear(layer, header.torch_value_dtype, dtype=dense.weight.dtype, device="meta")
        model.set_submodule(own_name, packed)
        renamed[own_name] = layer
    if not renamed:
        raise PadstError(f"{type(model).__name__} has none of the sparse layers that the file lists")
    in_model_order = {name: renamed[name] for name in modules if name in renamed}
    return dataclasses.replace(header, layers=in_model_order)


def _own_name(name: str, modules: dict[str, nn.Module], prefix: str) -> str | None:
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in modules:
            return candidate
    return None


def check_files(whole: Any, header: PadstFormat, files: list[Path]) -> dict[str, StoredTensor]:
    """Check a checkpoint's files against its header and against `whole`, the skeleton of what was saved, layers
    swapped.

    Returns the stored tensors by the skeleton's names; raises `PadstError` that names the first one absent or wrong.
    """
    where = f"'{files[0].parent}'"
    stored = read_headers(files, _renamer(whole))
    verify_layers(header, stored, where=where)
    _check_complete(whole, stored, where)
    verify_finite(stored, where=where)
    return stored


def _as_saved(model: Any) -> Any:
    """The skeleton of the architecture that was saved: `model` itself, or one on meta where another class is opened.

    Another class may bring tensors of its own, a head for one, which transformers initialises with a warning; what
    was saved must be there to the last tensor in any case.
    """
    import transformers

    names = getattr(model.config, "architectures", None) or [type(model).__name__]
    if names[0] == type(model).__name__ or not hasattr(transformers, names[0]):
        return model
    with torch.device("meta"):
        return getattr(transformers, names[0])(copy.deepcopy(model.config))


def _renamer(model: Any) -> Any:
    """A function from a name in the file to the name in `model`, as transformers' own loading translates it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()

    def rename(key: str) -> str:
        if key in state:
            return key
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        return str(renamed)

    return rename


def _check_complete(model: Any, stored: dict[str, StoredTensor], where: str) -> None:
    tied = model.all_tied_weights_keys
    optional = [re.compile(pattern) for pattern in (getattr(model, "_keys_to_ignore_on_load_missing", None) or ())]

    def is_there(key: str) -> bool:
        if key in stored or any(pattern.search(key) for pattern in optional):
            return True
        partners = {tied.get(key), *(target for target, source in tied.items() if source == key)}
        return any(partner in stored for partner in partners)

    for key, expected in model.state_dict().items():
        if not is_there(key):
            raise PadstError(f"{where} lacks the tensor '{key}'; the checkpoint is not whole")
        found = stored.get(key)
        # Tensors that transformers renames it may also reshape or merge: it checks those itself.
        if found is not None and found.key == key and found.shape != tuple(expected.shape):
            raise PadstError(f"{where}: tensor '{key}' is {list(found.shape)}, expected {list(expected.shape)}")


def _restore_dtypes(model: Any, expected: dict[str, torch.dtype]) -> None:
    """Undo casts that the loading should not have made, or make those it left out.

    transformers 5.17 keeps the file's dtype for tensors whose name it had to translate, and its list of modules kept
    in float32 also catches packed values; widening and narrowing back loses nothing.
    """
    packed = {f"{name}.values" for name in packed_layers(model)}
    kept = _kept_in_float32(model)
    for name, parameter in model.named_parameters():
        dtype = expected.get(name, parameter.dtype)
        if parameter.dtype == dtype or parameter.is_meta:
            continue
        if name in packed or not any(pattern in name for pattern in kept):
            parameter.data = parameter.data.to(dtype)


def _kept_in_float32(model: Any) -> Iterable[str]:
    lists = (getattr(model, key, None) for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    return [pattern for patterns in lists for pattern in (patterns or ())]


register()
