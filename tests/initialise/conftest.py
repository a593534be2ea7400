"""Tiny random models of several families with inputs to calibrate on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

VOCAB = 64
WIDE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 32}
DECODER = WIDE | TEXT | {"bos_token_id": 0, "eos_token_id": 0}

Batches = list[dict[str, Tensor]]


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**DECODER, intermediate_size=48, num_key_value_heads=2)
    )


def _qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**DECODER, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    )


def _neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**DECODER, intermediate_size=48, use_parallel_residual=True)
    )


def _opt() -> nn.Module:
    config = DECODER | {"pad_token_id": 1}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**config, ffn_dim=48, word_embed_proj_dim=32))


def _bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**WIDE, **TEXT, intermediate_size=48))


def _albert() -> nn.Module:
    config = WIDE | TEXT | {"intermediate_size": 48, "embedding_size": 16}
    return transformers.AlbertModel(transformers.AlbertConfig(**config))


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def _vit() -> nn.Module:
    config = transformers.ViTConfig(**WIDE, intermediate_size=48, image_size=16, patch_size=4, num_labels=5)
    return transformers.ViTForImageClassification(config)


def _swin() -> nn.Module:
    return transformers.SwinModel(
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
        )
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen3": _qwen3,
    "neox": _neox,
    "opt": _opt,
    "bert": _bert,
    "albert": _albert,
    "t5": _t5,
    "vit": _vit,
    "swin": _swin,
}


def family(name: str) -> nn.Module:
    """A tiny model with random weights of one family, larger than their initialisation so that layers matter."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
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
