"""What a one-shot method makes of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pruned:
    """A support bool `[out, in]`, the weight `[out, in]` on it, zero elsewhere, and rows that needed more damping."""

    weight: Tensor
    mask: Tensor
    escalated_rows: int = 0
