"""Recipe + shapes -> Plan: which layers become sparse, how, and what is left alone and why. No weights are touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from padst_cli.errors import PadstError
from padst_cli.recipe import Recipe, parse_nm
from padst_cli.structures import DoesNotFit, Structure, StructureOptions, structure_class
from padst_cli.targets import Skipped, Target, check_pattern, find_targets, matches
from padst_cli.tracing import example_inputs, layers_by_input
from padst_cli.tying import tied_weights

INDEX_BYTES = torch.int32.itemsize


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one linear layer: its structure, the sides that get a permutation, and how it is stored.

    `untied`: the dense layer shares its weight with an embedding; the sparse one has its own, the embedding stays.
    `shared` names the layers, this one among them, that have one input permutation together; empty where it has its
    own. `trained` are those of `sides` on which a learner that goes on in training works.
    """

    name: str
    out_features: int
    in_features: int
    structure: Structure
    sides: tuple[str, ...]
    trained: tuple[str, ...]
    bias: bool
    transposed: bool
    untied: bool = False
    shared: tuple[str, ...] = ()

    @property
    def leads(self) -> bool:
        """Whether it is the first of the layers that share its input permutation, or has it for itself."""
        return not self.shared or self.shared[0] == self.name

    @property
    def note(self) -> str | None:
        """What the plan must say about this layer, or None."""
        notes = [self.structure.note]
        if self.untied:
            notes.append("untied from the embedding, which stays dense")
        return "; ".join(note for note in notes if note) or None

    def packed_bytes(self, value_dtype: torch.dtype) -> int:
        """Bytes of the packed weight with its permutations, bias excluded (as in `dense_bytes`)."""
        lengths = {"input": self.in_features, "output": self.out_features}
        return self.structure.packed_bytes(value_dtype) + INDEX_BYTES * sum(lengths[side] for side in self.sides)

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the dense weight."""
        return self.out_features * self.in_features * dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """The layers to sparsify in model order, the rest with reasons, and what surrounds them.

    `other_parameters` are those of the sparse model outside all target weights, an embedding that lost its head among
    them; `dense_parameters` are all of the dense model, tied ones once.
    """

    layers: tuple[LayerPlan, ...]
    skipped: tuple[Skipped, ...]
    sparsity_requested: float
    other_parameters: int
    dense_parameters: int

    @property
    def unties(self) -> bool:
        """Whether a layer becomes sparse that shares its weight with an embedding."""
        return any(layer.untied for layer in self.layers)

    @property
    def sparsity_achieved(self) -> float:
        """1 - density over all sparsified layers together."""
        return 1.0 - sum(layer.structure.nonzeros for layer in self.layers) / self._target_entries

    @property
    def whole_model_density(self) -> float:
        """Nonzero parameters of the sparse model over the parameters of the dense one (tied ones once)."""
        nonzeros = sum(layer.structure.nonzeros for layer in self.layers) + self.other_parameters
        return nonzeros / self.dense_parameters

    @property
    def _target_entries(self) -> int:
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all parameters of the dense model, tied ones once."""
        return self.dense_parameters * dtype.itemsize

    def packed_bytes(self, dtype: torch.dtype, value_dtype: torch.dtype) -> int:
        """Bytes of the packed model: packed layers in `value_dtype`, everything else in `dtype`."""
        packed = sum(layer.packed_bytes(value_dtype) for layer in self.layers)
        return packed + self.other_parameters * dtype.itemsize

    def run_bytes(self, soft: bool, distill: bool, group: int | None = None) -> int:
        """Rough peak of `sparsify` in bytes, float32: student, gradient, two moments; soft matrices too; a teacher.

        Weights and their moments are dense in training, so that a latent weight takes no more. Soft matrices come in
        groups of at most `group` entries where it is given.
        """
        student = (self._target_entries + self.other_parameters) * torch.float32.itemsize
        total = 4 * student + distill * self.dense_bytes(torch.float32)
        if soft:
            for layer in self.layers:
                lengths = {"input": layer.in_features if layer.leads else 0, "output": layer.out_features}
                for length in (lengths[side] for side in layer.trained):
                    size = min(length, group or length)
                    total += 4 * torch.float32.itemsize * size * size * -(-length // max(size, 1))
        return total


def make_plan(model: nn.Module, recipe: Recipe, densities: Mapping[str, float] | None = None) -> Plan:
    """Lay the recipe's structure over every target layer of `model` (which may live on the meta device).

    `densities` by layer name are those that the data gave, for an allocation that asks it; until they are known such a
    plan is uniform. Raises `PadstError` when a pattern of the recipe matches nothing or no layer can be sparsified.
    """
    targets, skipped = find_targets(model, recipe)
    fitted: list[tuple[Target, Structure]] = []
    misfits: list[Skipped] = []
    wanted = _allocate(targets, recipe)
    if densities is not None:
        wanted = [densities.get(target.name, density) for target, density in zip(targets, wanted, strict=True)]
    for target, density in zip(targets, wanted, strict=True):
        try:
            fitted.append((target, fit(target.out_features, target.in_features, density, recipe)))
        except DoesNotFit as error:
            misfits.append(Skipped(target.name, str(error)))
    if not fitted:
        found = misfits or skipped
        reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in found[:3]) or "it has no linear layers in blocks"
        raise PadstError(f"structure '{recipe.structure}' fits no layer of this model ({reasons})")
    partners = _partners(model, fitted, recipe)
    layers = tuple(
        _layer_plan(target, structure, partners.get(target.name, ()), recipe) for target, structure in fitted
    )
    dense, sparse = _parameters(model, unties=any(layer.untied for layer in layers))
    others = sparse - sum(layer.out_features * layer.in_features for layer in layers)
    return Plan(layers, (*skipped, *misfits), recipe.sparsity, others, dense)


