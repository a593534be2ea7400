"""Which linear layers of a model become sparse, what stays dense and why, and how they sit in the model.

A target is found by its place, not by its model family: a linear layer (`nn.Linear` or GPT-2's `Conv1D`) inside a
repeated block (an item of an `nn.ModuleList`) is an attention or MLP projection; linear layers elsewhere are
embeddings, heads and poolers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from padst_cli.errors import PadstError, nearest
from padst_cli.recipe import DEFAULT_TARGETS, Recipe
from padst_cli.tying import shared_parameters, tied_weights

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ROUTER_NAMES = ("gate", "router", "classifier")


@dataclass(frozen=True)
class Skipped:
    """A weight matrix that stays dense, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Target:
    """A linear layer to sparsify. `tied`: it shares its weight with an embedding, which keeps it; the layer gets its
    own.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool
    transposed: bool
    tied: bool


def find_targets(model: nn.Module, recipe: Recipe) -> tuple[list[Target], list[Skipped]]:
    """The layers that the recipe's `targets` and `ignore` mean, in model order, and what is left alone.

    Raises `PadstError` where a pattern matches no linear layer.
    """
    modules = dict(model.named_modules())
    _check_patterns(recipe, [name for name, module in modules.items() if linear_shape(module)])
    shared, tied = shared_parameters(model), tied_weights(model)
    switchable = {*tied, *tied.values()}
    targets: list[Target] = []
    skipped = [Skipped(name, reason) for name, reason in _unsparsifiable(model)]
    for name, module in modules.items():
        shape = linear_shape(module)
        if shape is None:
            continue
        is_shared = id(module.weight) in shared
        reason = _reason_to_skip(name, module, model, recipe)
        if reason is None and is_shared and f"{name}.weight" not in switchable:
            reason = "its weight is shared with another module's, and the config has no switch to untie it"
        if reason:
            skipped.append(Skipped(name, reason))
        else:
            targets.append(Target(name, shape[0], shape[1], module.bias is not None, shape[2], is_shared))
    return targets, skipped


def linear_shape(module: nn.Module) -> tuple[int, int, bool] | None:
    """(out_features, in_features, transposed) of a layer that padst can replace, None for any other module.

    Subclasses of `nn.Linear` are left alone: `nn.MultiheadAttention`, for one, reads its projection's weight without
    calling it.
    """
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        return module.out_features, module.in_features, False
    if type(module) is Conv1D:
        shape = tuple(module.get_parameter("weight").shape)
        return shape[1], shape[0], True
    return None


def matches(pattern: str, name: str) -> bool:
    """Whether a `--targets`/`--ignore` pattern means module `name`.

    `re:EXPR` searches the whole dotted name; anything else is a dotted run of whole name parts (`attn.c_proj`,
    `q_proj`, `h.0`).
    """
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise PadstError(f"'{pattern}' is not a regular expression: {error}") from None
    return f".{pattern}." in f".{name}."


def check_pattern(flag: str, pattern: str, names: Sequence[str]) -> None:
    """Raise `PadstError` where the pattern that `flag` gave means none of the linear layers `names`."""
    if not any(matches(pattern, name) for name in names):
        tails = sorted({name.rpartition(".")[2] for name in names})
        raise PadstError(
            f"{flag} '{pattern}' matches no linear layer{nearest(pattern, tails)}; the layers end in {', '.join(tails)}"
        )


def _reason_to_skip(name: str, module: nn.Module, model: nn.Module, recipe: Recipe) -> str | None:
    if any(matches(pattern, name) for pattern in recipe.ignore):
        return "ignored by --ignore"
    patterns = [pattern for pattern in recipe.targets if pattern != DEFAULT_TARGETS]
    if any(matches(pattern, name) for pattern in patterns):
        return None
    if recipe.targets and DEFAULT_TARGETS not in recipe.targets:
        return "not among --targets"
    include = f"add --targets {DEFAULT_TARGETS} --targets {'.'.join(name.split('.')[-2:])} to include it"
    if not _in_block(name, model):
        return f"outside the repeated blocks (embedding, head or pooler); {include}"
    if _is_router(name, module, model):
        return f"routes tokens to experts; {include}"
    return None


def _in_block(name: str, model: nn.Module) -> bool:
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList) for end in range(1, len(parts)))


def _is_router(name: str, module: nn.Module, model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    counts = {getattr(config, key, None) for key in _EXPERT_COUNTS} - {None}
    shape = linear_shape(module)
    return shape is not None and name.rpartition(".")[2] in _ROUTER_NAMES and shape[0] in counts


def _unsparsifiable(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            yield name, f"a {type(module).__name__}, whose weight is used without calling the layer"
        elif isinstance(module, nn.modules.conv._ConvNd):
            yield name, "a convolution"
        elif not isinstance(module, (nn.Linear, nn.Embedding)):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and _in_block(f"{name}.{key}", model):
                    yield f"{name}.{key}", f"a fused tensor {list(parameter.shape)} (experts in one piece)"


def _check_patterns(recipe: Recipe, names: list[str]) -> None:
    for flag, patterns in (("--targets", recipe.targets), ("--ignore", recipe.ignore)):
        for pattern in patterns:
            if pattern == DEFAULT_TARGETS and flag == "--targets":
                continue
            check_pattern(flag, pattern, names)
