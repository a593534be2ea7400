"""Tiny random models of several families with inputs to calibrate on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests import models

VOCAB = 64
Batches = list[dict[str, Tensor]]


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def _swin() -> nn.Module:
    return transformers.SwinModel(
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
        )
    )


FURTHER: dict[str, dict[str, int]] = {"qwen3": {"head_dim": 8}, "opt": {"word_embed_proj_dim": 32}}
OTHERS: dict[str, Callable[[], nn.Module]] = {"t5": _t5, "swin": _swin}


def family(name: str) -> nn.Module:
    """A tiny model with random weights of one family, larger than their initialisation so that layers matter."""
    torch.manual_seed(0)
    if name in OTHERS:
        model = OTHERS[name]().eval()
    else:
        model = models.build(name, vocab_size=VOCAB, num_hidden_layers=3, **FURTHER.get(name, {}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model


def batches_for(name: str, count: int = 2) -> Batches:
    """Calibration batches for a family; padded ones for the encoders of text."""
    generator = torch.Generator().manual_seed(1)
    if name in ("vit", "swin"):
        size = 16 if name == "vit" else 32
        return [
            {"pixel_values": torch.randn(4, 3, size, size, generator=generator), "labels": torch.zeros(4).long()}
            for _ in range(count)
        ]
    batches = []
    for _ in range(count):
        batch = {"input_ids": torch.randint(2, VOCAB, (4, 12), generator=generator)}
        if name in ("bert", "albert"):
            batch["attention_mask"] = (torch.arange(12) < torch.tensor([12, 9, 5, 12])[:, None]).long()
        if name == "t5":
            batch["decoder_input_ids"] = torch.randint(2, VOCAB, (4, 7), generator=generator)
        batches.append(batch)
    return batches


@pytest.fixture
def make_model() -> Callable[[str], nn.Module]:
    """A tiny model of a family, by its name."""
    return family


@pytest.fixture
def make_batches() -> Callable[..., Batches]:
    """Calibration batches for a family, by its name."""
    return batches_for
