"""Which kernel computes a layer, by structure, density, device, dtype and tokens.

On the CPU the costs of the machine say it. On a GPU it is what `calibrate_gpu` measured there for layers like this one;
without that a Triton kernel runs wherever there is one (gpu/rules.py has the limits), a plain torch path elsewhere.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence

import torch

from .cpu import machine, native, transient
from .cpu.native import NativeKernel
from .cpu.torch_paths import DenseInPlace, DenseMatmul, GatherBmm
from .differentiable import differentiable
from .gpu import calibrate, paths, rules, semi
from .gpu.calibrate import OnMeasured
from .gpu.semi import SemiStructured
from .layout import Kernel, Layout
from .steps import GRID, Steps

__all__ = [
    "COMPACT_DTYPES",
    "Compact",
    "DenseInPlace",
    "Kernel",
    "Layout",
    "NativeKernel",
    "calibrate_gpu",
    "compact",
    "differentiable",
    "kernel_name",
    "made",
    "prepare",
    "recalibrate",
    "scratch_bytes",
    "select",
]


_log = logging.getLogger("padst_kernels")


def _triton(layout: Layout) -> Kernel:
    from .gpu.layer import TritonKernel  # imports triton, which a machine without a GPU may lack

    with torch.inference_mode(False):  # what is made inside inference mode could not serve gradients later
        return TritonKernel(layout)


_KERNELS: dict[str, Callable[[Layout], Kernel]] = {
    **{kernel.name: kernel for kernel in (DenseMatmul, GatherBmm, SemiStructured)},
    **{rules.kernel_name(structure): _triton for structure in rules.STRUCTURES},
}

GATHER_MAX_DENSITY = 0.25
"""Measured on one AVX2 core, 768 x 3072 in float32, 1 to 512 tokens: above it the gathers cost more than the zeros
they skip.
"""

COMPACT_DTYPES = frozenset(native.TYPES)
"""Dtypes of x that compact kernels compute on."""

scratch_bytes = transient.scratch_bytes

Compact = NativeKernel | DenseInPlace
"""What takes the place of a layer's packed tensors."""


def compact(layout: Layout, dtype: torch.dtype) -> Compact | None:
    """A kernel that takes the place of the layer's packed tensors, None where none serves it there.

    `dtype` is that of the activations. With many tokens the compiled kernel itself turns to the dense product where the
    cost model says so; only a layer that may be dense for the memory bound, and gains by it, is kept dense. Without
    compiled kernels one that runs through a dense weight lets go of its packed tensors for it.
    """
    device = layout.tensors["values"].device
    served = _served(layout, device)
    dense = _better_dense(layout, dtype) if served else _only_dense(layout, device, dtype)
    if not (served or dense):
        return None
    with torch.inference_mode(False):  # what is made inside inference mode could not enter a graph later
        return DenseInPlace(layout) if dense else NativeKernel(layout)


def recalibrate(threads: int) -> None:
    """Measure the costs of this machine anew and keep them; layers that run already stay on their paths."""
    machine.recalibrate(threads)
    transient.limits.cache_clear()


def kernel_name(layout: Layout, device: torch.device, tokens: int, dtype: torch.dtype) -> str:
    """The name of what would compute `tokens` rows of `dtype` on `device`; the layout's tensors may be on `meta`.

    Without compiled kernels plain torch has a form of its own for blocks only; a gather formula for diagonals or N:M
    is slower than the dense product.
    """
    if dtype not in COMPACT_DTYPES or not _served(layout, device):
        return _stored_name(layout, device, tokens, dtype)
    if _better_dense(layout, dtype):
        return DenseInPlace.name
    limit = transient.limits(layout.work)[torch.get_num_threads(), dtype]
    return transient.NAME if tokens * layout.in_features >= limit else native.kernel_name(layout.structure)


def _served(layout: Layout, device: torch.device) -> bool:
    return native.serves(layout.structure, layout.in_features, device, layout.tensors["values"].dtype)


