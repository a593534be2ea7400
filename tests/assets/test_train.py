"""The embedded checkpoint: what is shipped, and the command that makes it, at a small size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from padst_cli.assets import EMBEDDED_MODEL, train
from padst_cli.data.corpus import TextCorpus, text_corpus
from padst_cli.data.items import TokenWindows, token_stream

TEXT = "def double(value):\n    return 2 * value\n\n\nclass Empty:\n    pass\n"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network and a corpus that train in milliseconds; the command's quiet logging does not outlive the test."""

    def source(split: str) -> TextCorpus:
        return text_corpus("python-source", [TEXT * 4, TEXT.upper() * 3], split)

    monkeypatch.setattr(train, "python_source", source)
    for name, value in {"VOCABULARY": 280, "CONTEXT": 16, "LAYERS": 1, "HIDDEN": 16, "HEADS": 2}.items():
        monkeypatch.setattr(train, name, value)
    verbosity = hf_logging.get_verbosity()
    yield
    hf_logging.set_verbosity(verbosity)
    hf_logging.enable_progress_bar()


def run(output: Path, *extra: str) -> None:
    train.main(["--output", str(output), "--device", "cpu", "--batch-size", "2", "--log-every", "2", *extra])


@pytest.mark.usefixtures("tiny")
def test_the_command_leaves_a_whole_half_precision_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "out", "--steps", "5")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (facts["steps"], facts["tokens"]) == (5, 5 * 2 * 16)
    assert facts["heldout_perplexity"] == pytest.approx(math.exp(facts["heldout_loss"]), rel=1e-3)
    assert facts["digest"]["heldout"] == train.python_source("heldout").digest
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert "lm_head.weight" not in weights
    for file in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"


@pytest.mark.usefixtures("tiny")
def test_training_lowers_the_held_out_loss(tmp_path: Path) -> None:
    for steps in (1, 40):
        run(tmp_path / str(steps), "--steps", str(steps), "--learning-rate", "1e-2")
    losses = [json.loads((tmp_path / name / "training.json").read_text())["heldout_loss"] for name in ("1", "40")]
    assert losses[1] < losses[0] - 0.5


@pytest.mark.usefixtures("tiny")
def test_a_run_can_be_bounded_by_time(tmp_path: Path) -> None:
    run(tmp_path / "out", "--minutes", "0.002")
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["steps"] >= 1
    assert facts["command"].endswith("--output DIR --minutes 0.002")


def failing_after(steps: int, step: Callable[[train.Run], torch.Tensor]) -> Callable[[train.Run], torch.Tensor]:
    def stopped(self: train.Run) -> torch.Tensor:
        if self.progress.steps == steps:
            raise KeyboardInterrupt
        return step(self)

    return stopped


@pytest.mark.usefixtures("tiny")
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--steps", "6", "--save-minutes", "0")
    run(tmp_path / "whole", *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "step", failing_after(4, train.Run.step))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed", *arguments)
    assert (tmp_path / "resumed-state" / "progress.json").is_file()
    run(tmp_path / "resumed", *arguments)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "resumed-state").exists()


def test_a_replacement_that_was_cut_short_is_undone(tmp_path: Path) -> None:
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "kept").write_text("yes")
    train._recover(tmp_path / "out")
    assert (tmp_path / "out" / "kept").read_text() == "yes"
    (tmp_path / "out.old").mkdir()
    train._recover(tmp_path / "out")
    assert (tmp_path / "out" / "kept").exists()


@pytest.mark.parametrize(("share", "rate"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0)])
def test_the_rate_warms_up_and_falls_to_zero(share: float, rate: float) -> None:
    assert train.rate_at(share, 1.0, 0.1) == pytest.approx(rate)


# -- what is shipped ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(
        EMBEDDED_MODEL
    )


def test_the_shipped_checkpoint_is_small_and_in_half_precision() -> None:
    file = EMBEDDED_MODEL / "model.safetensors"
    assert file.stat().st_size <= 8e6
    with safe_open(file, "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118
        assert all(torch.isfinite(tensors.get_tensor(name)).all() for name in tensors.keys())  # noqa: SIM118


def test_the_shipped_configuration_is_the_one_of_the_command(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    expected = train.new_model(tokenizer.eos_token_id).config.to_dict()
    found = model.config.to_dict()
    for key in ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions", "activation_function", "eos_token_id"):
        assert found[key] == expected[key]
    assert len(tokenizer) == found["vocab_size"] == train.VOCABULARY
    for file in EMBEDDED_MODEL.glob("*.json"):
        if file.name != "tokenizer.json":
            content = file.read_text(encoding="utf-8")
            assert "/" not in content.replace("<|endoftext|>", "")
            assert "is_local" not in content


def test_the_shipped_checkpoint_is_what_the_command_makes_by_default() -> None:
    facts = json.loads((EMBEDDED_MODEL / "training.json").read_text())
    defaults = train._arguments(["--output", "DIR"])
    assert defaults.minutes is None
    for name in ("steps", "batch_size", "learning_rate"):
        assert facts[name] == getattr(defaults, name)
    assert facts["command"].endswith(f"--output DIR --steps {defaults.steps}")


def test_the_shipped_model_reads_python(shipped: tuple[Any, Any]) -> None:
    """Held-out perplexity near what training.json says (the library of another Python differs a little)."""
    model, tokenizer = shipped
    facts = json.loads((EMBEDDED_MODEL / "training.json").read_text())
    assert set(facts["digest"]) == {"train", "heldout"}
    heldout = train.python_source("heldout")
    part = text_corpus(heldout.name, [document[:20_000] for document in heldout.documents[:20]], "heldout")
    windows = TokenWindows(token_stream(part, tokenizer), train.CONTEXT)
    loss = train.held_out_loss(model, windows, torch.device("cpu"), 24)
    assert loss < facts["heldout_loss"] + 0.5


def test_the_shipped_tokenizer_gives_text_back(shipped: tuple[Any, Any]) -> None:
    tokenizer = shipped[1]
    for text in (TEXT, "naïve ☃ \t\r\n  x", "<|endoftext|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(TEXT)["input_ids"]) < len(TEXT) / 2
