"""Small real checkpoints for end-to-end runs: random weights, a trained tokenizer, a page of text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from tests import models

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "looked",
    "at",
    "the",
    "moon",
    "while",
    "rain",
    "fell",
    "over",
    "every",
    "quiet",
    "hill",
    "near",
    "that",
    "old",
    "river",
]


def sentences(count: int, seed: int) -> str:
    """`count` sentences of random words: enough regularity to learn a little from."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(count):
        picks = torch.randint(len(WORDS), (12,), generator=generator).tolist()
        lines.append(" ".join(WORDS[pick] for pick in picks).capitalize() + ".")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def train_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(sentences(300, 0), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def heldout_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text(sentences(40, 1), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(train_text: Path) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train([str(train_text)], vocab_size=320, special_tokens=["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A two-layer GPT-2 of width 64 with dropout, in a folder as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    sizes = {"hidden_size": 64, "max_position_embeddings": 64, "vocab_size": len(tokenizer)}
    models.build("gpt2", **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """Two tiny Llamas, one with its head tied to the embedding, one with a head of its own."""
    made = {}
    for name, tied in (("tied", True), ("untied", False)):
        made[name] = tmp_path_factory.mktemp("llamas") / name
        sizes = {"hidden_size": 64, "max_position_embeddings": 64, "vocab_size": len(tokenizer)}
        models.build("llama", tie_word_embeddings=tied, **sizes).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@dataclass(frozen=True)
class Padst:
    """The command line in this process."""

    def __call__(self, *arguments: object) -> Result:
        from padst_cli.app import app

        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def json(self, *arguments: object) -> dict[str, Any]:
        """Run with `--json`, expect success and exactly one JSON object on stdout."""
        result = self(*arguments, "--json")
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
        found = json.loads(result.stdout)
        assert isinstance(found, dict)
        return found

    def error(self, *arguments: object) -> str:
        """Run, expect exit code 2, one sentence and no traceback; gives the sentence."""
        result = self(*arguments)
        assert result.exit_code == 2, f"{result.exit_code}: {result.output}\n{result.exception!r}"
        assert "Traceback" not in result.output
        return " ".join(result.output.split())


@pytest.fixture(scope="session")
def padst() -> Padst:
    return Padst()


@pytest.fixture(scope="session")
def sparsified(
    padst: Padst, gpt2: Path, train_text: Path, heldout_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Sparsify the tiny GPT-2 once per structure and arguments; gives the folder."""
    made: dict[tuple[object, ...], Path] = {}

    def run(structure: str, *arguments: object) -> Path:
        key = (structure, *arguments)
        if key not in made:
            folder = tmp_path_factory.mktemp("sparse") / structure
            padst.json(
                *("sparsify", gpt2, "--structure", structure, "--sparsity", 0.5, "--output", folder, "--steps", 4),
                *("--data", train_text, "--eval-data", heldout_text, "--batch-size", 4, "--max-seq-length", 32),
                *arguments,
            )
            made[key] = folder
        return made[key]

    return run
