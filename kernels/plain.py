"""What kernels outside of torch, which read tensors at their addresses, must know of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.compiler import is_compiling


def watched() -> bool:
    """Whether somebody looks at what torch computes: a graph is traced, or operators mean something else (vmap)."""
    return is_compiling() or _is_tracing() or _len_torch_dispatch_stack() > 0 or maybe_current_level() is not None


def transformed(x: Tensor) -> bool:
    """Whether x may be wrapped by a transform of `torch.func` that differentiates or batches, or carry a tangent."""
    return (maybe_current_level() is not None or forward_ad._current_level >= 0) and not torch._is_functional_tensor(x)


def plain(x: Tensor) -> bool:
    """Whether x is just the numbers in its memory, and nobody looks; a subclass or a negated view is more than that."""
    # The names in full, for this is asked at each call of a layer: `watched()` would take as long again.
    return (
        not is_compiling()
        and type(x) is Tensor
        and not _len_torch_dispatch_stack()
        and maybe_current_level() is None
        and not x.is_neg()
        and not x._is_zerotensor()
        and not _is_tracing()
    )


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for inference tensors, which count none."""
    return 0 if tensor.is_inference() else tensor._version
