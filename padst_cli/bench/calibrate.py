"""Measuring anew what the paths of a model's layers are chosen by, on the device where the model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from padst_kernels.cpu.library import library
from padst_kernels.dispatch import calibrate_gpu, recalibrate
from padst_kernels.gpu.calibrate import TRAINING_GRID, OnMeasured, calibrate_training, silent

from padst_cli.bench.layers import groups_of
from padst_cli.bench.train import as_trained, layer_step, random_pair
from padst_cli.errors import PadstError
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.quantizer import packed_layers


def calibrate_model(sparse: Any, threads: int, train: bool, on_measured: OnMeasured | None) -> None:
    """Measure and keep; `train` takes in steps of training, which on the CPU follow from what is measured anyway.

    Raises `PadstError` on a CPU without compiled kernels.
    """
    on_measured = on_measured or silent
    if sparse.device.type != "cuda":
        if library() is None:
            raise PadstError(
                "--calibrate measures padst's compiled kernels, and this padst was installed without them; leave it "
                "out, or install a C compiler and padst again"
            )
        recalibrate(threads)
        return
    layouts = [layer.layout() for layer in packed_layers(sparse).values()]
    calibrate_gpu(layouts, sparse.dtype, on_measured=on_measured)
    if train:
        calibrate_steps(sparse, on_measured=on_measured)


def calibrate_steps(
    sparse: Any,
    *,
    tokens: Sequence[int] = TRAINING_GRID,
    deadline: float = float("inf"),
    on_measured: OnMeasured = silent,
) -> int:
    """Tune and time steps of training of a model's layers on a GPU, products in the model's dtype: what `SparseLinear`
    chooses by there. Otherwise as `calibrate_gpu`.
    """
    packed = packed_layers(sparse)
    layers = [packed[names[0]] for names in groups_of(packed)]
    kinds = {as_trained(layer).gpu_signature(sparse.dtype): partial(_steps, layer) for layer in layers}
    return calibrate_training(kinds, sparse.device, tokens=tokens, deadline=deadline, on_measured=on_measured)


def _steps(layer: PackedLinear) -> Callable[[int], Mapping[str, Callable[[], None]]]:
    trained, generator = as_trained(layer), torch.Generator().manual_seed(0)

    def steps(tokens: int) -> dict[str, Callable[[], None]]:
        x, dy = random_pair(layer, tokens, generator)
        return {name: layer_step(product, trained, x, dy) for name, product in trained.gpu_products(x).items()}

    return steps
