"""Tiny random transformers models, one table for all tests: a family, its head, and a size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Family:
    """The prefix of its transformers classes, the head, and what its config needs or says differently.

    `renamed` maps the common word for a size to the family's own, None where it has no such size.
    """

    prefix: str
    head: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str | None] = field(default_factory=dict)


_ENDS = {"bos_token_id": 0, "eos_token_id": 0}
_IMAGES = {"vocab_size": None, "max_position_embeddings": None}
_SMALL_IMAGES = {"image_size": 16, "patch_size": 4}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gpt2": Family("GPT2", "LMHeadModel", _ENDS, {"intermediate_size": None}),
        "llama": Family("Llama", "ForCausalLM", {**_ENDS, "num_key_value_heads": 2}),
        "qwen3": Family("Qwen3", "ForCausalLM", {**_ENDS, "num_key_value_heads": 2}),
        "gpt-neox": Family("GPTNeoX", "ForCausalLM", _ENDS),
        "opt": Family("OPT", "ForCausalLM", {**_ENDS, "pad_token_id": 1}, {"intermediate_size": "ffn_dim"}),
        "bert": Family("Bert", "Model"),
        "bert-mlm": Family("Bert", "ForMaskedLM"),
        "albert": Family("Albert", "Model", {"embedding_size": 16}),
        "vit": Family("ViT", "ForImageClassification", {**_SMALL_IMAGES, "num_labels": 5}, _IMAGES),
        "vit-headless": Family("ViT", "Model", _SMALL_IMAGES, _IMAGES),
    }
)


def config(family: str, **changes: Any) -> Any:
    """The family's config: vocabulary 64, 32 positions, hidden 32 in 4 heads, 48 inside the MLP, 2 layers.

    `changes` are keywords of the transformers config class, in the words of `sizes` below where they are among them.
    """
    known = FAMILIES[family]
    sizes = {
        "vocab_size": 64,
        "max_position_embeddings": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    named = {known.renamed.get(key, key): value for key, value in (sizes | changes).items()}
    named.pop(None, None)
    return getattr(transformers, f"{known.prefix}Config")(**{**known.fixed, **named})


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of the family in evaluation mode, the same for the same seed and config."""
    known = FAMILIES[family]
    torch.manual_seed(seed)
    return getattr(transformers, f"{known.prefix}{known.head}")(config(family, **changes)).eval()


@torch.no_grad()
def blur(model: Any, std: float, ending: str = "") -> Any:
    """Add noise to the parameters whose name ends in `ending`, so that none of them stays at its trivial start."""
    for name, parameter in model.named_parameters():
        if name.endswith(ending):
            parameter.add_(torch.randn_like(parameter) * std)
    return model
