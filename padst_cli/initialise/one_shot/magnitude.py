"""Magnitude: the largest weights stay as they are (Han et al., NeurIPS 2015, arXiv 1506.02626)."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_cli.initialise.one_shot.pruned import Pruned
from padst_cli.initialise.statistics import InputStatistics
from padst_cli.structures import Structure


def magnitude(weight: Tensor, structure: Structure, statistics: InputStatistics, damping: float) -> Pruned:
    """The units with the largest l1 norm, in the whole layer; of single weights the largest. No input is looked at."""
    del statistics, damping
    mask = structure.project(weight.abs())
    return Pruned(torch.where(mask, weight, 0.0), mask)