def _layer_plan(target: Target, structure: Structure, shared: tuple[str, ...], recipe: Recipe) -> LayerPlan:
    smaller = "input" if shared or structure.out_features >= structure.in_features else "output"
    sides = _sides(structure, recipe, smaller)
    # A learner's matrix takes the square of its side, an index list only its length.
    smaller_only = recipe.permutation.is_soft and recipe.permutation.side == "auto" and len(sides) == 2
    return LayerPlan(
        name=target.name,
        out_features=target.out_features,
        in_features=target.in_features,
        structure=structure,
        sides=sides,
        trained=(smaller,) if smaller_only else sides,
        bias=target.bias,
        transposed=target.transposed,
        untied=target.tied,
        shared=shared,
    )


def fit(out_features: int, in_features: int, density: float, recipe: Recipe) -> Structure:
    """The member of the recipe's family for one shape and density; raises `DoesNotFit` where there is none."""
    if not out_features * in_features:
        raise DoesNotFit(f"a matrix [{out_features}, {in_features}] has no entries")
    options = StructureOptions(
        nm=parse_nm(recipe.nm) if recipe.nm else None,
        block_size=recipe.block_size,
        band=recipe.band,
        block_rows=recipe.block_rows,
    )
    return structure_class(recipe.structure).for_density(out_features, in_features, density, options)


def _sides(structure: Structure, recipe: Recipe, smaller: str) -> tuple[str, ...]:
    # A permutation maps the family of all masks to itself: it changes nothing for the unstructured control.
    if recipe.permutation.kind == "none" or recipe.structure == "unstructured":
        return ()
    if recipe.permutation.side in ("input", "output"):
        return (recipe.permutation.side,)
    if structure.permute_inputs_only:
        return ("input",)
    return (smaller,) if recipe.permutation.side == "smaller" else ("input", "output")


def _partners(model: nn.Module, fitted: list[tuple[Target, Structure]], recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """The layers that have their input permutation together with others, by name, with all who have it."""
    if not recipe.permutation.share or not _sides(fitted[0][1], recipe, "input"):
        return {}
    structures = {target.name: structure for target, structure in fitted}
    found: dict[str, tuple[str, ...]] = {}
    order = list(structures)
    for group in layers_by_input(model, order, example_inputs(model)):
        kinds: dict[Any, list[str]] = {}
        for name in sorted(group, key=order.index):
            # The search moves columns between groups of M inputs: those of layers with another N:M do not line up.
            own = structures[name].permute_inputs_only
            kinds.setdefault(tuple(structures[name].parameters().items()) if own else (), []).append(name)
        found |= {name: tuple(names) for names in kinds.values() if len(names) > 1 for name in names}
    return found


def _parameters(model: nn.Module, unties: bool) -> tuple[int, int]:
    """How many parameters the dense model has, tied ones once, and how many once it is `untied` where it must be."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    copies = sum(model.get_parameter(name).numel() for name in tied_weights(model)) if unties else 0
    return dense, dense + copies


def _allocate(targets: list[Target], recipe: Recipe) -> list[float]:
    density = 1.0 - recipe.sparsity
    if recipe.allocation == "erk":
        return _erk([(t.out_features, t.in_features) for t in targets], density)
    if isinstance(recipe.allocation, str):  # uniform, and so are those that ask the data until it has answered
        return [density] * len(targets)
    for pattern, _ in recipe.allocation:
        check_pattern("--allocation", pattern, [target.name for target in targets])
    return [next((1 - s for p, s in recipe.allocation if matches(p, t.name)), density) for t in targets]


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
