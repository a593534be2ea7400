"""What the Triton kernels of all structures share: how they are cut, the permutation in the load, the epilogue.

Every kernel computes a tile `[tokens, rows of S]` of y = f((S x[..., perm_in])[..., perm_out] + b) and accumulates in
float32; f is the identity or an activation. The output side's permutation is applied where the tile is stored, through
its inverse `store` int32 `[out]`: row r of S belongs to output store[r].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import wrap_triton

from ..activations import BY_TORCH
from ..plain import plain
from .device import is_current

ACTIVATIONS = ("", *BY_TORCH)
"""What an epilogue can apply: nothing, or one of ../activations.py."""


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: `TILE` tokens and `ROWS` rows of S a program, `STEP` stored values of a row at a time.

    `SPLIT` is into how many parts a sum is cut that are added up at the end. What a kernel does not know is 0.
    """

    num_warps: int
    num_stages: int
    TILE: int = 0
    ROWS: int = 0
    STEP: int = 0
    SPLIT: int = 0

    def keywords(self) -> dict[str, int]:
        """As the keywords of a launch."""
        return dict(_keywords(self))


@functools.cache
def _keywords(config: Config) -> tuple[tuple[str, int], ...]:
    return tuple((key, value) for key, value in asdict(config).items() if value)


MANY = 0
"""More tokens than any limit."""


def limit_of(tokens: int, *limits: int) -> int:
    """The first of ascending `limits` that is not less than `tokens`, or MANY: what a space of Configs depends on."""
    return next((limit for limit in limits if tokens <= limit), MANY)


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in full, or as TensorFloat-32 where torch's own switch for products allows it.

    Its older form, `torch.set_float32_matmul_precision`, cannot be read once the newer one is set, which follows both.
    """
    if dtype is torch.float32 and torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def direct(x: Tensor) -> bool:
    """Whether x is at hand, with its memory and nobody looking: not while a graph is traced, nor with a tangent."""
    return plain(x) and (forward_ad._current_level < 0 or forward_ad.unpack_dual(x).tangent is None)


def launcher(kernel: Any, x: Tensor) -> Any:
    """What launches a kernel on x: itself, or, while a graph is traced, what puts it there.

    Triton launches on the current device, which need not be that of x where a model is spread over several.
    """
    if not direct(x):
        return wrap_triton(kernel)
    return kernel if is_current(x.device) else _Elsewhere(kernel, x.device)


class _Elsewhere:
    """A kernel for a device that is not the current one."""

    def __init__(self, kernel: Any, device: torch.device) -> None:
        self._kernel, self._device = kernel, device

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            with torch.cuda.device(self._device):
                self._kernel[grid](**arguments)

        return launch


PROGRAMS = 264
"""Programs that fill a large GPU: two for each of an H100's multiprocessors."""


def parts_of(tokens: int, programs: int) -> int:
    """Into how many parts a gradient is cut by tokens, for few `programs` to become enough; 256 at least each."""
    return next((parts for parts in (16, 8, 4, 2) if tokens >= 256 * parts and programs * parts <= 2 * PROGRAMS), 1)


@triton.jit
def permuted(column, live, perm_in, PERM_IN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inputs that columns of S read."""
    if PERM_IN:
        return tl.load(perm_in + column, mask=live, other=0)
    else:
        return column


@triton.jit
def gathered(  # type: ignore[no-untyped-def]
    x, source, live, tile, tokens, in_features, TILE: tl.constexpr, MINOR: tl.constexpr
):
    """x[t, source] `[., ., TILE]` of a tile of tokens, `source` `[., .]`; MINOR: x as `permute.side_by_side` has it."""
    if MINOR:
        place = source[:, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
        return tl.load(x + tile.to(tl.int64) * TILE * in_features + place, mask=live[:, :, None], other=0)
    else:
        token = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
        place = source[:, :, None] + token[None, None, :] * in_features
        return tl.load(x + place, mask=live[:, :, None] & (token < tokens)[None, None, :], other=0)


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """f(value), float32; v (1 + tanh(u)) / 2 is v sigmoid(2 u)."""
    if ACTIVATION == "gelu":
        return 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    elif ACTIVATION == "silu":
        return value * tl.sigmoid(value)
    else:
        return value


@triton.jit
def write(  # type: ignore[no-untyped-def]
    total, token, row, bias, store, y, tokens, out_features,
    BIAS: tl.constexpr, STORE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The epilogue: f(`total` float32 `[TILE, ROWS]` plus the bias), to the outputs that the rows of S belong to."""
    inside = row < out_features
    output = row
    if STORE:
        output = tl.load(store + row, mask=inside, other=0)
    if BIAS:
        total += tl.load(bias + output, mask=inside, other=0).to(tl.float32)[None, :]
    total = activated(total, ACTIVATION)
    place = y + token[:, None] * out_features + output[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & inside[None, :])


def epilogue(
    bias: Tensor | None, perm_in: Tensor | None, store: Tensor | None, stand_in: Tensor, activation: str
) -> dict[str, Any]:
    """The optional tensors of a launch with their switches; `stand_in` goes where there is none and is not read."""
    optional = {"bias": bias, "perm_in": perm_in, "store": store}
    pointers = {key: stand_in if tensor is None else tensor for key, tensor in optional.items()}
    switches = {key.upper(): tensor is not None for key, tensor in optional.items()}
    return {**pointers, **switches, "ACTIVATION": activation}
