"""Weights that modules share, and how a model lets go of them: a sparse head leaves its embedding dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def shared_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that more than one module holds."""
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {key for key, count in uses.items() if count > 1}


def tied_weights(model: nn.Module) -> Mapping[str, str]:
    """The names that a transformers model ties because its config says so, each with the name of what it is tied to."""
    found: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return found


@torch.no_grad()
def untie(model: Any) -> None:
    """Give every tied weight of a transformers model its own memory, in place, and say so in the config.

    One switch of the config, `tie_word_embeddings`, stands for all of them: whoever loads the model unties the same
    ones.
    """
    for name in tied_weights(model):
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        shared = getattr(module, leaf)
        setattr(module, leaf, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
    for module in model.modules():
        if "all_tied_weights_keys" in vars(module):
            module.all_tied_weights_keys = {}
        if getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            module.config.tie_word_embeddings = False
