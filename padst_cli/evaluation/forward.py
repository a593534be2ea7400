"""Running models for figures only: evaluation mode, batches that fit, and divergences summed in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padst_cli.errors import PadstError

_ROWS = 1024
_LOGITS_AT_ONCE = 2**28


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Put models in evaluation mode without gradients, and every submodule back in the mode it was in.

    Not `inference_mode`: a layer may cache a tensor that a later training step needs.
    """
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def accepted(model: nn.Module, **options: object) -> dict[str, object]:
    """Those keyword arguments that the model's `forward` names in its signature (`use_cache`, `logits_to_keep`)."""
    names = inspect.signature(model.forward).parameters
    return {key: value for key, value in options.items() if key in names}


def device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """The device that inputs go to: `device`, else where the model's first parameter is."""
    return torch.device(device) if device is not None else next(model.parameters()).device


def fitting_batch(batch_size: int, tokens: int, vocabulary: int) -> int:
    """`batch_size`, or fewer where its logits `[batch, tokens, vocabulary]` would exceed 1 GiB in float32."""
    return max(1, min(batch_size, _LOGITS_AT_ONCE // max(1, tokens * vocabulary)))


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> float:
    """Summed nats of `targets [n]` under `logits [n, classes]`; softmax in float32, sum in float64, rows taken in
    pieces.
    """
    total = 0.0
    for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        total += F.cross_entropy(rows.float(), wanted, reduction="none").double().sum().item()
    return total


def divergence_sum(reference: Tensor, logits: Tensor) -> float:
    """Summed KL(reference || model) in nats over rows of logits `[n, classes]`; raises `PadstError` where the classes
    differ.
    """
    if reference.shape != logits.shape:
        raise PadstError(
            f"the reference model gives {reference.shape[-1]} outputs where this one gives {logits.shape[-1]}; "
            "it must be the dense model that this one was made from"
        )
    total = 0.0
    for wanted, found in zip(reference.to(logits.device).split(_ROWS), logits.split(_ROWS), strict=True):
        pair = F.log_softmax(found.float(), dim=-1), F.log_softmax(wanted.float(), dim=-1)
        total += F.kl_div(*pair, reduction="none", log_target=True).double().sum().item()
    return total


def check_finite(total: float, what: str) -> None:
    """Raise `PadstError` where a sum over the model's outputs is NaN or infinite."""
    if not math.isfinite(total):
        raise PadstError(
            f"{what} is not finite: the model's outputs hold NaN or infinity on this data; check its weights"
        )


def exponential(nats: float) -> float | None:
    """exp(nats), or None where a float cannot hold it."""
    return math.exp(nats) if nats < math.log(1e300) else None
