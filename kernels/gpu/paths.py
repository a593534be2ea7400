"""Which path is the fastest for a layer on a GPU, by what was measured there; by rules where nothing was.

Paths are padst's own kernel, torch's 2:4 product, and the dense product. A dense weight beside the packed one takes
memory, so it must be the faster by more than chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..cost import WORTH
from ..layout import Layout
from ..steps import GRID, Steps, octave
from . import measured

DENSE = "torch-dense"


def signature(layout: Layout, dtype: torch.dtype) -> str:
    """What the speed of a layer depends on, besides its tokens; layers with about equally many values are alike."""
    parameters = (
        f"{key}={layout.parameters[key]}" for key in ("n", "m", "block_size", "band") if key in layout.parameters
    )
    values = layout.tensors["values"]
    return " ".join(
        (
            layout.structure,
            f"{layout.out_features}x{layout.in_features}",
            *parameters,
            f"values~{octave(values.numel())}",
            *(str(kind).removeprefix("torch.") for kind in (values.dtype, dtype)),
            *layout.permutations(),
        )
    )


def known(layout: Layout, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether anything was measured of such a layer."""
    return signature(layout, dtype) in measured.of(device).paths


def steps(layout: Layout, device: torch.device, dtype: torch.dtype, rule: Callable[[int], str]) -> Steps[str]:
    """The name of the path for every number of tokens; `rule` names one where nothing is measured."""
    figures = measured.of(device).paths.get(signature(layout, dtype), {})
    known = Steps.of({tokens: fastest(seconds) for tokens, seconds in figures.items()})
    return Steps.of({mark: known.at(mark) or rule(mark) for mark in GRID})


def fastest(seconds: Mapping[str, float]) -> str:
    """The fastest path; dense only where it takes 0.97 of the fastest other's time or less."""
    sparse = {name: time for name, time in seconds.items() if name != DENSE}
    best = min(sparse, key=lambda name: sparse[name], default=DENSE)
    return best if best != DENSE and seconds.get(DENSE, float("inf")) > WORTH * sparse[best] else DENSE
