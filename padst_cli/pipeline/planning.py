"""checkpoint + recipe -> plan, from shapes alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from padst_cli.checkpoint.reader import Source, open_source, skeleton
from padst_cli.errors import PadstError
from padst_cli.plan import Plan, make_plan
from padst_cli.recipe import AllocationTable, Recipe


@dataclass(frozen=True)
class PlanResult:
    """What `padst plan` shows; fields are its JSON keys. Bytes: the whole model in the checkpoint's dtype.

    Where the recipe's `allocation` asks the data ("owl", "error"), densities are uniform here: the run decides them.
    `start_density` is the density that training begins with, if that is another, and `narrowed_after` the steps after
    which it has fallen to those of the plan.
    """

    layers: list[dict[str, Any]]
    sparsity_requested: float
    sparsity_achieved: float
    whole_model_density: float
    dense_bytes: int
    packed_bytes: int
    run_bytes: int
    steps: int
    start_density: float | None
    narrowed_after: int | None
    skipped: list[dict[str, str]]
    allocation: str | AllocationTable


def plan(model: str, recipe: Recipe) -> PlanResult:
    """Plan the run that `sparsify(model, recipe)` would make; downloads no weights.

    Raises `PadstError` for an unknown or already sparse model, or when no layer can be sparsified.
    """
    source = open_source(model, weights=False)
    return describe_plan(plan_for(source, recipe), recipe, checkpoint_dtype(source))


def plan_for(source: Source, recipe: Recipe, densities: Mapping[str, float] | None = None) -> Plan:
    """The plan for an opened checkpoint, with `densities` where the data gave them; raises `PadstError` when it is
    sparse already.
    """
    if source.padst is not None:
        raise PadstError(f"'{source.name}' is a sparse model that padst wrote; start from the dense checkpoint instead")
    return make_plan(skeleton(source), recipe, densities)


def describe_plan(made: Plan, recipe: Recipe, dtype: torch.dtype) -> PlanResult:
    """A plan in figures, for a model stored in `dtype`."""
    layers = [
        {
            "name": layer.name,
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "structure": layer.structure.name,
            "parameters": layer.structure.parameters(),
            "sides": list(layer.sides),
            "density": layer.structure.density,
            "packed_bytes": layer.packed_bytes(dtype),
            "untied": layer.untied,
            "shared_with": [name for name in layer.shared if name != layer.name],
            "note": layer.note,
        }
        for layer in made.layers
    ]
    return PlanResult(
        layers=layers,
        sparsity_requested=made.sparsity_requested,
        sparsity_achieved=made.sparsity_achieved,
        whole_model_density=made.whole_model_density,
        dense_bytes=made.dense_bytes(dtype),
        packed_bytes=made.packed_bytes(dtype, dtype),
        run_bytes=made.run_bytes(recipe.permutation.is_soft, recipe.training.distill, recipe.permutation.lookup_group),
        steps=recipe.training.steps,
        start_density=recipe.support.start_density,
        narrowed_after=recipe.support.narrowed_after(recipe.training.steps),
        skipped=[{"name": skip.name, "reason": skip.reason} for skip in made.skipped],
        allocation=recipe.allocation,
    )


def checkpoint_dtype(source: Source) -> torch.dtype:
    """The dtype that the checkpoint's config names, else that of most of its stored values; float32 where neither is
    known.
    """
    dtype = getattr(source.config, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    file = source.folder / "model.safetensors"
    return (_stored_dtype(file) if file.is_file() else None) or torch.float32


def _stored_dtype(file: Path) -> torch.dtype | None:
    """The dtype of most values in a safetensors file, from its header; None where it is damaged or has another."""
    from safetensors import SafetensorError, safe_open

    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    values: Counter[str] = Counter()
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_slice(name)
                values[tensor.get_dtype()] += math.prod(tensor.get_shape())
    except (SafetensorError, OSError):
        return None
    return known.get(values.most_common(1)[0][0]) if values else None


def default_output(model: str, recipe: Recipe) -> Path:
    """`./MODEL-STRUCTURE-SPARSITY`, where `sparsify` writes without `--output`."""
    name = Path(model.rstrip("/")).name or "model"
    return Path(f"{name}-{recipe.structure}-{recipe.sparsity:g}")
