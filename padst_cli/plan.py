"""Recipe + shapes -> Plan: which layers become sparse, how, and what is left alone and why. No weights are touched.

A target is found by its place, not by its model family: a linear layer (`nn.Linear` or GPT-2's `Conv1D`) inside a
repeated block (an item of an `nn.ModuleList`) is an attention or MLP projection; linear layers elsewhere are
embeddings, heads and poolers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from padst_cli.errors import PadstError, nearest
from padst_cli.recipe import Recipe, parse_nm
from padst_cli.structures import DoesNotFit, Structure, StructureOptions, structure_class

INDEX_BYTES = torch.int32.itemsize
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ROUTER_NAMES = ("gate", "router", "classifier")


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one linear layer: its structure, the sides that get a permutation, and how it is stored."""

    name: str
    out_features: int
    in_features: int
    structure: Structure
    sides: tuple[str, ...]
    bias: bool
    transposed: bool

    def packed_bytes(self, value_dtype: torch.dtype) -> int:
        """Bytes of the packed weight with its permutations, bias excluded (as in `dense_bytes`)."""
        lengths = {"input": self.in_features, "output": self.out_features}
        return self.structure.packed_bytes(value_dtype) + INDEX_BYTES * sum(lengths[side] for side in self.sides)

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the dense weight."""
        return self.out_features * self.in_features * dtype.itemsize


@dataclass(frozen=True)
class Skipped:
    """A weight matrix that stays dense, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The layers to sparsify in model order, the rest with reasons, and the parameters outside all target weights."""

    layers: tuple[LayerPlan, ...]
    skipped: tuple[Skipped, ...]
    sparsity_requested: float
    other_parameters: int

    @property
    def sparsity_achieved(self) -> float:
        """1 - density over all sparsified layers together."""
        return 1.0 - sum(layer.structure.nonzeros for layer in self.layers) / self._target_entries

    @property
    def whole_model_density(self) -> float:
        """Nonzero parameters of the sparse model over the parameters of the dense one."""
        nonzeros = sum(layer.structure.nonzeros for layer in self.layers) + self.other_parameters
        return nonzeros / (self._target_entries + self.other_parameters)

    @property
    def _target_entries(self) -> int:
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all parameters of the dense model."""
        return (self._target_entries + self.other_parameters) * dtype.itemsize

    def packed_bytes(self, dtype: torch.dtype, value_dtype: torch.dtype) -> int:
        """Bytes of the packed model: packed layers in `value_dtype`, everything else in `dtype`."""
        packed = sum(layer.packed_bytes(value_dtype) for layer in self.layers)
        return packed + self.other_parameters * dtype.itemsize

    def run_bytes(self, soft: bool, distill: bool) -> int:
        """Rough peak of `sparsify` in bytes, float32: student, gradient, two moments; soft matrices too; a teacher."""
        total = (4 + distill) * self.dense_bytes(torch.float32)
        if soft:
            lengths = {"input": lambda p: p.in_features, "output": lambda p: p.out_features}
            total += 4 * sum(4 * lengths[side](layer) ** 2 for layer in self.layers for side in layer.sides)
        return total


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Lay the recipe's structure over every target layer of `model` (which may live on the meta device).

    Raises `PadstError` when a `--targets` or `--ignore` pattern matches nothing or no layer can be sparsified.
    """
    candidates, skipped = _find_targets(model, recipe)
    densities = _allocate(candidates, recipe)
    layers: list[LayerPlan] = []
    misfits: list[Skipped] = []
    for candidate, density in zip(candidates, densities, strict=True):
        try:
            structure = structure_class(recipe.structure).for_density(
                candidate.out_features, candidate.in_features, density, _options(recipe)
            )
        except DoesNotFit as error:
            misfits.append(Skipped(candidate.name, str(error)))
            continue
        sides = _sides(structure, recipe)
        layers.append(
            LayerPlan(
                candidate.name,
                candidate.out_features,
                candidate.in_features,
                structure,
                sides,
                candidate.bias,
                candidate.transposed,
            )
        )
    if not layers:
        found = misfits or skipped
        reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in found[:3]) or "it has no linear layers in blocks"
        raise PadstError(f"structure '{recipe.structure}' fits no layer of this model ({reasons})")
    targets = {layer.name for layer in layers}
    return Plan(tuple(layers), (*skipped, *misfits), recipe.sparsity, _other_parameters(model, targets))


@dataclass(frozen=True)
class _Candidate:
    name: str
    out_features: int
    in_features: int
    bias: bool
    transposed: bool


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


def _options(recipe: Recipe) -> StructureOptions:
    return StructureOptions(
        nm=parse_nm(recipe.nm) if recipe.nm else None,
        block_size=recipe.block_size,
        band=recipe.band,
        block_rows=recipe.block_rows,
    )


def _sides(structure: Structure, recipe: Recipe) -> tuple[str, ...]:
    # A permutation maps the family of all masks to itself: it changes nothing for the unstructured control.
    if recipe.permutation.kind == "none" or recipe.structure == "unstructured":
        return ()
    if recipe.permutation.side == "both":
        return ("input", "output")
    if recipe.permutation.side in ("input", "output"):
        return (recipe.permutation.side,)
    if structure.permute_inputs_only or structure.out_features >= structure.in_features:
        return ("input",)
    return ("output",)


def _find_targets(model: nn.Module, recipe: Recipe) -> tuple[list[_Candidate], list[Skipped]]:
    modules = dict(model.named_modules())
    _check_patterns(recipe, [name for name, module in modules.items() if linear_shape(module)])
    shared = _shared_parameters(model)
    candidates: list[_Candidate] = []
    skipped = [Skipped(name, reason) for name, reason in _unsparsifiable(model)]
    for name, module in modules.items():
        shape = linear_shape(module)
        if shape is None:
            continue
        reason = _reason_to_skip(name, module, model, recipe, shared)
        if reason:
            skipped.append(Skipped(name, reason))
        else:
            candidates.append(_Candidate(name, shape[0], shape[1], module.bias is not None, shape[2]))
    return candidates, skipped


def _reason_to_skip(name: str, module: nn.Module, model: nn.Module, recipe: Recipe, shared: set[int]) -> str | None:
    if any(matches(pattern, name) for pattern in recipe.ignore):
        return "ignored by --ignore"
    if recipe.targets:
        if not any(matches(pattern, name) for pattern in recipe.targets):
            return "not among --targets"
    else:
        if not _in_block(name, model):
            return "outside the repeated blocks (embedding, head or pooler); name it in --targets to include it"
        if _is_router(name, module, model):
            return "routes tokens to experts; name it in --targets to include it"
    if id(module.weight) in shared:
        return "its weight is tied to another module's"
    return None


def _in_block(name: str, model: nn.Module) -> bool:
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList) for end in range(1, len(parts)))


def _is_router(name: str, module: nn.Module, model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    counts = {getattr(config, key, None) for key in _EXPERT_COUNTS} - {None}
    shape = linear_shape(module)
    return shape is not None and name.rpartition(".")[2] in _ROUTER_NAMES and shape[0] in counts


def _shared_parameters(model: nn.Module) -> set[int]:
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {key for key, count in uses.items() if count > 1}


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
            if not any(matches(pattern, name) for name in names):
                tails = sorted({name.rpartition(".")[2] for name in names})
                raise PadstError(
                    f"{flag} '{pattern}' matches no linear layer{nearest(pattern, tails)}; "
                    f"the layers end in {', '.join(tails)}"
                )


def _other_parameters(model: nn.Module, targets: set[str]) -> int:
    weights = {id(model.get_submodule(name).weight) for name in targets}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in weights)


def _allocate(candidates: list[_Candidate], recipe: Recipe) -> list[float]:
    density = 1.0 - recipe.sparsity
    if recipe.allocation == "uniform":
        return [density] * len(candidates)
    if recipe.allocation == "erk":
        return _erk([(c.out_features, c.in_features) for c in candidates], density)
    path = Path(recipe.allocation)
    if not path.is_file():
        raise PadstError(f"--allocation '{recipe.allocation}' is neither uniform, erk nor a file")
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or not all(isinstance(v, float) and 0 < v < 1 for v in table.values()):
        raise PadstError(f"allocation file '{path}' is not a mapping of layer patterns to sparsities between 0 and 1")
    return [next((1 - s for p, s in table.items() if matches(str(p), c.name)), density) for c in candidates]


def _erk(shapes: list[tuple[int, int]], density: float) -> list[float]:
    """Erdos-Renyi densities, proportional to (out + in) / (out * in), with the budget of a uniform `density`.

    Layers that would exceed density 1 are kept dense-like at 1 and the rest rescaled (Evci et al., RigL, 2020, section
    3). Source of the proportions: Mocanu et al., SET, 2018.
    """
    budget = density * sum(out * inp for out, inp in shapes)
    capped: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in capped]
        left = budget - sum(shapes[i][0] * shapes[i][1] for i in capped)
        scale = left / sum(sum(shapes[i]) for i in free)
        densities = {i: scale * sum(shapes[i]) / (shapes[i][0] * shapes[i][1]) for i in free}
        over = {i for i, value in densities.items() if value > 1.0}
        if not over:
            return [1.0 if i in capped else densities[i] for i in range(len(shapes))]
        capped |= over
