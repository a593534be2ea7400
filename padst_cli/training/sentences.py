"""What a training run says of itself in words: what was learned before it, what will not move, what computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from padst_cli.recipe import Recipe
from padst_cli.training.hardening import HardenedRecord
from padst_cli.training.sparse_linear import SparseLinear
from padst_cli.training.support import at_rest


def of_learned(records: Sequence[HardenedRecord]) -> str | None:
    """How far the permutations came that were learned before training; None where there are none."""
    if not records:
        return None
    words = f"{len(records)} permutations learned on the calibration data"
    return f"{words}: {sum(record.moved for record in records):,} entries moved from the assignment"


def of_resting(layers: Mapping[str, SparseLinear], recipe: Recipe, done: int = 0) -> str | None:
    """Which supports will not move after `done` steps although they were to: a comparison of methods needs to know."""
    resting, why = at_rest(layers, recipe.support, recipe.training.steps, done)
    if not resting:
        return None
    which = f"{len(resting)} of {len(layers)} layers, '{resting[0]}' for one"
    return f"dst method '{recipe.support.method}' will not move the support of {which}: {why}"


def of_kernels(layers: Iterable[SparseLinear]) -> str | None:
    """What computes the sparse layers' products, so that nothing falls back unseen; None without sparse layers."""
    names = Counter(layer.computed_by or "none: took no part" for layer in layers)
    if not names:
        return None
    parts = ", ".join(f"{name} ({count} layers)" for name, count in names.most_common())
    return f"sparse products in training by {parts}"
