"""AdamW in one pass over memory, where torch's own default makes a dozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.graph import increment_version


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` without its two traps.

    Fused steps change parameters behind the back of their version counters, by which torch tells whether what it saved
    for a backward pass is still the same; and they take it for granted that a gradient lies in memory as its
    parameter does, which holds for contiguous ones alone.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.0) -> None:
        groups = [{**group, "params": list(group["params"])} for group in groups]
        contiguous = all(parameter.is_contiguous() for group in groups for parameter in group["params"])
        super().__init__(groups, lr=lr, weight_decay=weight_decay, fused=contiguous or None)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As torch's."""
        loss: float | None = super().step(closure)
        increment_version([p for group in self.param_groups for p in group["params"] if p.grad is not None])
        return loss
