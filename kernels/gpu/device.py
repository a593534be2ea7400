"""The current GPU: where triton launches, and what streams, events and graphs belong to that are made without a device.

Tensors need not be there, where a model is spread over several GPUs or lives on another than the first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def is_current(device: torch.device) -> bool:
    """Whether `device` is the current GPU, or none at all."""
    return device.type != "cuda" or device.index in (None, torch.cuda.current_device())


def current(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device`, if it is a GPU, is the current one."""
    return nullcontext() if is_current(device) else torch.cuda.device(device)
