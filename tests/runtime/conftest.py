"""Tiny random models of several families, and packed folders made of them without any training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from padst_cli.permutation.apply import random_permutation
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.packing import install
from padst_cli.structures import StructureOptions, structure_class
from padst_cli.targets import linear_shape
from tests import models

VOCAB = 64


SIZES = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80}
FURTHER = {
    "qwen3": {"head_dim": 12, "tie_word_embeddings": True},
    "opt": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "vit": {"image_size": 32, "patch_size": 16},
}


def build(family: str, seed: int = 0):
    """A random model of the family in evaluation mode, with biases away from zero."""
    return models.blur(models.build(family, seed, **SIZES, **FURTHER.get(family, {})), 0.1, "bias")


def inputs(family: str, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """A batch that the family takes."""
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    return {"input_ids": torch.randint(1, VOCAB, (batch, length), generator=generator)}


def first_output(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or hidden states where there is no head."""
    with torch.no_grad():
        return model(**batch)[0]


def sparse_layers(model: nn.Module, structure: str, density: float = 0.4, dtype=torch.float32, seed: int = 0):
    """Packed layers for every linear layer inside the model's blocks, permuted on one side or both in turn."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for number, (name, module) in enumerate(model.named_modules()):
        shape = linear_shape(module)
        if shape is None or not any(part.isdigit() for part in name.split(".")):
            continue
        out_features, in_features, transposed = shape
        spec = structure_class(structure).for_density(out_features, in_features, density, StructureOptions())
        weight = torch.randn(out_features, in_features, generator=generator) * 0.2
        mask = spec.project(weight.abs())
        layers[name] = PackedLinear.from_sparse(
            spec,
            weight * mask,
            mask,
            None if module.bias is None else module.bias.detach(),
            random_permutation(in_features, generator) if number % 3 != 1 else None,
            random_permutation(out_features, generator) if number % 3 != 0 else None,
            dtype,
            transposed=transposed,
        )
    return layers


def packed(family: str, structure: str = "block", form: str = "packed", **kwargs):
    """A packed model of the family."""
    model = build(family)
    return install(model, sparse_layers(model, structure, **kwargs), form)


@pytest.fixture(scope="session")
def tiny():
    """The helpers of this file."""
    return SimpleNamespace(
        build=build, inputs=inputs, first_output=first_output, sparse_layers=sparse_layers, packed=packed, vocab=VOCAB
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """`folders(family, structure, form)`: a packed folder, made once; tests that change files copy it first."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(family: str, structure: str = "block", form: str = "packed") -> Path:
        key = (family, structure, form)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("-".join(key)) / "model"
            packed(family, structure, form).save_pretrained(made[key])
        return made[key]

    return folder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
