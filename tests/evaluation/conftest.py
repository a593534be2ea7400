"""Tiny models, a word tokenizer with and without a frame, and coloured images, all made here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from padst_cli.data.corpus import ImageCorpus, TextCorpus, text_digest
from tests import models

SPECIAL = ["[END]", "[BEGIN]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
WORDS = [f"w{number}" for number in range(26)]
VOCAB = len(SPECIAL) + len(WORDS)
POSITIONS = 16


def tokenizer(frame: str | None = None, *, mask: bool = False, separator: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; `frame` is a template such as `[BEGIN] $A` or `[CLS] $A [SEP]`."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if frame:
        used = [(word, vocabulary[word]) for word in SPECIAL if word in frame]
        inner.post_processor = processors.TemplateProcessing(single=frame, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        eos_token="[END]" if separator else None,
        mask_token="[MASK]" if mask else None,
    )


def text(*lengths: int, seed: int = 0) -> TextCorpus:
    """Documents of random words, as many words as `lengths` say."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        documents.append(" ".join(WORDS[pick] for pick in picks))
    return TextCorpus("random words", tuple(documents), text_digest(documents), "heldout")


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": VOCAB, "max_position_embeddings": POSITIONS}


def gpt2(seed: int = 0) -> transformers.GPT2LMHeadModel:
    """A random causal language model that is far from uniform."""
    return models.blur(models.build("gpt2", seed, **TEXT), 0.2)


def bert(head: bool, seed: int = 0) -> transformers.PreTrainedModel:
    """A random BERT, with a masked-language-model head or without one."""
    return models.blur(models.build("bert-mlm" if head else "bert", seed, **TEXT), 0.2)


def vit(classes: int | None, seed: int = 0) -> transformers.PreTrainedModel:
    """A random vision transformer on 8 x 8 images; `classes` None leaves the classifier away."""
    sizes = {**SIZES, "num_hidden_layers": 1, "image_size": 8}
    if classes is None:
        return models.build("vit-headless", seed, **sizes)
    return models.build("vit", seed, **sizes, num_labels=classes)


def image_processor(images: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
    """Pixels in [0, 1], `[1, 3, height, width]`: enough of an image processor."""
    assert return_tensors == "pt"
    pixels = torch.tensor(list(images.convert("RGB").tobytes()), dtype=torch.float32).div(255)
    return {"pixel_values": pixels.view(images.height, images.width, 3).permute(2, 0, 1)[None]}


@pytest.fixture
def pictures(tmp_path: Path):
    """`pictures(labels, count)`: a corpus of differently coloured 8 x 8 images."""

    def make(labels: tuple[int, ...] | None, count: int | None = None) -> ImageCorpus:
        files = []
        for number in range(len(labels) if labels is not None else count or 0):
            path = tmp_path / f"{number}.png"
            Image.new("RGB", (8, 8), (40 * number % 256, 90 * number % 256, 17 * number % 256)).save(path)
            files.append(path)
        return ImageCorpus("pictures", tuple(files), labels, "0" * 64, "heldout")

    return make


@pytest.fixture(scope="session")
def tiny():
    """The helpers of this file."""
    return SimpleNamespace(
        tokenizer=tokenizer,
        text=text,
        gpt2=gpt2,
        bert=bert,
        vit=vit,
        image_processor=image_processor,
        vocab=VOCAB,
        positions=POSITIONS,
    )
