"""Models and layers with random weights and supports: speed depends on shapes and supports alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from padst_cli.checkpoint.reader import Source, plain_config
from padst_cli.errors import PadstError
from padst_cli.permutation.apply import identity, random_permutation
from padst_cli.plan import LayerPlan, make_plan
from padst_cli.recipe import Recipe
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.packing import install
from padst_cli.structures import Structure
from padst_cli.tying import untie


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
    model = source.model_class(plain_config(source)).to(device=device, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(recipe.seed)
    plan = make_plan(model, recipe)
    if plan.unties:
        untie(model)
    layers = {layer.name: _random_layer(layer, value_dtype, dtype, generator).to(device) for layer in plan.layers}
    return install(model, layers, "packed" if all(layer.structure.exportable for layer in plan.layers) else "training")


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
