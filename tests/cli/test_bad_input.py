"""What a user can get wrong: one sentence, exit code 2, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from padst_cli.errors import PadstError
from padst_cli.pipeline.cards import FIGURES
from tests import models
from tests.cli.conftest import Padst


@pytest.fixture
def run(padst: Padst, gpt2: Path, train_text: Path, heldout_text: Path, tmp_path: Path) -> Callable[..., str]:
    """A sparsify command that would work but for what the test changes; gives the error sentence."""

    def run(**changes: object) -> str:
        arguments: dict[str, object] = {
            "model": gpt2,
            "structure": "diag",
            "sparsity": 0.5,
            "data": train_text,
            "eval-data": heldout_text,
            "max-seq-length": 32,
            "steps": 1,
            "output": tmp_path / "out",
        }
        arguments |= {key.replace("_", "-"): value for key, value in changes.items()}
        model = arguments.pop("model")
        flags = [part for key, value in arguments.items() for part in (f"--{key}", value)]
        sentence = padst.error("sparsify", model, *flags)
        if "output" not in changes:
            assert not (tmp_path / "out").exists(), "bad input must leave nothing behind"
        return sentence

    return run


def test_unknown_model(run: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere" in run(model=tmp_path / "nowhere")


@pytest.mark.parametrize("sparsity", [0, 1, 1.5, -0.2])
def test_sparsity_outside_the_open_interval(run: Callable[..., str], sparsity: float) -> None:
    assert "between 0 and 1" in run(sparsity=sparsity)


def test_unknown_structure(run: Callable[..., str]) -> None:
    assert "diag" in run(structure="diagonal")


def test_missing_and_empty_data(run: Callable[..., str], tmp_path: Path) -> None:
    assert "gone.txt" in run(data=tmp_path / "gone.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in run(data=tmp_path / "empty.txt")


@pytest.mark.parametrize("flag", ["data", "eval_data"])
def test_an_empty_name_is_not_the_working_folder(run: Callable[..., str], flag: str) -> None:
    assert "the name of the data is empty" in run(**{flag: ""})


def test_text_that_is_not_utf8(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 500)
    assert "latin.txt' is not UTF-8 text (byte 3)" in run(data=tmp_path / "latin.txt")


@pytest.mark.parametrize("flag", [{"seed": -1}, {"learning_rate": "inf"}, {"nm": "4:2"}, {"device": "cuda"}])
def test_values_out_of_range(run: Callable[..., str], flag: dict[str, object]) -> None:
    assert next(iter(flag)).replace("learning_rate", "training.learning_rate").upper() in run(**flag).upper()


def test_output_under_a_file(
    run: Callable[..., str], padst: Padst, sparsified: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    assert f"'{tmp_path / 'file'}' is a file" in run(output=tmp_path / "file")
    assert f"output '{tmp_path / 'file' / 'out'}' cannot be made" in run(output=tmp_path / "file" / "out")
    said = padst.error("export", sparsified("diag"), "--output", tmp_path / "file" / "out")
    assert f"output '{tmp_path / 'file' / 'out'}' cannot be made" in said
    assert (tmp_path / "file").read_text() == "kept"


def test_export_does_not_replace_what_it_reads(padst: Padst, sparsified: Callable[..., Path]) -> None:
    folder = sparsified("diag")
    before = (folder / "model.safetensors").read_bytes()
    assert "holds the model" in padst.error("export", folder, "--output", folder, "--overwrite")
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("bench", "--tokens", "0"), "--tokens '0'"),
        (("bench", "--tokens", "\u00b2"), "--tokens '\u00b2'"),
        (("bench", "--structure", "nm", "--value-dtype", "float16"), "--structure and --value-dtype say how layers"),
        (("bench", "--permutation", "none"), "--permutation says how layers are made with --random-weights"),
        (("bench", "--nm", "2:4"), "--nm says how layers"),
        (("bench", "--ignore", "lm_head", "--targets", "x"), "--targets and --ignore say"),
        (("bench", "--layers-only", "--batch-size", "7"), "no use with --layers-only"),
        (("export", "--output", "new", "--format", "dense", "--value-dtype", "float16"), "give --dtype"),
        (("generate", "--prompt", ""), "the prompt is empty"),
        (("eval", "--data", "gone.txt"), "gone.txt"),
        (("eval", "--context", "0"), "context of 0"),
        (("eval", "--stride", "0"), "stride of 0"),
        (("eval", "--limit", "3"), "--limit is for lm-eval's tasks"),
        (("eval", "--include-path", "tasks"), "--include-path is for lm-eval's tasks"),
        (("eval", "--stride", "999"), "stride of 999"),
        (("eval", "--metric", "top1"), "does not fit a model of task causal-lm"),
    ],
)
def test_other_commands(
    padst: Padst, sparsified: Callable[..., Path], heldout_text: Path, command: tuple[str, ...], words: str
) -> None:
    data = ("--data", heldout_text) if command[0] == "eval" and "--data" not in command else ()
    assert words in padst.error(command[0], sparsified("diag"), *command[1:], *data)


def test_a_prompt_that_is_not_utf8(padst: Padst, gpt2: Path) -> None:
    assert "the prompt is not UTF-8 text" in padst.error("generate", gpt2, "--prompt", "caf\udce9")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--temperature", "inf"), "the temperature must be a finite number of 0 or more, not inf"),
        (("--temperature", "nan"), "temperature"),
        (("--temperature", "-1"), "temperature"),
        (("--prompt", ""), "the prompt is empty"),
    ],
)
def test_what_no_model_can_answer_is_refused_before_one_is_read(
    padst: Padst, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    said = padst.error("generate", tmp_path / "no-model", "--prompt", "the", *flags)
    assert words in said
    assert "no-model" not in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tasks", ","), "--tasks names no task"),
        (("--tasks", ""), "--tasks names no task"),
        (("--tasks", "arc_easy", "--limit", "0"), "--limit 0 leaves no example"),
        (("--tasks", "arc_easy", "--include-path", "nowhere"), "--include-path 'nowhere' is no folder"),
        (("--batch-size", "0"), "'--batch-size'"),
        (("--max-samples", "0"), "'--max-samples'"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_anything_is_read(
    padst: Padst, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    said = padst.error("eval", tmp_path / "no-model", *flags)
    assert words in said
    assert "no-model" not in said


def test_a_tokenizer_of_another_model(
    run: Callable[..., str], padst: Padst, train_text: Path, tokenizer: Any, tmp_path: Path
) -> None:
    models.build("gpt2", max_position_embeddings=64, vocab_size=len(tokenizer) // 2).save_pretrained(tmp_path / "odd")
    tokenizer.save_pretrained(tmp_path / "odd")
    words = "tokenizer and model do not belong together"
    assert words in run(model=tmp_path / "odd")
    assert words in padst.error("generate", tmp_path / "odd", "--prompt", train_text.read_text()[:100])


def test_text_shorter_than_the_context(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The cat.")
    assert "short" in run(data=tmp_path / "short.txt")


def test_context_longer_than_the_model(run: Callable[..., str]) -> None:
    assert "64 positions" in run(max_seq_length=128)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--augment",), "bare' reads text: leave it out"),
        (("--distill-hidden", 1), "bare' has no head and is trained by its hidden states as it is"),
        (("--no-distill",), "bare' has no head, and so no loss of its own: leave distillation on"),
    ],
)
def test_what_a_bare_encoder_could_only_ignore(
    padst: Padst, tokenizer: Any, train_text: Path, tmp_path: Path, flags: tuple[object, ...], words: str
) -> None:
    models.build("bert", max_position_embeddings=64, vocab_size=len(tokenizer)).base_model.save_pretrained(
        tmp_path / "bare"
    )
    tokenizer.save_pretrained(tmp_path / "bare")
    data = ("--data", train_text, "--eval-data", train_text)
    assert words in padst.error("sparsify", tmp_path / "bare", *data, "--output", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_structure_that_fits_no_layer(run: Callable[..., str]) -> None:
    sentence = run(structure="diag", band=1000)
    assert "fits no layer" in sentence
    assert "whole bands of 1000" in sentence
    assert "lm_head" not in sentence, "what is left alone anyway is no reason"


def test_patterns_that_match_nothing(run: Callable[..., str]) -> None:
    assert "c_fc" in run(targets="c_fcc")


def test_nan_weights(run: Callable[..., str], gpt2: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(gpt2, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 3] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "transformer.h.1.mlp.c_fc.weight" in run(model=broken)


def test_weights_of_another_shape(run: Callable[..., str], gpt2: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(gpt2, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(3, 3)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "'transformer.h.1.mlp.c_fc.weight' with shape [3, 3]" in run(model=broken)


def test_a_cut_file_and_a_damaged_tensor(
    run: Callable[..., str], padst: Padst, gpt2: Path, sparsified: Callable[..., Path], tmp_path: Path
) -> None:
    cut, damaged = tmp_path / "cut", tmp_path / "damaged"
    shutil.copytree(gpt2, cut)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "damaged safetensors file" in run(model=cut)
    shutil.copytree(sparsified("diag"), damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.offsets"][:] = 30000
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    for command in (("eval",), ("inspect",), ("generate", "--prompt", "the"), ("export", "--output", tmp_path / "out")):
        assert "transformer.h.0.mlp.c_fc" in padst.error(command[0], damaged, *command[1:])
    assert not (tmp_path / "out").exists()


def test_pickle_only(run: Callable[..., str], gpt2: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(gpt2, pickled)
    tensors = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(tensors, pickled / "pytorch_model.bin")
    assert "safetensors" in run(model=pickled)


def test_existing_output_is_kept(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    assert "--overwrite" in run(output=tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"


def test_overwrite_spares_foreign_folders(padst: Padst, gpt2: Path, train_text: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    padst.error(
        "sparsify", gpt2, "--data", train_text, "--eval-data", train_text, "--output", tmp_path / "full", "--overwrite"
    )
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"


def test_a_run_does_not_replace_what_it_reads(
    padst: Padst, gpt2: Path, sparsified: Callable[..., Path], heldout_text: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(sparsified("diag"), mine)
    shutil.copy(heldout_text, mine / "text.txt")
    for spec in (mine / "text.txt", mine / "t*.txt"):
        for data, heldout, what in ((spec, heldout_text, "data"), (heldout_text, spec, "held-out data")):
            given = ("--data", data, "--eval-data", heldout, "--max-seq-length", 32, "--sparsity", 0.5)
            said = padst.error("sparsify", gpt2, *given, "--structure", "nm", "--output", mine, "--overwrite")
            assert f"holds the {what} '{mine}" in said
    assert (mine / "text.txt").read_bytes() == heldout_text.read_bytes()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with an image classifier, `plain/` images and `labelled/` ones."""
    models.build("vit").save_pretrained(tmp_path / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    for folder in ("plain", "labelled"):
        (tmp_path / folder).mkdir()
        for number in range(4):
            Image.new("RGB", (20, 20), (40 * number, 90, 30)).save(tmp_path / folder / f"{number}.png")
    rows = "".join(f"{number}.png,{number % 2}\n" for number in range(4))
    (tmp_path / "labelled" / "labels.csv").write_text("file,label\n" + rows)
    return tmp_path


@pytest.mark.parametrize("flag", ["--no-distill", "--dense-control"])
def test_training_without_anything_to_learn_from_costs_no_earlier_result(
    padst: Padst, pictures: Path, flag: str
) -> None:
    earlier = pictures / "earlier"
    earlier.mkdir()
    for name in ("config.json", "recipe.yaml", "results.json"):
        (earlier / name).write_text("{}")
    said = padst.error(
        *("sparsify", pictures / "vit", "--structure", "nm", "--sparsity", 0.5, "--data", pictures / "plain"),
        *("--eval-data", pictures / "labelled", "--batch-size", 2, "--steps", 1, "--output", earlier, "--overwrite"),
        flag,
    )
    assert "the images have no labels" in said
    assert len(list(earlier.iterdir())) == 3


def test_a_start_alone_needs_nothing_to_learn_from(padst: Padst, pictures: Path) -> None:
    done = padst.json(
        *("sparsify", pictures / "vit", "--structure", "nm", "--sparsity", 0.5, "--data", pictures / "plain"),
        *("--eval-data", pictures / "labelled", "--steps", 0, "--no-distill", "--output", pictures / "out"),
    )
    assert done["steps"] == 0


def test_a_malformed_repository_is_refused_before_the_run(run: Callable[..., str]) -> None:
    assert "is not the form of a hub repository" in run(push_to_hub="name")


def test_a_run_that_cannot_be_pushed_says_how_to_go_on(
    padst: Padst, gpt2: Path, train_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> str:
        raise PadstError("the hub refused")

    monkeypatch.setattr("padst_cli.hub.push", refuse)
    said = padst.error(
        *("sparsify", gpt2, "--structure", "nm", "--sparsity", 0.5, "--data", train_text, "--eval-data", train_text),
        *("--max-seq-length", 32, "--steps", 0, "--output", tmp_path / "out", "--push-to-hub", "org/name"),
    )
    assert f"the run is whole, but the hub refused; go on with: padst push {tmp_path / 'out'} org/name" in said
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_base_model_with_a_broken_card_does_not_stop_the_run(
    padst: Padst, gpt2: Path, train_text: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(gpt2, base)
    (base / "README.md").write_text("---\ntitle: a: b\n---\n")
    padst.json(
        *("sparsify", base, "--structure", "nm", "--sparsity", 0.5, "--data", train_text, "--eval-data", train_text),
        *("--max-seq-length", 32, "--steps", 0, "--output", tmp_path / "out"),
    )
    assert "not stated" in (tmp_path / "out" / "README.md").read_text()


def test_misspelt_recipe_key_names_the_nearest(run: Callable[..., str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("sparsty: 0.5\n")
    assert "'sparsity'" in run(recipe=recipe)


def test_a_structure_over_a_recipe_that_names_nm_says_the_way_out(run: Callable[..., str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text('structure: nm\nnm: "2:4"\n')
    said = run(recipe=recipe, structure="diag")
    assert "nm 2:4 belongs to structure 'nm', not to 'diag': take nm out of the recipe file" in said
    assert "or choose structure 'nm'" in said


def test_nothing_to_resume(padst: Padst, gpt2: Path, sparsified: Callable[..., Path], tmp_path: Path) -> None:
    assert "no unfinished run" in padst.error("sparsify", gpt2, "--output", tmp_path / "none", "--resume")
    assert "finished" in padst.error("sparsify", gpt2, "--output", sparsified("diag"), "--resume")


def test_sparse_model_is_not_sparsified_again(run: Callable[..., str], sparsified: Callable[..., Path]) -> None:
    assert "dense" in run(model=sparsified("diag"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "nowhere"), "nowhere"),
        (("sparsify", "m", "--steps", "abc"), "'--steps'"),
        (("sparsify", "m", "--stepz", 3), "--stepz"),
        (("plan",), "'MODEL'"),
        (("sparsely", "m"), "sparsely"),
    ],
)
def test_json_error_is_one_object(padst: Padst, arguments: tuple[object, ...], words: str) -> None:
    result = padst(*arguments, "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert words in found["error"]
    assert found["exit_code"] == 2
    assert len(result.stderr.splitlines()) == 1
    assert padst(*arguments).stdout == "", "without --json an error is on stderr alone"


@pytest.mark.parametrize("content", ["{", "[]", "{}", b"\xff"])
def test_damaged_figures_stop_an_export(
    padst: Padst, sparsified: Callable[..., Path], tmp_path: Path, content: str | bytes
) -> None:
    shutil.copytree(sparsified("diag"), tmp_path / "run")
    (tmp_path / "run" / "results.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    said = padst.error("export", tmp_path / "run", "--output", tmp_path / "out")
    assert "has a damaged results.json" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"metric": []}, "metric should be an object"),
        ({"metric": {"name": "perplexity", "dense": 1.0, "initial": 2.0, "final": "3"}}, "metric.final should be a"),
        ({"dense_bytes": "many"}, "dense_bytes should be a valid integer"),
        ({"packed_bytes": 0}, "packed_bytes should be greater than 0"),
        ({"structure": "diagonal"}, "structure should be 'diag'"),
        ({"kl_to_dense": [0.1]}, "kl_to_dense should be a valid number"),
    ],
)
def test_figures_of_a_wrong_type_stop_an_export(
    padst: Padst, sparsified: Callable[..., Path], tmp_path: Path, wrong: dict[str, object], words: str
) -> None:
    shutil.copytree(sparsified("diag"), tmp_path / "run")
    results = tmp_path / "run" / "results.json"
    results.write_text(json.dumps(json.loads(results.read_text()) | wrong))
    said = padst.error("export", tmp_path / "run", "--output", tmp_path / "out")
    assert f"has a damaged results.json ({words}" in said
    assert not (tmp_path / "out").exists()


def test_an_export_needs_no_other_figures(padst: Padst, sparsified: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(sparsified("diag"), tmp_path / "run")
    results = tmp_path / "run" / "results.json"
    results.write_text(
        json.dumps({key: each for key, each in json.loads(results.read_text()).items() if key in FIGURES})
    )
    padst.json("export", tmp_path / "run", "--output", tmp_path / "out")


def test_unknown_instruction_set(padst: Padst, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADST_ISA", "neon")
    assert "PADST_ISA is 'neon'" in padst.error("inspect", gpt2)
