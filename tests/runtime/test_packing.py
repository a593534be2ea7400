"""Whole models in and out of the packed form."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from padst_cli.errors import PadstError
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.packing import densify, install, repack, resident_bytes, write_dense
from padst_cli.runtime.quantizer import packed_layers


def test_install_refuses_what_does_not_fit(tiny):
    model = tiny.build("gpt2")
    layers = tiny.sparse_layers(model, "diag")
    layer = layers["transformer.h.0.attn.c_attn"]
    with pytest.raises(PadstError, match="no layer 'nowhere'"):
        install(model, {"nowhere": layer}, "packed")
    with pytest.raises(PadstError, match="does not fit"):
        install(model, {"transformer.h.0.mlp.c_proj": layer}, "packed")
    with pytest.raises(PadstError, match="no packed form"):
        install(tiny.build("gpt2"), tiny.sparse_layers(model, "unstructured"), "packed")


def test_repack_rounds_once_and_leaves_the_original(tiny):
    model = tiny.packed("gpt2", "block", "training")
    small = repack(model, "packed", torch.bfloat16)
    for name, layer in packed_layers(model).items():
        other = packed_layers(small)[name]
        assert layer.values.dtype is torch.float32
        assert torch.equal(other.values, layer.values.to(torch.bfloat16))
        assert torch.equal(other.col_indices, layer.col_indices)
    assert model.config.quantization_config.header.form == "training"
    assert small.config.quantization_config.header.form == "packed"
    assert small.config.quantization_config.header.value_dtype == "bfloat16"
    with pytest.raises(PadstError, match="no packed form"):
        repack(tiny.packed("gpt2", "unstructured", "training"), "packed", torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt-neox", "qwen3", "opt", "vit", "bert-mlm", "bert"])
def test_the_dense_form_is_an_ordinary_checkpoint_with_the_same_outputs(family, tiny, tmp_path):
    original = tiny.build(family)
    model = tiny.packed(family, "nm")
    batch = tiny.inputs(family)
    expected = tiny.first_output(model, batch)
    write_dense(model, tmp_path, max_shard_size="50KB")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    dense, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not packed_layers(dense)
    torch.testing.assert_close(tiny.first_output(dense, batch), expected, rtol=1e-4, atol=1e-5)
    assert [type(module) for module in dense.modules()] == [type(module) for module in original.modules()]
    assert list(dense.state_dict()) == list(original.state_dict())
    # The packed model is still one, and still saves as one.
    assert packed_layers(model)
    assert model.config.quantization_config.quant_method == "padst"
    for name, layer in packed_layers(model).items():
        weight = dense.get_submodule(name).weight
        assert torch.equal(weight.t() if layer.format.transposed else weight, layer.dense_weight())


def test_tied_weights_stay_tied_in_the_dense_form(tiny):
    for family in ("gpt2", "qwen3", "opt", "bert-mlm"):
        dense = densify(tiny.packed(family))
        assert dense.get_input_embeddings().weight is dense.get_output_embeddings().weight


def test_resident_bytes_count_tied_weights_once_and_images_in_place_of_tensors(tiny):
    model = tiny.packed("gpt2", "diag")
    before = resident_bytes(model)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert before == parameters + buffers
    layers = packed_layers(model).values()
    tensors = [tensor for layer in layers for tensor in (*layer.packed_tensors().values(), *layer.permutations())]
    packed = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    tiny.first_output(model, tiny.inputs("gpt2"))
    images = sum(layer.prepared_bytes() for layer in layers)
    assert images > 0
    assert resident_bytes(model) == before - packed + images


def test_layers_of_a_trained_model_can_be_replaced_again(tiny):
    model = tiny.packed("gpt2", "diag", "training")
    install(model, tiny.sparse_layers(tiny.build("gpt2"), "block"), "packed")
    assert all(isinstance(layer, PackedLinear) for layer in packed_layers(model).values())
    assert {layer.format.structure.name for layer in packed_layers(model).values()} == {"block"}
    assert isinstance(model, transformers.GPT2LMHeadModel)
