"""Activations in one operation where transformers spells them out.

`gelu_new` and `gelu_fast` are GELU's approximation by tanh, written as eight element-wise operations, each of which
reads and writes the widest tensor of the model and keeps it for the backward pass. torch has the same as one.
"""

from __future__ import annotations

from typing import Final

from torch import nn

_SPELLED_OUT: Final = ("gelu_new", "gelu_fast")


def in_one_operation(model: nn.Module) -> int:
    """Replace the spelled-out activations of `model` in place; returns how many. They have no parameters."""
    from transformers.activations import ACT2FN

    kinds = tuple(type(ACT2FN[name]) for name in _SPELLED_OUT)
    found = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    for name in found:
        model.set_submodule(name, nn.GELU(approximate="tanh"))
    return len(found)