def _only_dense(layout: Layout, device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or layout.structure not in native.STRUCTURES or not _can_be_dense(layout, dtype):
        return False
    return _stored_name(layout, device, 1, dtype) == DenseMatmul.name


def _can_be_dense(layout: Layout, dtype: torch.dtype) -> bool:
    return layout.repack is not None and layout.tensors["values"].dtype == dtype


def _better_dense(layout: Layout, dtype: torch.dtype) -> bool:
    if not _can_be_dense(layout, dtype) or not DenseInPlace.fits(layout):
        return False
    return machine.costs(torch.get_num_threads()).dense_gains(layout.work, str(dtype).removeprefix("torch."))


def _stored_name(layout: Layout, device: torch.device, tokens: int, dtype: torch.dtype) -> str:
    """The name of what computes from the packed tensors as they are stored."""
    if device.type != "cuda":
        return _ruled_name(layout, device, tokens, dtype)
    steps = layout.choices.get(dtype)
    name = (_steps(layout, device, dtype) if steps is None else steps).at(tokens)
    assert name is not None
    return name


def _steps(layout: Layout, device: torch.device, dtype: torch.dtype) -> Steps[str]:
    return paths.steps(layout, device, dtype, lambda tokens: _ruled_name(layout, device, tokens, dtype))


def _ruled_name(layout: Layout, device: torch.device, tokens: int, dtype: torch.dtype) -> str:
    values = layout.tensors["values"].dtype
    if rules.serves(layout.structure, device, tokens, dtype, values, layout.density, layout.parameters):
        return rules.kernel_name(layout.structure)
    if device.type != "cuda" and layout.structure == "block" and layout.density <= GATHER_MAX_DENSITY:
        return GatherBmm.name
    return DenseMatmul.name


def select(layout: Layout, tokens: int, dtype: torch.dtype) -> Kernel:
    """What runs `tokens` rows of `dtype` where `compact` serves not: made once and kept in `layout.prepared`."""
    device = layout.tensors["values"].device
    if device.type == "cuda" and dtype not in layout.choices:
        layout.choices[dtype] = _steps(layout, device, dtype)
        if not paths.known(layout, device, dtype):
            _say_unmeasured()
    name = _stored_name(layout, device, tokens, dtype)
    kernel = layout.prepared.get(name)
    if kernel is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a packed layer makes what its kernels need at its first call, which a CUDA graph cannot hold: call "
                "the model once before capturing it, with as many tokens"
            )
        kernel = layout.prepared[name] = _KERNELS[name](layout)
    return kernel


def made(layout: Layout, tokens: int, dtype: torch.dtype) -> Kernel | None:
    """What `select` gives, where it is ready: for tracers, under which nothing can be made."""
    device = layout.tensors["values"].device
    if device.type == "cuda" and dtype not in layout.choices:
        return None
    kernel = layout.prepared.get(_stored_name(layout, device, tokens, dtype))
    return kernel if kernel is not None and kernel.ready(dtype) else None


@functools.cache
def _say_unmeasured() -> None:
    _log.warning(
        "nothing is measured of this model on this GPU: rules choose how its layers run, 2:4 ones with many tokens run "
        "dense; `padst bench MODEL --calibrate` measures, once"
    )


def calibrate_gpu(
    layouts: Iterable[Layout],
    dtype: torch.dtype,
    *,
    tokens: Sequence[int] = GRID,
    deadline: float = float("inf"),
    on_measured: OnMeasured = calibrate.silent,
) -> int:
    """Tune the kernels of layers on the GPU where they are and time their paths, dense included, for activations of
    `dtype`; the layers take the fastest from then on, and so do layers like them in processes to come.

    Stops at `deadline` (seconds of `time.monotonic`); returns how many cells, a kind of layer at a token count, were
    left to the rules.
    """
    layouts = list(layouts)
    left = calibrate.calibrate(
        layouts,
        dtype,
        lambda layout: _gpu_paths(layout, dtype),
        tokens=tokens,
        deadline=deadline,
        on_measured=on_measured,
    )
    for layout in layouts:
        layout.choices.clear()
    return left


def _gpu_paths(layout: Layout, dtype: torch.dtype) -> calibrate.Paths:
    found: dict[str, Callable[[Layout], Kernel]] = {DenseMatmul.name: DenseMatmul}
    if rules.computes(layout.structure, dtype, layout.tensors["values"].dtype):
        found[rules.kernel_name(layout.structure)] = _triton
    if semi.applies(layout):
        found[SemiStructured.name] = SemiStructured
    return found


def prepare(layout: Layout, dtype: torch.dtype) -> None:
    """Make what calls with few and with many tokens will need, as before tracing a graph that may not make it."""
    select(layout, 1, dtype).prepare(dtype)
    select(layout, 1 << 20, dtype).prepare(dtype)
    for limit in layout.choices[dtype].limits if dtype in layout.choices else ():
        select(layout, limit, dtype).prepare(dtype)
