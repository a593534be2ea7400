"""One call opens dense and sparse models alike; generation and inspection of what it opened."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import padst_cli
from padst_cli.errors import PadstError
from padst_cli.runtime.describe import describe
from padst_cli.runtime.fusion import Absorbed
from padst_cli.runtime.generate import generate
from padst_cli.runtime.load import load, resolve_device, resolve_dtype
from padst_cli.runtime.packing import repack
from padst_cli.runtime.quantizer import packed_layers


def add_tokenizer(folder, vocabulary):
    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w0").save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def packed_folder(folders, tiny, tmp_path):
    return add_tokenizer(shutil.copytree(folders("gpt2", "block"), tmp_path / "packed"), tiny.vocab)


def test_a_sparse_folder(packed_folder):
    loaded = padst_cli.load(str(packed_folder))
    assert loaded.source.padst.form == "packed"
    assert loaded.source.task == "causal-lm"
    assert not loaded.model.training
    assert loaded.processor("w3 w4")["input_ids"] == [3, 4]
    assert packed_layers(loaded.model)
    assert loaded.device.type == resolve_device("auto").type


def test_a_dense_folder(tiny, tmp_path):
    model = tiny.build("gpt2").half()
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), device="cpu")
    assert loaded.processor is None
    assert loaded.source.padst is None
    assert loaded.model.dtype is torch.float32
    assert load(str(tmp_path), device="cpu", dtype="float16").model.dtype is torch.float16


def test_the_dtype_is_that_of_activations(tiny, tmp_path):
    repack(tiny.packed("gpt2"), "packed", torch.float16).save_pretrained(tmp_path)
    loaded = load(str(tmp_path), device="cpu", dtype="bfloat16")
    assert loaded.model.lm_head.weight.dtype is torch.bfloat16
    assert loaded.model.transformer.h[0].mlp.c_fc.values.dtype is torch.float16


def test_devices_and_dtypes_that_are_not_there():
    with pytest.raises(PadstError, match="unknown device 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(PadstError, match="did you mean 'bfloat16'"):
        resolve_dtype("bfloat")
    if not torch.cuda.is_available():
        with pytest.raises(PadstError, match="no such GPU"):
            resolve_device("cuda")


def test_damage_is_one_sentence(packed_folder):
    file = packed_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: 1 << 12])
    with pytest.raises(PadstError, match="damaged") as caught:
        load(str(packed_folder))
    assert "\n" not in str(caught.value)


def test_generate(packed_folder, folders):
    loaded = load(str(packed_folder))
    result = generate(loaded, "w5 w6", 8)
    assert (result.prompt_tokens, result.new_tokens) == (2, 8)
    assert result.tokens_per_second == pytest.approx(8 / result.seconds)
    assert len(result.text.split()) <= 8
    assert generate(loaded, "w5 w6", 8).text == result.text
    warm = generate(loaded, "w5 w6", 8, temperature=1.5, seed=1).text
    assert warm == generate(loaded, "w5 w6", 8, temperature=1.5, seed=1).text
    assert warm != generate(loaded, "w5 w6", 8, temperature=1.5, seed=2).text
    for bad, message in (
        (("", 8), "prompt is empty"),
        (("w1", 0), "at least 1"),
        (("w1", 32), "context is 32 tokens"),
    ):
        with pytest.raises(PadstError, match=message):
            generate(loaded, *bad)
    for temperature in (-1.0, math.inf, math.nan):
        with pytest.raises(PadstError, match=f"temperature must be a finite number of 0 or more, not {temperature}"):
            generate(loaded, "w1", 1, temperature=temperature)
    assert generate(loaded, "w5 w6", 8, temperature=1e-40).text == result.text, "colder than logits can be divided by"
    with pytest.raises(PadstError, match="without a tokenizer"):
        generate(load(str(folders("gpt2"))), "w1")
    with pytest.raises(PadstError, match="image-classification"):
        generate(load(str(folders("vit"))), "w1")


def test_fused_where_asked_for(packed_folder, tiny, tmp_path):
    plain, fused = (load(str(packed_folder), fused=choice).model for choice in (False, True))
    assert not any(layer.epilogue for layer in packed_layers(plain).values())
    assert any(layer.epilogue for layer in packed_layers(fused).values())
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.allclose(fused(ids).logits, plain(ids).logits, atol=1e-5)
    tiny.build("gpt2").save_pretrained(tmp_path / "dense")
    dense = load(str(tmp_path / "dense"), fused=True).model
    assert not any(isinstance(module, Absorbed) for module in dense.modules()), "a dense model stays as it is"


@pytest.mark.parametrize(
    ("family", "structure", "form"),
    [
        ("gpt2", "block", "packed"),
        ("llama", "diag", "packed"),
        ("bert", "nm", "packed"),
        ("vit", "unstructured", "training"),
    ],
)
def test_describe(family, structure, form, folders):
    folder = folders(family, structure, form)
    found = describe(str(folder))
    model = load(str(folder)).model
    layers = packed_layers(model)
    assert [layer.name for layer in found.layers] == list(layers)
    assert (found.form, found.version, found.value_dtype) == (form, 1, "float32")
    assert found.total_bytes < (folder / "model.safetensors").stat().st_size
    for entry, layer in zip(found.layers, layers.values(), strict=True):
        assert entry.structure == structure
        assert entry.density == layer.format.structure.density
        support = layer.support()
        assert entry.dead_rows == int((support.sum(1) == 0).sum())
        assert entry.dead_columns == int((support.sum(0) == 0).sum())
        assert entry.kernels == {"1": layer.kernel_name(1), "512": layer.kernel_name(512)}
        perm_in, perm_out = layer.permutations()
        for side, perm in ((entry.perm_in, perm_in), (entry.perm_out, perm_out)):
            assert (side is None) == (perm is None)
            if perm is not None:
                assert side.size == len(perm)
                assert side.fixed_points == int((perm == torch.arange(len(perm))).sum())
        stored = {name: t for name, t in layer.state_dict().items() if name not in ("weight", "bias")}
        assert entry.packed_bytes == sum(t.numel() * t.element_size() for t in stored.values())


def test_describe_refuses_dense_models_and_damage(tiny, packed_folder, tmp_path):
    tiny.build("gpt2").save_pretrained(tmp_path / "dense")
    with pytest.raises(PadstError, match="dense model"):
        describe(str(tmp_path / "dense"))
    file = packed_folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["version"] = 99
    file.write_text(json.dumps(config))
    with pytest.raises(PadstError, match="newer padst"):
        describe(str(packed_folder))
