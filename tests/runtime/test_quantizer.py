"""transformers' own loading and saving of padst folders: bit for bit, every family, and refusals in one sentence."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import padst_cli
from padst_cli.errors import PadstError
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.packing import repack
from padst_cli.runtime.quantizer import packed_layers

FAMILIES = {
    "gpt2": transformers.AutoModelForCausalLM,
    "llama": transformers.AutoModelForCausalLM,
    "gpt-neox": transformers.AutoModelForCausalLM,
    "qwen3": transformers.AutoModelForCausalLM,
    "opt": transformers.AutoModelForCausalLM,
    "vit": transformers.AutoModelForImageClassification,
    "bert-mlm": transformers.AutoModelForMaskedLM,
    "bert": transformers.AutoModel,
}
STRUCTURES = ["diag", "nm", "block"]


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_round_trips_bit_for_bit(family, tiny, tmp_path):
    structure = STRUCTURES[list(FAMILIES).index(family) % 3]
    model = tiny.packed(family, structure)
    model.save_pretrained(tmp_path / "one")
    loaded, info = FAMILIES[family].from_pretrained(tmp_path / "one", output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values())
    assert not loaded.training
    assert list(packed_layers(loaded)) == list(packed_layers(model))
    batch = tiny.inputs(family)
    assert torch.equal(tiny.first_output(loaded, batch), tiny.first_output(model, batch))
    loaded.save_pretrained(tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_round_trips_in_shards(structure, tiny, folders, tmp_path):
    loaded = transformers.GPT2LMHeadModel.from_pretrained(folders("gpt2", structure))
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "shards")
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert contents(tmp_path / "again") == contents(tmp_path / "shards")
    again.save_pretrained(tmp_path / "one")
    assert contents(tmp_path / "one") == contents(folders("gpt2", structure))
    assert torch.equal(tiny.first_output(again, tiny.inputs("gpt2")), tiny.first_output(loaded, tiny.inputs("gpt2")))


def test_the_training_form_holds_unstructured_layers(folders):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folders("gpt2", "unstructured", "training"))
    assert {layer.format.structure.name for layer in packed_layers(loaded).values()} == {"unstructured"}
    assert loaded.config.quantization_config.header.form == "training"


def test_what_is_frozen_and_what_is_tied(folders):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("gpt2"))
    assert model.lm_head.weight is model.transformer.wte.weight
    for layer in packed_layers(model).values():
        assert not layer.values.requires_grad
        assert layer.weight.shape == (0,)
        assert layer.bias.dtype is torch.float32


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16])
def test_values_keep_their_dtype_whatever_is_asked(stored, asked, tiny, tmp_path):
    repack(tiny.packed("gpt2", "block"), "packed", stored).save_pretrained(tmp_path)
    for opener, prefix in ((transformers.AutoModelForCausalLM, "transformer."), (transformers.AutoModel, "")):
        model = opener.from_pretrained(tmp_path, dtype=asked)
        layers = packed_layers(model)
        assert f"{prefix}h.0.mlp.c_fc" in layers
        for name, parameter in model.named_parameters():
            assert parameter.dtype is (stored if name.endswith(".values") else asked), name
        for layer in layers.values():
            assert layer.col_indices.dtype is torch.int32
    output = model(**tiny.inputs("gpt2"))[0]
    assert output.dtype is asked
    assert bool(output.isfinite().all())


def test_values_of_modules_kept_in_float32_keep_their_dtype(tiny, tmp_path, monkeypatch):
    repack(tiny.packed("gpt2", "diag"), "packed", torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "_keep_in_fp32_modules_strict", ["mlp"], raising=False)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = model.transformer.h[0].mlp.c_fc
    assert (layer.values.dtype, layer.bias.dtype) == (torch.bfloat16, torch.float32)


def test_a_cast_model_saves_what_it_is(folders, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("gpt2"))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.header.value_dtype == "bfloat16"
    assert again.transformer.h[1].attn.c_attn.values.dtype is torch.bfloat16
    model.transformer.h[0].attn.c_attn.float()
    with pytest.raises(PadstError, match="several dtypes"):
        model.save_pretrained(tmp_path / "mixed")


def test_other_auto_classes_find_the_layers_by_the_base_prefix(tiny, folders, tmp_path):
    whole = transformers.AutoModelForCausalLM.from_pretrained(folders("gpt2"))
    base = transformers.AutoModel.from_pretrained(folders("gpt2"))
    batch = tiny.inputs("gpt2")
    with torch.no_grad():
        expected = whole.transformer(**batch)[0]
        assert torch.equal(base(**batch)[0], expected)
        base.save_pretrained(tmp_path)
        again = transformers.AutoModel.from_pretrained(tmp_path)
        assert type(again) is transformers.GPT2Model
        assert torch.equal(again(**batch)[0], expected)
        with_head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        assert len(packed_layers(with_head)) == len(packed_layers(whole))


@pytest.mark.parametrize("loaded", [True, False])
def test_the_model_without_its_head_is_saved_as_it_is_after_a_cast(loaded, tiny, tmp_path):
    model = tiny.packed("llama", "diag")
    if loaded:
        model.save_pretrained(tmp_path / "whole")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    model.to(torch.bfloat16)
    model.base_model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "again")
    for folder, kind, expected in (
        ("base", transformers.AutoModel, model.base_model),
        ("again", transformers.AutoModelForCausalLM, model),
    ):
        found, state = kind.from_pretrained(tmp_path / folder, dtype=torch.bfloat16).state_dict(), expected.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in state.items())
        assert found[next(name for name in found if name.endswith("values"))].dtype is torch.bfloat16


def test_generation_with_a_cache_equals_generation_without(folders):
    for family in ("gpt2", "llama", "opt"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folders(family))
        ids = torch.tensor([[5, 6, 7, 8]])
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        assert torch.equal(
            model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options)
        )


def test_device_map_and_deepcopy(folders, tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("gpt2"), device_map={"": "cpu"})
    twin = copy.deepcopy(model)
    batch = tiny.inputs("gpt2")
    assert torch.equal(tiny.first_output(twin, batch), tiny.first_output(model, batch))
    assert isinstance(twin.transformer.h[0].mlp.c_fc, PackedLinear)


def test_torch_compile_of_a_whole_model(folders, tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("llama"))
    batch = tiny.inputs("llama")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        ours = compiled(**batch).logits
    torch.testing.assert_close(ours, tiny.first_output(model, batch))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(folders, tmp_path):
    """A copy of a packed GPT-2 and functions that damage it."""

    class Damaged:
        folder = Path(shutil.copytree(folders("gpt2", "block"), tmp_path / "copy"))

        def tensors(self, change):
            file = self.folder / "model.safetensors"
            stored = load_file(file)
            change(stored)
            save_file(stored, file, metadata={"format": "pt"})

        def header(self, change):
            file = self.folder / "config.json"
            config = json.loads(file.read_text())
            change(config["quantization_config"])
            file.write_text(json.dumps(config))

        def refused(self, message, opener=transformers.AutoModelForCausalLM, **kwargs):
            with pytest.raises(PadstError, match=message) as caught:
                opener.from_pretrained(self.folder, **kwargs)
            assert "\n" not in str(caught.value)

    return Damaged()


LAYER = "transformer.h.1.mlp.c_fc"


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("values", lambda t: t.index_fill_(0, torch.tensor([0]), float("nan")), "NaN or infinite"),
        ("values", lambda t: t.to(torch.bfloat16), "bfloat16"),
        ("values", lambda t: t[1:].clone(), r"values' is torch.float32 \[1?\d+, 16, 16\], expected"),
        ("col_indices", lambda t: t + 1000, "col_indices"),
        ("col_indices", lambda t: t.flip(0), "col_indices"),
        ("row_offsets", lambda t: t.long(), "int64"),
        ("row_offsets", lambda t: t.flip(0), "row_offsets"),
        ("perm_in", lambda t: t.clone().index_fill_(0, torch.tensor([3]), int(t[4])), "exactly once"),
        ("perm_in", lambda t: t.float(), "float32"),
        ("perm_in", None, "lacks the tensor"),
        ("values", None, "lacks the tensor"),
        ("weight", None, "empty tensor"),
        ("weight", lambda _: torch.zeros(48, 192), "empty tensor"),
        ("bias", None, "lacks the tensor"),
        ("bias", lambda t: t.fill_(float("inf")), "NaN or infinite"),
    ],
)
def test_a_damaged_layer_is_refused_by_name(damaged, key, change, message):
    places = [f"transformer.h.{block}.{part}" for block in (0, 1) for part in ("mlp.c_fc", "attn.c_attn")]
    stored = load_file(damaged.folder / "model.safetensors")
    name = next(place for place in places if f"{place}.{key}" in stored)
    full = f"{name}.{key}"
    value = None if change is None else change(stored[full])
    damaged.tensors(lambda file: file.pop(full) if value is None else file.update({full: value}))
    damaged.refused(message)
    damaged.refused(name.replace(".", r"\."), transformers.AutoModel)


def test_a_missing_dense_tensor_is_refused_and_not_invented(damaged):
    damaged.tensors(lambda stored: stored.pop("transformer.ln_f.weight"))
    damaged.refused(r"lacks the tensor 'transformer\.ln_f\.weight'")
    damaged.refused("ln_f", transformers.AutoModel)
    damaged.refused("ln_f", transformers.AutoModelForSequenceClassification)


def test_a_missing_tied_tensor_is_refused(damaged):
    damaged.tensors(lambda stored: stored.pop("transformer.wte.weight"))
    damaged.refused("wte|lm_head")


def test_a_truncated_file_is_refused(damaged):
    file = damaged.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    damaged.refused("damaged")
    file.write_bytes(b"")
    damaged.refused("damaged")


def test_a_header_that_does_not_fit_is_refused(damaged):
    def swap(layers, old, new):
        layers[new] = layers.pop(old)

    whole = (damaged.folder / "config.json").read_text()
    for change, message in (
        (lambda header: header.update(version=2), "newer padst"),
        (lambda header: header["layers"][LAYER].update(bias=False), "does not fit"),
        (lambda header: header["layers"][LAYER].update(transposed=False), "does not fit"),
        (lambda header: swap(header["layers"], LAYER, "transformer.h.7.mlp.c_fc"), "does not have"),
        (lambda header: swap(header["layers"], LAYER, "transformer.ln_f"), "does not fit"),
        (lambda header: header["layers"].pop(LAYER), r"h\.1\.mlp\.c_fc"),
        (lambda header: header.update(value_dtype="float16"), "expected torch.float16"),
    ):
        damaged.header(change)
        with pytest.raises(PadstError, match=message):
            transformers.AutoModelForCausalLM.from_pretrained(damaged.folder)
        (damaged.folder / "config.json").write_text(whole)


def test_only_its_own_files_are_loaded(damaged):
    model = transformers.AutoModelForCausalLM.from_pretrained(damaged.folder)
    with pytest.raises(PadstError, match="its own safetensors"):
        transformers.GPT2LMHeadModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())


def test_the_config_of_a_loaded_model_opens_the_folder_again(folders, tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("gpt2"))
    again = transformers.AutoModelForCausalLM.from_pretrained(folders("gpt2"), config=model.config)
    assert torch.equal(tiny.first_output(again, tiny.inputs("gpt2")), tiny.first_output(model, tiny.inputs("gpt2")))


def test_padst_is_not_a_way_to_quantize_while_loading(tiny, tmp_path):
    tiny.build("gpt2").save_pretrained(tmp_path)
    config = tiny.packed("gpt2").config.quantization_config
    with pytest.raises(PadstError, match="padst sparsify"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_registering_twice_changes_nothing():
    from padst_cli.runtime import quantizer

    before = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["padst"]
    quantizer.register()
    assert transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["padst"] is before
    assert padst_cli.__name__ == "padst_cli"
