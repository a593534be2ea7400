"""Models and layers with random weights and supports: speed depends on shapes and supports alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from padst_cli.checkpoint.reader import Source, untrained
from padst_cli.errors import PadstError
from padst_cli.permutation.apply import identity, random_permutation
from padst_cli.plan import LayerPlan, make_plan
from padst_cli.recipe import Recipe
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.packing import install
from padst_cli.structures import Structure, StructureOptions, structure_class
from padst_cli.tying import untie

_EXACT = 1e-9
"""Densities that differ by less are the same."""


def random_sparse(
    source: Source,
    recipe: Recipe,
    *,
    value_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Any:
    """A model of the source's config with random weights, its planned layers packed with random supports and
    permutations.

    Needs no weights, for speed depends on shapes and supports alone. The recipe's permutation kind must be `random`
    or `none`; a random permutation is never the identity. Raises `PadstError` as the plan does.
    """
    if recipe.permutation.kind not in ("random", "none"):
        raise PadstError(
            f"random weights have no {recipe.permutation.kind} permutation; use --permutation random or none"
        )
    torch.manual_seed(recipe.seed)
    model = _dense_model(source, torch.device(device), dtype)
    generator = torch.Generator().manual_seed(recipe.seed)
    plan = make_plan(model, recipe)
    if plan.unties:
        untie(model)
    planned = plan.layers
    if recipe.allocation == "uniform" and recipe.nm is None:
        planned = tuple(replace(layer, structure=_at_least(layer.structure, 1 - recipe.sparsity)) for layer in planned)
    make: Callable[[LayerPlan], PackedLinear]
    make = partial(_random_layer, value_dtype=value_dtype, dtype=dtype, generator=generator)
    if torch.device(device).type == "cuda":
        make = _Alike(make, torch.device(device))
    layers = {layer.name: make(layer) for layer in planned}
    return install(model, layers, "packed" if all(layer.structure.exportable for layer in plan.layers) else "training")


def _dense_model(source: Source, device: torch.device, dtype: torch.dtype) -> Any:
    if device.type != "cuda":
        return untrained(source).to(device=device, dtype=dtype)
    # Made where it is to be: billions of random numbers take the CPU minutes, and twice the memory.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return untrained(source).to(device=device, dtype=dtype)
    finally:
        torch.set_default_dtype(before)


class _Alike:
    """Makes one layer of each kind and copies it for the others: on a GPU models are large, and their layers few kinds.

    Every copy has memory of its own, so a model is as fast as one whose supports all differ.
    """

    def __init__(self, make: Callable[[LayerPlan], PackedLinear], device: torch.device) -> None:
        self._make, self._device = make, device
        self._made: dict[Any, PackedLinear] = {}

    def __call__(self, plan: LayerPlan) -> PackedLinear:
        kind = (plan.structure, tuple(plan.sides), plan.bias, plan.transposed)
        if kind not in self._made:
            self._made[kind] = self._make(plan).to(self._device)
        return copy.deepcopy(self._made[kind])


def with_density(structure: Structure, density: float) -> Structure:
    """The member of the structure's family of that density, block size and band kept; raises `DoesNotFit`."""
    parameters = structure.parameters()
    options = StructureOptions(
        block_size=parameters.get("block_size", StructureOptions.block_size),
        band=parameters.get("band", StructureOptions.band),
    )
    return structure.for_density(structure.out_features, structure.in_features, density, options)


def random_linear(
    structure: str,
    out_features: int,
    in_features: int,
    density: float,
    options: StructureOptions,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> PackedLinear:
    """One packed layer of at least that density on random support, its inputs permuted, without a bias."""
    made = structure_class(structure).for_density(out_features, in_features, density, options)
    found = made if options.nm else _at_least(made, density)
    perms = (_moving_permutation(in_features, generator), None)
    return random_packed(found, None, perms, dtype, dtype, False, generator)


def _at_least(structure: Structure, density: float) -> Structure:
    """The structure, or the next denser member of its family where rounding left it under the requested density.

    Otherwise a speed would be quoted for a density that the layer does not have.
    """
    missing = density - structure.density
    found = structure
    while density - found.density > _EXACT:
        missing *= 2
        found = with_density(structure, density + missing)
    return found


def _random_layer(
    plan: LayerPlan, value_dtype: torch.dtype, dtype: torch.dtype, generator: torch.Generator
) -> PackedLinear:
    bias = torch.zeros(plan.out_features, dtype=dtype) if plan.bias else None
    perms = (
        _moving_permutation(plan.in_features, generator) if "input" in plan.sides else None,
        _moving_permutation(plan.out_features, generator) if "output" in plan.sides else None,
    )
    return random_packed(plan.structure, bias, perms, value_dtype, dtype, plan.transposed, generator)


def random_packed(
    structure: Structure,
    bias: Tensor | None,
    perms: tuple[Tensor | None, Tensor | None],
    value_dtype: torch.dtype,
    dtype: torch.dtype,
    transposed: bool,
    generator: torch.Generator,
) -> PackedLinear:
    """A packed layer with random values on a random support; permutations and bias as given."""
    shape = (structure.out_features, structure.in_features)
    mask = structure.project(torch.rand(shape, generator=generator))
    weight = torch.randn(shape, generator=generator) / math.sqrt(structure.in_features) * mask
    layer = PackedLinear.from_sparse(
        structure, weight.to(dtype), mask, bias, *perms, value_dtype, transposed=transposed
    )
    return layer.eval()


def _moving_permutation(size: int, generator: torch.Generator) -> Tensor:
    while True:
        perm = random_permutation(size, generator)
        if size == 1 or not torch.equal(perm, identity(size)):
            return perm
