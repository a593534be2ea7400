"""What bounds a layer on this machine: the bytes that must be read, or the multiplications that must be done.

Both limits are measured in the same run with the same threads: bandwidth as the fastest of several reads of more memory
than the caches hold, multiplications as the fastest large dense product. A layer that runs at the limit has fraction 1;
more is possible where its weights stayed in a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from padst_cli.bench.result import Limits, Roofline
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.stopwatch import Stopwatch

_SIZES = {"cpu": 1024, "cuda": 8192}
_LEAST_BYTES = {"cpu": 0, "cuda": 2 << 30}
_COLUMNS = 4096
_RUNS = 5


def measure_limits(stopwatch: Stopwatch, device: torch.device, dtype: torch.dtype) -> Limits:
    """Bytes read and multiply-adds done a second at best, with the stopwatch's threads."""
    size, least = (of.get(device.type, of["cpu"]) for of in (_SIZES, _LEAST_BYTES))
    rows = max(1, max(least, 2 * stopwatch.timing.rotate_bytes) // (4 * _COLUMNS))
    memory = torch.ones(rows, _COLUMNS, device=device)
    vector = torch.ones(_COLUMNS, device=device)
    square = torch.ones(size, size, device=device, dtype=dtype)
    reads = min(_best(stopwatch, memory.sum), _best(stopwatch, lambda: memory @ vector))
    products = _best(stopwatch, lambda: square @ square)
    return Limits(read_bytes_per_s=memory.numel() * 4 / reads, fma_per_s=size**3 / products)


def roofline(
    layer: PackedLinear, weight_bytes: int, tokens: int, itemsize: int, seconds: float, limits: Limits
) -> Roofline:
    """Which limit holds a layer of this size back, and how much of it was reached in `seconds`.

    Bytes are those of the weight in the form it runs from, of the activations on both sides and of the bias.
    """
    features = tokens * (layer.in_features + layer.out_features)
    bias = 0 if layer.bias is None else layer.out_features
    by_bytes = (weight_bytes + itemsize * (features + bias)) / limits.read_bytes_per_s
    by_fma = tokens * layer.format.structure.nonzeros / limits.fma_per_s
    limit = max(by_bytes, by_fma)
    return Roofline("bytes" if by_bytes >= by_fma else "fma", limit / seconds, limit * 1e6)


def _best(stopwatch: Stopwatch, work: Callable[[], Any]) -> float:
    work()
    return min(stopwatch.once(work) for _ in range(_RUNS))
