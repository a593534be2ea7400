"""The figures of one cell, read from the folder of its finished run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from padst_cli.checkpoint.run_folder import RESULTS, RunFolder, RunMetric
from padst_cli.checkpoint.stored import read_stored
from padst_cli.study.cells import Cell


@dataclass(frozen=True)
class CellFigures:
    """What a study keeps of one run; the fields are keys of study.json.

    `kl_to_dense` (nats, held out) and `final`, `initial`, `dense`, `dense_finetuned` (of the metric `metric`) are those
    of `padst sparsify`; the two of the fine-tuned dense model are None in all cells but the one that trained it.
    Seconds leave that training out. `step_seconds` is the mean over the run, `soft_step_seconds` that of the steps up
    to the last logged one with a soft permutation; None without such steps. `peak_bytes` is the most resident memory of
    the run's process (with a GPU: of its host side), None where it was not seen. `moved` counts entries of learned
    permutations that ended elsewhere than the assignment had put them, `moved_in_training` elsewhere than training
    began with.
    """

    model: str
    structure: str
    method: str
    sparsity: float
    seed: int
    sparsity_achieved: float
    task: str
    metric: str
    final: float
    initial: float
    dense: float
    kl_to_dense: float | None
    dense_finetuned: float | None
    dense_finetuned_kl_to_dense: float | None
    steps: int
    seconds: float
    step_seconds: float | None
    soft_step_seconds: float | None
    peak_bytes: int | None
    learned: int
    moved: int
    eval_data: str
    eval_digest: str
    hardware: str
    moved_in_training: int = 0

    @property
    def score(self) -> float:
        """The second figure of merit: the logarithm of a perplexity, any other metric as it is."""
        return score_of(self.metric, self.final)


def score_of(metric: str, value: float) -> float:
    """A metric on the scale on which its differences mean the same everywhere: perplexities by their logarithm."""
    return math.log(value) if metric.endswith("perplexity") else value


@dataclass(frozen=True)
class _Environment:
    """What is kept of the environment of a run."""

    hardware: str


@dataclass(frozen=True)
class _Permutations:
    """What is kept of the counts of permutations."""

    learned: int
    moved_from_start: int
    moved_in_training: int | None = None


@dataclass(frozen=True)
class _Results:
    """What is kept of the results of a run (`SparsifyResult` says what they are)."""

    sparsity_achieved: float
    task: str
    metric: RunMetric
    kl_to_dense: float | None
    dense_finetuned_kl_to_dense: float | None
    steps: int
    seconds: float
    permutations: _Permutations
    eval_data: str
    eval_digest: str
    environment: _Environment


def read_figures(cell: Cell, run: Path, peak_bytes: int | None) -> CellFigures:
    """The figures of the finished run of `cell` in the folder `run`; raises `PadstError` for damaged results."""
    path = run / RESULTS
    advice = f"remove '{run}' and start the study again, which then runs this cell anew"
    results = read_stored(path, _Results, f"'{path}' is damaged", advice)
    metric, permutations = results.metric, results.permutations
    in_training = permutations.moved_in_training
    steps = [event for event in RunFolder(run).events() if event["event"] == "Step"]
    own = [step for step in steps if not step["control"]]
    control = [step for step in steps if step["control"]]
    return CellFigures(
        model=cell.model,
        structure=cell.structure,
        method=cell.method,
        sparsity=cell.sparsity,
        seed=cell.seed,
        sparsity_achieved=results.sparsity_achieved,
        task=results.task,
        metric=metric.name,
        final=metric.final,
        initial=metric.initial,
        dense=metric.dense,
        kl_to_dense=results.kl_to_dense,
        dense_finetuned=metric.dense_finetuned,
        dense_finetuned_kl_to_dense=results.dense_finetuned_kl_to_dense,
        steps=results.steps,
        seconds=results.seconds - (control[-1]["seconds"] if control else 0.0),
        step_seconds=_mean_step(own),
        soft_step_seconds=_mean_step([step for step in own if step["hardened"] < step["layers"]]),
        peak_bytes=peak_bytes,
        learned=permutations.learned,
        moved=permutations.moved_from_start,
        moved_in_training=permutations.moved_from_start if in_training is None else in_training,
        eval_data=results.eval_data,
        eval_digest=results.eval_digest,
        hardware=results.environment.hardware,
    )


def _mean_step(steps: Sequence[dict[str, Any]]) -> float | None:
    """Mean seconds of all steps up to the last of the logged ones, which count from the beginning."""
    return steps[-1]["seconds"] / steps[-1]["step"] if steps else None
