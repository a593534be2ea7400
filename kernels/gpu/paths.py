"""Which path is the fastest for a layer on a GPU, by what was measured there; by rules where nothing was.

Paths are padst's own kernel, torch's 2:4 product, and the dense product. A dense weight beside the packed one takes
memory, so it must be the faster by more than chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..cost import WORTH
from ..layout import Layout
from ..steps import GRID, Steps, octave
from . import measured

DENSE = "torch-dense"


def signature(layout: Layout, dtype: torch.dtype) -> str:
    """What the speed of a layer depends on, besides its tokens; layers with about equally many values are alike."""
    values, shape = layout.tensors["values"], (layout.out_features, layout.in_features)
    kinds = (values.dtype, dtype)
    return signature_of(layout.structure, shape, layout.parameters, values.numel(), kinds, layout.permutations())


def signature_of(
    structure: str,
    shape: tuple[int, int],
    parameters: Mapping[str, Any],
    entries: int,
    kinds: tuple[torch.dtype, torch.dtype],
    permutations: Iterable[str],
    training: bool = False,
) -> str:
    """`signature` of a layer by its parts: `entries` of `[out, in]` are stored (in training: on the support), `kinds`
    are the dtypes of the values and of the product, `permutations` the sides that are permuted, by name.
    """
    named = (f"{key}={parameters[key]}" for key in ("n", "m", "block_size", "band") if key in parameters)
    return " ".join(
        (
            *(("training",) if training else ()),
            structure,
            f"{shape[0]}x{shape[1]}",
            *named,
            f"values~{octave(entries)}",
            *(str(kind).removeprefix("torch.") for kind in kinds),
            *permutations,
        )
    )


def known(layout: Layout, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether anything was measured of such a layer."""
    return signature(layout, dtype) in measured.of(device).paths


def steps(layout: Layout, device: torch.device, dtype: torch.dtype, rule: Callable[[int], str]) -> Steps[str]:
    """The name of the path for every number of tokens; `rule` names one where nothing is measured."""
    known = fastest_by_tokens(signature(layout, dtype), device)
    return Steps.of({mark: known.at(mark) or rule(mark) for mark in GRID})


def fastest_by_tokens(name: str, device: torch.device) -> Steps[str]:
    """The fastest path of layers with this signature, as far as it was measured."""
    figures = measured.of(device).paths.get(name, {})
    return Steps.of({tokens: fastest(seconds) for tokens, seconds in figures.items()})


def fastest(seconds: Mapping[str, float]) -> str:
    """The fastest path; dense only where it takes 0.97 of the fastest other's time or less."""
    sparse = {name: time for name, time in seconds.items() if name != DENSE}
    best = min(sparse, key=lambda name: sparse[name], default=DENSE)
    return best if best != DENSE and seconds.get(DENSE, float("inf")) > WORTH * sparse[best] else DENSE
