"""One-shot pruning as the literature does it: the baselines that a start by saliency and refit is held against.

Each method is one function of a dense weight, a structure and the inputs that the already sparse model sends, and gives
the support with the weights on it. Which structures each one serves, the recipe has checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor

from padst_cli.initialise.one_shot.magnitude import magnitude
from padst_cli.initialise.one_shot.pruned import Pruned
from padst_cli.initialise.one_shot.sparsegpt import sparsegpt
from padst_cli.initialise.one_shot.wanda import wanda
from padst_cli.initialise.statistics import InputStatistics
from padst_cli.structures import Structure

METHODS: Final[Mapping[str, Callable[[Tensor, Structure, InputStatistics, float], Pruned]]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
}
"""By the name of `calibration.start`: (weight `[out, in]`, structure, inputs, damping) -> its pruned form."""

__all__ = ["METHODS", "Pruned"]
