"""What a step costs with each learner of the permutation, beside a fixed order: runs in turns, in one process.

The cells of a study come one after another, and a shared machine's speed changes meanwhile. Here each step of one run
is followed by the same step of all others, so that what disturbs one disturbs all. All begin with the same order, and
the schedule is that of a whole run, only shorter.

    python -m padst_cli.pipeline.learner_costs MODEL --recipe quickstart --structure block --steps 80
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import torch
from accelerate.utils import set_seed

from padst_cli.checkpoint.reader import load_dense
from padst_cli.errors import PadstError
from padst_cli.events import Event, Message, OnEvent, ignore
from padst_cli.initialise import LayerStart, initialise
from padst_cli.pipeline.job import Job, open_job
from padst_cli.recipe import Recipe, load_recipe
from padst_cli.training.memory import kept_memory
from padst_cli.training.state import StopRequest
from padst_cli.training.swap import sparsify_modules
from padst_cli.training.trainer import Trainer, make_accelerator

FIXED: Final = "refined"
"""The learner that is done before training begins: its steps are those of a fixed order."""
LEARNERS: Final = ("soft", "projected", "straight-through")
_WARM_UP: Final = 2
"""Steps that are left out: memory is touched for the first time, kernels are made."""


@dataclass(frozen=True)
class LearnerCost:
    """Mean milliseconds of a step over the run, and their ratio to the fixed order's; `learning` is that ratio over the
    steps before the deadline alone."""

    learner: str
    step_ms: float
    ratio: float
    learning: float


def learner_costs(
    model: str,
    recipe: Recipe,
    learners: Sequence[str] = LEARNERS,
    *,
    device: str = "auto",
    on_event: OnEvent = ignore,
) -> list[LearnerCost]:
    """Train a run with each of `learners` and one with a fixed order, a step of each in turn.

    `recipe.training.steps` is the length of the runs, at least 4. Raises `PadstError` as `sparsify` does.
    """
    steps = recipe.training.steps
    if steps < 2 * _WARM_UP:
        raise PadstError(f"training.steps {steps} are too few to compare: {_WARM_UP} warm up, take 80")
    accelerator = make_accelerator(device, recipe.dtype)
    jobs = {name: _job(model, recipe, name) for name in dict.fromkeys((FIXED, *learners))}
    starts: dict[str, LayerStart] | None = None
    runs: dict[str, Trainer] = {}
    for name, job in jobs.items():
        set_seed(job.recipe.seed)
        teacher = load_dense(job.source, dtype=torch.float32, device=accelerator.device)
        student = copy.deepcopy(teacher)
        if starts is None:
            batches = job.calibration_batches(accelerator.device)
            starts = initialise(teacher, copy.deepcopy(teacher), job.plan, batches, job.recipe, on_event)
        sparsify_modules(student, starts, job.plan, job.recipe, teacher)
        runs[name] = Trainer(student, job.objective(teacher), job.items, job.recipe, accelerator)
        runs[name].start(resume=False)
        student.train()
    with kept_memory(accelerator.device):
        seconds = _in_turns(runs, steps, accelerator.device, on_event)
    learning = max(_WARM_UP + 1, round(recipe.permutation.deadline * steps))
    return [_cost(name, seconds, learning) for name in runs]


def _job(model: str, recipe: Recipe, learner: str) -> Job:
    changes = {"model": model, "permutation.kind": "learned", "permutation.learner": learner}
    return open_job(model, recipe.updated(changes))


def _in_turns(
    runs: Mapping[str, Trainer], steps: int, device: torch.device, on_event: OnEvent
) -> dict[str, list[float]]:
    """Seconds of every step of every run, without those of the warm-up."""
    stop, seconds = StopRequest(), {name: list[float]() for name in runs}
    for step in range(steps):
        if step % 10 == 0:
            on_event(Message(f"step {step + 1} of {steps} of each run"))
        for name, run in runs.items():
            began = time.perf_counter()
            run.step(stop)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if step >= _WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _cost(name: str, seconds: Mapping[str, Sequence[float]], learning: int) -> LearnerCost:
    own, fixed = seconds[name], seconds[FIXED]
    early = learning - _WARM_UP
    return LearnerCost(name, 1e3 * sum(own) / len(own), sum(own) / sum(fixed), sum(own[:early]) / sum(fixed[:early]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; prints a table, or with `--json` one object."""
    given = _parser().parse_args(arguments)
    changes = {"structure": given.structure, "sparsity": given.sparsity, "training.steps": given.steps}
    try:
        recipe = load_recipe(given.recipe).updated({key: value for key, value in changes.items() if value is not None})
        found = learner_costs(given.model, recipe, given.learners, device=given.device, on_event=_tell)
    except PadstError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if given.json:
        print(json.dumps([asdict(each) for each in found]))
        return 0
    print(f"| learner | a step | x {FIXED} | x {FIXED}, before the deadline |\n| --- | --- | --- | --- |")
    for each in found:
        print(f"| {each.learner} | {each.step_ms:.0f} ms | {each.ratio:.3f} | {each.learning:.2f} |")
    return 0


def _tell(event: Event) -> None:
    if isinstance(event, Message):
        print(event.text, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m padst_cli.pipeline.learner_costs", description=__doc__)
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("--recipe", required=True, help="a recipe file, or the name of one that comes with padst")
    parser.add_argument("--structure", choices=("diag", "nm", "block"))
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=LEARNERS)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
