"""Whole models: put packed layers in, change their value dtype or form, and turn a packed model dense again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padst_cli.checkpoint.format import Form
from padst_cli.checkpoint.writer import write_model
from padst_cli.errors import PadstError
from padst_cli.runtime.fusion import unfuse
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.quantizer import attach, packed_layers
from padst_cli.targets import linear_shape


def install(model: Any, layers: Mapping[str, PackedLinear], form: Form) -> Any:
    """Replace modules of a transformers model, in place, by packed layers of the same shape; `save_pretrained` then
    writes the format.

    Raises `PadstError` where a name is not a linear layer of that shape, or a structure has no packed form.
    """
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        found = modules.get(name)
        if found is None:
            raise PadstError(f"the model has no layer '{name}'")
        if not _fits(found, layer):
            raise PadstError(f"the packed layer {layer} does not fit '{name}', which is {found}")
        model.set_submodule(name, layer.train(model.training))
    attach(model, form)
    return model


def _fits(found: nn.Module, layer: PackedLinear) -> bool:
    """Whether `layer` can stand for `found`: a linear layer, dense, packed or in training, of the same shape."""
    shape = linear_shape(found)
    if shape is not None:
        return shape == (layer.out_features, layer.in_features, layer.format.transposed)
    trained = (getattr(found, "out_features", None), getattr(found, "in_features", None))
    return trained == (layer.out_features, layer.in_features)


def repack(model: Any, form: Form, value_dtype: torch.dtype) -> Any:
    """A copy of a packed model in another form or value dtype (rounded once); everything but the values keeps its
    dtype.

    Raises `PadstError` for the packed form of an unstructured model and for unknown dtypes.
    """
    clone = copy.deepcopy(model)
    for layer in packed_layers(clone).values():
        layer.values = nn.Parameter(layer.values.detach().to(value_dtype), requires_grad=False)
    attach(clone, form)
    return clone


def densify(model: Any) -> Any:
    """An ordinary copy of a packed model: zeros stored, permutations multiplied in, `nn.Linear` and `Conv1D` as they
    were.

    Weights take the dtype of the layer's bias and activations. Tied weights stay tied; no trace of padst is left in
    the config.
    """
    clone = copy.deepcopy(model)
    unfuse(clone)
    for name, layer in packed_layers(clone).items():
        clone.set_submodule(name, _dense_module(layer).train(layer.training))
    for owner in (clone, clone.config):
        for key in ("hf_quantizer", "quantization_method", "quantization_config", "is_quantized", "_is_quantized"):
            if key in vars(owner):
                delattr(owner, key)
    for module in clone.modules():
        if hasattr(module, "config") and "_is_quantized" in vars(module.config):
            del module.config._is_quantized
    return clone


def write_dense(model: Any, folder: Path, *, max_shard_size: str = "5GB") -> None:
    """Write a packed model as an ordinary checkpoint, which anything loads without padst."""
    write_model(densify(model), folder, max_shard_size=max_shard_size)


def resident_bytes(model: nn.Module) -> int:
    """Bytes a model holds now: parameters and buffers, tied ones once, and what packed layers keep prepared."""
    tensors: dict[int, Tensor] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return stored + sum(layer.prepared_bytes() for layer in packed_layers(model).values())


def _dense_module(layer: PackedLinear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    weight = layer.dense_weight().to(layer.weight.dtype)
    module: Any
    if layer.format.transposed:
        with torch.device("meta"):
            module = Conv1D(layer.out_features, layer.in_features)
        weight = weight.t().contiguous()
    else:
        module = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    module.weight = nn.Parameter(weight)
    if layer.bias is not None:
        module.bias = nn.Parameter(layer.bias.detach().clone())
    elif layer.format.transposed:
        raise PadstError("a Conv1D layer has a bias, its packed form has none")
    return module
