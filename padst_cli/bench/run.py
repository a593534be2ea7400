"""The whole benchmark: layers, model, break-even density, with one number of threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from padst_kernels.dispatch import scratch_bytes
from padst_kernels.gpu.device import current

from padst_cli.bench.break_even import DENSITIES, break_even_densities
from padst_cli.bench.calibrate import calibrate_model
from padst_cli.bench.cuda import stopwatch_for
from padst_cli.bench.device import device_facts
from padst_cli.bench.layers import LayerBench, faster_dense, groups_of
from padst_cli.bench.model import Whole, model_rates
from padst_cli.bench.result import BenchResult, LayerRow, Limits, ModelRates, TrainRates
from padst_cli.bench.roofline import measure_limits
from padst_cli.bench.train import train_rates
from padst_cli.errors import PadstError
from padst_cli.evaluation.forward import evaluating
from padst_cli.runtime.fusion import fuse, unfuse
from padst_cli.runtime.packing import densify
from padst_cli.runtime.quantizer import packed_layers
from padst_cli.stopwatch import OnProgress, Progress, Stopwatch, Timing

DEFAULT_TOKENS = (1, 32, 512)


def bench(
    sparse: Any,
    dense: Any = None,
    *,
    task: str,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    threads: int | None = None,
    layers_only: bool = False,
    break_even: bool = False,
    calibrate: bool = False,
    train: bool = False,
    batch: int | None = None,
    compiled: bool = False,
    cuda_graphs: bool = True,
    seed: int = 0,
    timing: Timing = Timing(),
    on_progress: OnProgress | None = None,
) -> BenchResult:
    """Time a packed model against `dense` (default: itself made dense), layer by layer and as a whole, where it now
    lives.

    `task` is the source's; `threads` None keeps torch's; `calibrate` measures the costs of this machine anew first, by
    which paths are chosen; `train` adds training steps. `batch` is that of whole models, `compiled` runs these through
    torch.compile, `cuda_graphs` captures what is timed; the last two count for both sides, and on a GPU alone. Raises
    `PadstError` for a model without sparse layers, and for a calibration of kernels that are not there.
    """
    if not packed_layers(sparse):
        raise PadstError(
            "this model has no sparse layers to measure; give a folder that padst wrote, or --random-weights"
        )
    if not tokens or min(tokens) < 1:
        raise PadstError("token counts must be 1 or more")
    if compiled and sparse.device.type != "cuda":
        raise PadstError("compiled models are timed on a GPU alone; leave --compile out, or add --device cuda")
    before = torch.get_num_threads()
    threads = threads or before
    torch.set_num_threads(threads)
    try:
        stopwatch = stopwatch_for(timing, threads, sparse.device, cuda_graphs)
        with current(sparse.device):
            if calibrate:
                calibrate_model(sparse, threads, train, on_progress)
            with evaluating(sparse, dense):
                whole = Whole(batch, compiled)
                run = _Run(sparse, tuple(tokens), stopwatch, whole, seed, on_progress, break_even, train)
                return run.result(dense, task, layers_only)
    finally:
        torch.set_num_threads(before)


class _Run:
    """One benchmark: what is measured with which threads, and how far it is."""

    def __init__(
        self,
        sparse: Any,
        tokens: tuple[int, ...],
        stopwatch: Stopwatch,
        whole: Whole,
        seed: int,
        on_progress: OnProgress | None,
        break_even: bool,
        train: bool,
    ) -> None:
        self.sparse, self.tokens, self.seed, self.break_even, self.train = sparse, tokens, seed, break_even, train
        self.packed = packed_layers(sparse)
        self.groups = groups_of(self.packed)
        self.stopwatch, self.whole = stopwatch, whole
        self.notes: list[str] = []
        self.bencher = LayerBench(self.stopwatch, sparse.device, sparse.dtype, seed)
        cells = len(self.groups) * len(tokens)
        self.progress = Progress(on_progress, cells * (1 + train + len(DENSITIES) * break_even) + 3 + train)

    def result(self, dense: Any, task: str, layers_only: bool) -> BenchResult:
        """Measure everything in turn."""
        sparse, dtype = self.sparse, self.sparse.dtype
        value_dtype = next(iter(self.packed.values())).value_dtype
        self.progress.next("limits of this machine")
        limits = measure_limits(self.stopwatch, sparse.device, dtype)
        rows = tuple(self._row(names, count, limits) for names in self.groups for count in self.tokens)
        crossings = None
        if self.break_even:
            crossings = break_even_densities(self.groups, self.packed, self.tokens, self.bencher, self.progress)
        return BenchResult(
            device=str(sparse.device.type),
            threads=self.stopwatch.threads,
            dtype=_name(dtype),
            value_dtype=_name(value_dtype),
            layers=rows,
            model=None if layers_only else self._rates(dense, task),
            break_even_density=crossings,
            limits=limits,
            scratch_bytes=scratch_bytes(),
            faster_dense=faster_dense(rows, dtype.itemsize),
            train=self._train_rates(dense, task, layers_only) if self.train else None,
            gpu=device_facts(sparse.device),
            compiled=self.whole.compiled,
            cuda_graphs=getattr(self.stopwatch, "graphs", False),
            notes=(*self.notes, *getattr(self.stopwatch, "notes", ())),
        )

    def _row(self, names: list[str], tokens: int, limits: Limits) -> LayerRow:
        return self.bencher.row(names, self.packed, tokens, limits, self.progress)

    def _rates(self, dense: Any, task: str) -> ModelRates:
        dense = densify(self.sparse) if dense is None else dense
        # Undone below: the training rows that may follow want the layers as they were.
        fused = fuse(self.sparse)
        if fused:
            kinds = ", ".join(sorted(set(fused.values())))
            self.notes.append(
                f"whole model: {len(fused)} sparse layers end in the activation that follows them ({kinds}), as "
                "padst_cli.runtime.fusion.fuse makes them; the dense model runs as it is"
            )
        try:
            with evaluating(dense):
                tokens = max(self.tokens)
                return model_rates(
                    self.sparse, dense, task, tokens, self.stopwatch, self.seed, self.progress, self.whole
                )
        finally:
            unfuse(self.sparse)

    def _train_rates(self, dense: Any, task: str, layers_only: bool) -> TrainRates:
        whole = None if layers_only else densify(self.sparse) if dense is None else dense
        return train_rates(
            self.sparse,
            whole,
            self.groups,
            self.tokens,
            task,
            self.stopwatch,
            self.seed,
            self.progress,
            self.whole.batch,
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
