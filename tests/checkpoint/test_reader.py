"""Opening models: folders and a hub whose answers are made up here."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from padst_cli.checkpoint.reader import load_dense, load_processor, open_source, skeleton, weight_files
from padst_cli.errors import PadstError
from tests import models

DATA = os.environ.get("PADST_DATA")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "gpt2"
    models.build("gpt2", hidden_size=16, num_attention_heads=2).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_folder(folder):
    source = open_source(str(folder))
    assert (source.task, source.modality, source.architecture) == ("causal-lm", "text", "GPT2LMHeadModel")
    assert source.padst is None
    model = load_dense(source)
    assert not model.training
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.transformer.ln_f.bias, torch.zeros(16))
    assert load_dense(source, torch.bfloat16).dtype is torch.bfloat16


def test_a_skeleton_has_no_memory_and_the_same_names(folder):
    source = open_source(str(folder))
    bones = skeleton(source)
    assert all(tensor.is_meta for tensor in (*bones.parameters(), *bones.buffers()))
    assert list(bones.state_dict()) == list(load_dense(source).state_dict())


@pytest.mark.parametrize(
    ("architecture", "config", "task", "modality"),
    [
        ("BertForMaskedLM", transformers.BertConfig, "masked-lm", "text"),
        ("BertModel", transformers.BertConfig, "encoder", "text"),
        ("ViTForImageClassification", transformers.ViTConfig, "image-classification", "image"),
        ("DeiTForImageClassificationWithTeacher", transformers.DeiTConfig, "image-classification", "image"),
        ("ViTModel", transformers.ViTConfig, "encoder", "image"),
        ("CLIPTextModel", transformers.CLIPTextConfig, "encoder", "text"),
        ("CLIPVisionModel", transformers.CLIPVisionConfig, "encoder", "image"),
        ("CLIPVisionModelWithProjection", transformers.CLIPVisionConfig, "encoder", "image"),
        ("SiglipVisionModel", transformers.SiglipVisionConfig, "encoder", "image"),
        ("RoFormerModel", transformers.RoFormerConfig, "encoder", "text"),
        ("SegformerModel", transformers.SegformerConfig, "encoder", "image"),
        ("OPTForCausalLM", transformers.OPTConfig, "causal-lm", "text"),
        ("LlamaForCausalLM", transformers.LlamaConfig, "causal-lm", "text"),
    ],
)
def test_the_task_follows_the_architecture(tmp_path, architecture, config, task, modality):
    config(architectures=[architecture]).save_pretrained(tmp_path)
    source = open_source(str(tmp_path), weights=False)
    assert (source.task, source.modality) == (task, modality)


def test_an_encoder_cut_out_of_an_encoder_decoder_is_an_encoder(tmp_path):
    config = transformers.T5Config(architectures=["T5EncoderModel"], is_encoder_decoder=False)
    config.save_pretrained(tmp_path)
    assert open_source(str(tmp_path), weights=False).task == "encoder"


def refuse(model, message, **kwargs):
    with pytest.raises(PadstError, match=message) as caught:
        open_source(str(model), **kwargs)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_model(tmp_path, folder):
    refuse(tmp_path / "nothing", "no folder")
    refuse(folder / "config.json", "is a file")
    refuse(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{")
    refuse(tmp_path, "not valid JSON")
    (tmp_path / "config.json").write_text("[1]")
    refuse(tmp_path, "no model_type")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    refuse(tmp_path, "unheard-of")


def no_questions(*_):
    raise AssertionError("a question was asked")


def test_code_that_a_model_brings_along_is_never_run(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", no_questions)
    (folder / "own.py").write_text("raise SystemExit('run')")
    change_config(folder, model_type="unheard-of", auto_map={"AutoConfig": "own.Config"})
    refuse(folder, "'unheard-of' .*code that comes with it, which padst never runs")


def test_configs_that_padst_does_not_take(folder):
    change_config(folder, architectures=None)
    refuse(folder, "no architecture")
    change_config(folder, architectures=["GPT9LMHeadModel"])
    refuse(folder, "GPT9LMHeadModel")
    change_config(folder, architectures=["GPT2LMHeadModel"], quantization_config={"quant_method": "gptq"})
    refuse(folder, "already quantized with 'gptq'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": "abc"}, "cannot read its config of type 'gpt2' .*abc"),
        ({"model_type": "llama", "num_attention_heads": 0}, "cannot read its config of type 'llama'"),
        ({"architectures": 5}, "no architecture in a list"),
        ({"architectures": [None]}, "no architecture in a list"),
        ({"architectures": "GPT2LMHeadModel"}, "no architecture in a list"),
        ({"id2label": {"0": "tench"}, "label2id": {"tench": "first"}}, "label2id in config.json is no mapping"),
        ({"id2label": {"0": "tench"}, "label2id": ["tench"]}, "label2id in config.json is no mapping"),
    ],
)
def test_configs_of_the_wrong_form(folder, changes, message):
    change_config(folder, **changes)
    refuse(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"activation_function": "foo"}, r"\(KeyError: 'foo'\)"), ({"n_head": 0}, "by zero"), ({"n_embd": 0}, "power")],
)
def test_configs_of_which_no_model_can_be_made(folder, changes, message):
    change_config(folder, **changes)
    source = open_source(str(folder))
    for make in (skeleton, load_dense):
        with pytest.raises(PadstError, match=message) as caught:
            make(source)
        assert "\n" not in str(caught.value)


def test_numbers_of_classes_may_be_text(folder):
    change_config(folder, id2label={"0": "tench", "1": "church"}, label2id={"tench": "0", "church": "1"})
    assert open_source(str(folder)).config.label2id == {"tench": 0, "church": 1}


def test_encoder_decoders_and_sound_are_refused(tmp_path):
    transformers.T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    refuse(tmp_path / "t5", "encoder-decoder", weights=False)
    transformers.Wav2Vec2Config(architectures=["Wav2Vec2Model"]).save_pretrained(tmp_path / "w")
    refuse(tmp_path / "w", "input_values", weights=False)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("BertForSequenceClassification", transformers.BertConfig),
        ("BertForTokenClassification", transformers.BertConfig),
        ("BertForQuestionAnswering", transformers.BertConfig),
        ("BertForPreTraining", transformers.BertConfig),
        ("GPT2ForSequenceClassification", transformers.GPT2Config),
        ("ViTForMaskedImageModeling", transformers.ViTConfig),
        ("SegformerForSemanticSegmentation", transformers.SegformerConfig),
    ],
)
def test_other_heads_are_refused(tmp_path, architecture, config):
    config(architectures=[architecture]).save_pretrained(tmp_path)
    refuse(tmp_path, f"is a {architecture}, whose head padst does not handle", weights=False)


def test_models_of_text_and_images_together_are_refused(tmp_path):
    transformers.CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path)
    refuse(tmp_path, "CLIPModel, which takes text and images together", weights=False)


def test_weights_must_be_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, "pickle")
    (folder / "pytorch_model.bin").unlink()
    refuse(folder, "no weights")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    refuse(folder, "lacks the shard")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refuse(folder, "damaged")


@pytest.mark.parametrize(
    ("listed", "words"), [(1, "lists 1,"), ("../model.safetensors", r"lists '\.\./model"), ([], "damaged")]
)
def test_shards_lie_beside_their_index(folder, listed, words):
    (folder / "own").mkdir()
    shutil.copy(folder / "config.json", folder / "own")
    (folder / "own" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": listed}}))
    refuse(folder / "own", words)


def test_the_single_file_comes_before_shards_as_in_transformers(folder):
    load_dense(open_source(str(folder))).save_pretrained(folder / "sharded", max_shard_size="4KB")
    shutil.copy(folder / "model.safetensors", folder / "sharded")
    assert weight_files(folder / "sharded", "x") == [folder / "sharded" / "model.safetensors"]
    (folder / "sharded" / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(PadstError, match="damaged"):
        load_dense(open_source(str(folder / "sharded")))


def test_shards_are_found(folder):
    load_dense(open_source(str(folder))).save_pretrained(folder / "sharded", max_shard_size="4KB")
    files = weight_files(folder / "sharded", "x")
    assert len(files) > 1
    assert load_dense(open_source(str(folder / "sharded"))).lm_head.weight.shape == (64, 16)


def test_damaged_weights_are_refused_by_name(folder):
    file = folder / "model.safetensors"
    whole = load_file(file)
    source = open_source(str(folder))

    def refuse_load(message):
        with pytest.raises(PadstError, match=message) as caught:
            load_dense(source)
        assert "\n" not in str(caught.value)

    bad = {key: tensor.clone() for key, tensor in whole.items()}
    bad["transformer.h.1.mlp.c_fc.weight"][3, 4] = float("nan")
    save_file(bad, file, metadata={"format": "pt"})
    refuse_load(r"1 NaN or infinite values in 'transformer\.h\.1\.mlp\.c_fc\.weight'")
    save_file({k: v for k, v in whole.items() if not k.endswith("h.0.ln_1.weight")}, file, metadata={"format": "pt"})
    refuse_load(r"lacks the weights 'transformer\.h\.0\.ln_1\.weight'")
    save_file(whole | {"transformer.wpe.weight": torch.zeros(3, 16)}, file, metadata={"format": "pt"})
    refuse_load(r"'transformer\.wpe\.weight' with shape \[3, 16\], and its config\.json makes it \[32, 16\]")
    save_file(whole, file, metadata={"format": "pt"})
    file.write_bytes(file.read_bytes()[:-100])
    refuse_load("damaged")


def test_no_processor_is_none_and_a_broken_one_is_said(folder):
    source = open_source(str(folder))
    assert load_processor(source) is None
    named = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    empty = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"))
    bad_model = json.dumps({"version": "1.0", "added_tokens": [], **empty, "model": {"type": "BPE", "vocab": 5}})
    for tokenizer, config in (("{", named), (bad_model, named), ("{}", "[]")):
        (folder / "tokenizer.json").write_text(tokenizer)
        (folder / "tokenizer_config.json").write_text(config)
        with pytest.raises(PadstError, match="tokenizer of"):
            load_processor(source)


@pytest.fixture
def hub(monkeypatch):
    """A hub that notes what it was asked and answers what the test says."""
    asked = SimpleNamespace(answer=None, calls=[])

    def snapshot_download(model, **kwargs):
        asked.calls.append((model, kwargs))
        if isinstance(asked.answer, BaseException):
            raise asked.answer
        return str(asked.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_the_hub_is_asked_for_safetensors_and_small_files_only(hub, folder):
    hub.answer = folder
    assert open_source("org/name", revision="v1").folder == folder
    (model, kwargs), *_ = hub.calls
    assert (model, kwargs["revision"]) == ("org/name", "v1")
    # The card, for the licence.
    assert {"model.safetensors", "README.md"} <= set(kwargs["allow_patterns"])
    assert not any(pattern.endswith((".bin", ".pt", ".h5")) for pattern in kwargs["allow_patterns"])
    (folder / "model.safetensors").unlink()
    assert open_source("gpt2", weights=False).task == "causal-lm"
    assert not any("safetensors" in pattern for pattern in hub.calls[-1][1]["allow_patterns"])


def test_a_cache_of_small_files_may_be_for_want_of_the_hub(hub, folder):
    (folder / "model.safetensors").unlink()
    hub.answer = folder
    refuse("org/name", "has no weights.*where the hub has more, it was not reached.*check the connection")


def http_error(kind):
    # These need a response of the HTTP library; only their class matters here.
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (http_error(errors.GatedRepoError), "gated"),
        (http_error(errors.RevisionNotFoundError), "no revision 'v1'"),
        (http_error(errors.RepositoryNotFoundError), "no such model on the hub"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (ConnectionError("no route"), "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, answer, message):
    hub.answer = answer
    refuse("org/name", message, revision="v1")


def test_a_path_is_never_taken_for_a_hub_id(hub):
    for model in ("./gpt2", "/models/gpt2", "a/b/c", "", "../no-such-folder"):
        refuse(model or " ", "no folder")
    assert not hub.calls


@pytest.mark.parametrize("model", ["foo--bar", "a..b", "model.git", "x" * 120])
def test_a_name_that_the_hub_does_not_allow(model):
    refuse(model, "no name that the hub allows")


@pytest.mark.skipif(not DATA, reason="PADST_DATA does not name the folder of real checkpoints")
@pytest.mark.parametrize(
    ("name", "task", "parameters"),
    [("stories260k", "causal-lm", 260032), ("deit-tiny", "image-classification", 5717416)],
)
def test_real_checkpoints(name, task, parameters):
    source = open_source(str(Path(DATA) / name))
    assert source.task == task
    assert sum(parameter.numel() for parameter in load_dense(source).parameters()) == parameters
    assert load_processor(source) is not None
