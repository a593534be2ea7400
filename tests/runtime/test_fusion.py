"""Activations in the packed layers before them: the same model, and only where the layer's output goes nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from padst_kernels.gpu import rules
from torch import nn

from padst_cli.runtime.fusion import Absorbed, activation_kind, fuse, unfuse
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.packing import densify, install
from padst_cli.runtime.quantizer import packed_layers
from padst_cli.structures import StructureOptions, structure_class
from padst_cli.targets import linear_shape
from tests.models import build
from tests.runtime.test_packed_linear import make

FUSED = {
    "gpt2": ("transformer.h.{}.mlp.c_fc", "gelu_tanh"),
    "llama": ("model.layers.{}.mlp.gate_proj", "silu"),
    "gpt-neox": ("gpt_neox.layers.{}.mlp.dense_h_to_4h", "gelu"),
    "bert-mlm": ("bert.encoder.layer.{}.intermediate.dense", "gelu"),
    "vit": ("vit.layers.{}.mlp.fc1", "gelu"),
}


def inputs_of(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    return {"input_ids": torch.randint(64, (2, 7))}


def pack(model):
    """Put random diagonals in the place of every linear layer but a head."""
    layers = {}
    for name, module in model.named_modules():
        shape = linear_shape(module)
        if shape is None or name.split(".")[0] in ("lm_head", "embed_out", "cls", "classifier"):
            continue
        out_features, in_features, transposed = shape
        spec = structure_class("diag").for_density(out_features, in_features, 0.3, StructureOptions())
        weight = torch.randn(out_features, in_features) / 8
        mask = spec.project(weight.abs())
        layers[name] = PackedLinear.from_sparse(spec, weight * mask, mask, module.bias, transposed=transposed)
    return install(model, layers, "packed").eval()


@pytest.mark.parametrize("family", FUSED)
def test_the_model_computes_the_same(family):
    model = pack(build(family))
    inputs = inputs_of(model)
    name, kind = FUSED[family]
    with torch.no_grad():
        before = model(**inputs)[0]
        keys = set(model.state_dict())
        assert fuse(model) == {name.format(number): kind for number in range(2)}
        assert fuse(model) == {}
        fused = model(**inputs)[0]
        torch.testing.assert_close(fused, before)
        assert torch.equal(copy.deepcopy(model)(**inputs)[0], fused)
        assert set(model.state_dict()) == keys
        dense = densify(model)
        assert not any(isinstance(module, Absorbed) for module in dense.modules())
        torch.testing.assert_close(dense(**inputs)[0], before)
        unfuse(model)
        assert not any(isinstance(module, Absorbed) for module in model.modules())
        assert all(layer.epilogue is None for layer in packed_layers(model).values())
        assert torch.equal(model(**inputs)[0], before)


class _Twice(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.fc, self.act, self.how = make()[0], nn.GELU(), how

    def forward(self, x):
        y = self.fc(x)
        if self.how == "output used twice":
            return self.act(y) + y
        if self.how == "layer called twice":
            return self.act(y) + self.fc(-x)
        if self.how == "activation called twice":
            return self.act(y) + self.act(-y.detach())
        if self.how == "not traced" and float(y.sum()) > 0:
            return y
        return self.act(y + 1) if self.how == "not next" else self.act(y)


def test_only_where_nothing_else_sees_the_output():
    for how in ("output used twice", "layer called twice", "activation called twice", "not traced", "not next"):
        assert fuse(_Twice(how)) == {}, how
    model = _Twice("")
    assert fuse(nn.Sequential(model)) == {"0.fc": "gelu"}
    assert "epilogue=gelu" in repr(model.fc)
    other = _Twice("")
    other.act = nn.ReLU()
    assert fuse(other) == {}


def test_what_activations_are_known():
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 41)
    formulas = {
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
        "silu": nn.functional.silu,
    }
    known = {name: kind for name in ACT2FN if (kind := activation_kind(ACT2FN[name]))}
    assert {"gelu", "gelu_new", "gelu_pytorch_tanh", "silu"} <= set(known)
    for name, kind in known.items():
        torch.testing.assert_close(ACT2FN[name](x), formulas[kind](x), rtol=1e-5, atol=1e-6)
    assert not activation_kind(ACT2FN["relu"])
    assert not activation_kind(ACT2FN["quick_gelu"])


def test_in_a_graph_and_without_compiled_kernels(monkeypatch):
    model, x = _Twice("").eval(), torch.randn(3, 80)
    with torch.no_grad():
        expected = model(x)
        fuse(model)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        exported = torch.export.export(model, (x,), strict=True).module()
        torch.testing.assert_close(exported(x), expected)
        from padst_kernels.cpu import native

        monkeypatch.setattr(native, "serves", lambda *_: False)
        plain = copy.deepcopy(model)
        torch.testing.assert_close(plain(x), expected)
    assert rules.kernel_name("block") not in plain.fc.kernel_name(3)
