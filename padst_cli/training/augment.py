"""Images cropped, stretched and mirrored at random, so that a few of them teach more than what they look like.

The dense teacher is shown what the student sees, and so is right about it whatever is left of the object ("consistent"
teaching: Beyer et al., 2022, arXiv 2106.05237). Crops are those of Inception (Szegedy et al., 2015): a share of the
image's area and a ratio of its sides.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from padst_cli.training.seeds import seeded

LEAST_AREA: Final = 0.25
"""Smallest share of an image's area in a crop."""
_LEAST_RATIO: Final = 3 / 4


def augmented(pixels: Tensor, seed: int, step: int, first_row: int) -> Tensor:
    """One random crop of each image, at its own size, mirrored half of the time; `[batch, channels, height, width]`.

    A pure function of (seed, step, row); rows are counted from `first_row`.
    """
    theta = torch.stack([_crop(seeded(seed, step, first_row + row)) for row in range(len(pixels))])
    grid = F.affine_grid(theta.to(pixels), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _crop(generator: torch.Generator) -> Tensor:
    """The affine map `[2, 3]` from the crop's coordinates to the image's, both from -1 to 1."""
    area, ratio, across, down, mirrored = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    area = LEAST_AREA + (1 - LEAST_AREA) * area
    ratio = math.exp(math.log(_LEAST_RATIO) * (1 - 2 * ratio))
    width, height = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
    sign = -1.0 if mirrored < 0.5 else 1.0
    return torch.tensor(
        [[sign * width, 0.0, (1 - width) * (2 * across - 1)], [0.0, height, (1 - height) * (2 * down - 1)]]
    )
