"""The whole run of `padst sparsify`, phase by phase, each of them resumable."""

from __future__ import annotations

import copy
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from pydantic import Field
from torch import nn

from padst_cli.checkpoint.lock import at_work, check_idle
from padst_cli.checkpoint.output import check_apart, check_output
from padst_cli.checkpoint.reader import load_dense
from padst_cli.checkpoint.run_folder import RECIPE, RunFolder
from padst_cli.checkpoint.writer import replaced
from padst_cli.data.corpus import place_of
from padst_cli.data.items import collate
from padst_cli.document import dotted
from padst_cli.errors import Interrupted, PadstError, full_disk_told
from padst_cli.evaluation import EvalResult, evaluate_model
from padst_cli.events import Evaluated, Event, OnEvent, PhaseStarted, ignore
from padst_cli.initialise import LayerStart, allocate, initialise
from padst_cli.permutation.apply import from_structure
from padst_cli.pipeline.finish import environment, finish_run
from padst_cli.pipeline.job import Job, open_job
from padst_cli.pipeline.planning import plan_for
from padst_cli.recipe import DATA_ALLOCATIONS, FILLED_IN, Recipe, load_recipe
from padst_cli.tracing import frozen
from padst_cli.training.result import TrainResult
from padst_cli.training.state import StateStore
from padst_cli.training.swap import sparsify_modules
from padst_cli.training.trainer import make_accelerator, rows_of_pass, train
from padst_cli.tying import untie


@dataclass
class _Found:
    """What the sessions of a run have found so far: its progress file.

    Evaluations by phase, densities by layer where the data decide them, the seconds that it took, and the digests of
    the data that all of it comes from (none in what a version before them began).
    """

    seconds: float = 0.0
    digests: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, EvalResult] = field(default_factory=dict)
    densities: dict[str, Annotated[float, Field(gt=0.0, le=1.0)]] | None = None


@dataclass(frozen=True)
class SparsifyResult:
    """What `padst sparsify` reports; fields are its JSON keys (bytes: whole model, float32)."""

    output: str
    task: str
    structure: str
    sparsity_requested: float
    sparsity_achieved: float
    whole_model_density: float
    layers: int
    steps: int
    seconds: float
    tokens_or_images_seen: int
    metric: dict[str, Any]
    kl_to_dense: float | None
    dense_finetuned_kl_to_dense: float | None
    permutations: dict[str, int]
    dense_bytes: int
    packed_bytes: int
    train_data: str
    eval_data: str
    eval_digest: str
    environment: dict[str, str]


def sparsify(
    model: str,
    recipe: Recipe,
    output: Path | str,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = ignore,
    command: str | None = None,
) -> SparsifyResult:
    """Make a pretrained checkpoint sparse after `recipe` and write the result to the folder `output`.

    With `resume` an unfinished run in `output` goes on from its last saved state and ends with the same weights as an
    uninterrupted one; what `recipe` states must be what that run was started with. Raises `PadstError` for bad input,
    and where another process is at work in `output`, before anything is written; `Interrupted` for a stop (SIGINT,
    SIGTERM) of a run that can be resumed.
    """
    recipe = recipe.updated({"model": model})
    if resume:
        recipe = recipe_to_resume(Path(output), recipe)
    accelerator = make_accelerator(device, recipe.dtype)
    folder = RunFolder(Path(output), main=accelerator.is_main_process)
    check_idle(folder.path)
    if not resume:
        check_output(folder.path, overwrite=overwrite)
    # No process may create the folder before all have looked whether it is free.
    accelerator.wait_for_everyone()
    begun = resume
    again = resume_command(model, folder.path, accelerator.num_processes)
    try:
        job = open_job(model, recipe)
        check_apart(folder.path, _inputs_of(job))
        rows_of_pass(job.recipe.training, accelerator.num_processes)
        teacher = load_dense(job.source, dtype=torch.float32, device=accelerator.device)
        if job.recipe.training.steps:
            _check_step(job, teacher)
        if not resume:
            _check_heldout(job, teacher)
        # Asked again, for another run may have come and gone meanwhile.
        check = folder.check_resumable if resume else partial(check_output, folder.path, overwrite=overwrite)
        with _at_work(folder, check):
            if not resume:
                folder.begin(job.recipe.to_yaml())
                begun = True
            with full_disk_told(folder.path, f"go on with: {again}"):
                if resume:
                    folder.mend_log()
                accelerator.wait_for_everyone()
                run = _Run(job, folder, accelerator, on_event, command or f"padst sparsify {shlex.quote(model)}")
                return run.execute(teacher)
    except (Interrupted, KeyboardInterrupt):
        if not begun:
            raise
        if folder.is_finished:
            folder.drop_state()
            whole = f"the result in '{folder.path}' is whole"
            raise Interrupted(f"interrupted when the run was finished: {whole}") from None
        raise Interrupted(f"interrupted, the state is saved; go on with: {again}") from None


@contextmanager
def _at_work(folder: RunFolder, check: Callable[[], None]) -> Iterator[None]:
    """Keep other runs out of the folder while the block runs, once `check` passes there.

    The main process does; where it raises `PadstError` all do, so that none waits for it.
    """
    refusal: PadstError | None = None
    with ExitStack() as held:
        if folder.main:
            try:
                held.enter_context(at_work(folder.path))
                check()
            except PadstError as error:
                refusal = error
        (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            raise refusal
        yield


def _inputs_of(job: Job) -> dict[str, Path]:
    """What a run reads for as long as it can be resumed, by what it is."""
    data = {"data": job.recipe.data, "held-out data": job.recipe.eval_data}
    places = {what: place_of(spec) for what, spec in data.items() if spec is not None}
    return {"model": job.source.folder, **{what: place for what, place in places.items() if place is not None}}


@torch.no_grad()
def _check_step(job: Job, teacher: nn.Module) -> None:
    """Raise `PadstError` where a training step cannot be: no labels, ids or attention that the model does not take."""
    device = next(teacher.parameters()).device
    item = {key: value.to(device) for key, value in collate([job.items[0]]).items()}
    with frozen(teacher):  # as an objective leaves it; the student is made of it
        for control in (False, True) if job.has_control else (False,):
            objective = job.objective(None if control else teacher)
            objective(teacher, objective.prepare(item, job.recipe.seed, 0, 0))


def _check_heldout(job: Job, teacher: nn.Module) -> None:
    """Raise `PadstError` where the held-out data cannot be evaluated on: too short, no labels."""
    evaluate_model(teacher, job.processor, job.source.task, job.heldout, max_samples=1, reference=teacher)


def resume_command(model: str, output: Path, processes: int = 1) -> str:
    """The command line that goes on with an interrupted run."""
    start = ["padst"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes), "-m", "padst_cli"]
    return shlex.join([*start, "sparsify", model, "--output", str(output), "--resume"])


def recipe_to_resume(output: Path, given: Recipe) -> Recipe:
    """The recipe of the unfinished run in `output`; raises `PadstError` where `given` states something else.

    What `given` leaves to the default does not count, and neither does a stated None that the run has filled in.
    """
    RunFolder(output).check_resumable()
    stored = load_recipe(str(output / RECIPE))
    started_with = dotted(stored.model_dump(mode="json"))
    for key, value in given.stated().items():
        left_open = value is None and key in FILLED_IN
        if value != started_with[key] and not left_open:
            raise PadstError(
                f"the unfinished run in '{output}' was started with {key} = {started_with[key]}, not {value}; "
                "resume it as it is, or start anew with --overwrite"
            )
    return stored


class _Run:
    """One run in progress: keeps the figures found so far on disk, so that a resumed run skips what is done."""

    def __init__(self, job: Job, folder: RunFolder, accelerator: Accelerator, listener: OnEvent, command: str) -> None:
        self.job = job
        self.recipe = job.recipe
        self.folder = folder
        self.accelerator = accelerator
        self.listener = listener
        self.command = command
        self.found: _Found = folder.load_progress(_Found)
        self.began = time.perf_counter() - self.found.seconds
        self._check_same_data()

    def execute(self, teacher: nn.Module) -> SparsifyResult:
        set_seed(self.recipe.seed)
        dense = self._measured("dense", teacher, None)
        self._allocate(teacher)
        student = copy.deepcopy(teacher)
        if self.job.plan.unties:
            untie(student)
        starts = self._start(teacher, student)
        initial = self._measured("initial", student, teacher)
        sparsify_modules(student, starts, self.job.plan, self.recipe, teacher)
        trained = self._train(student, teacher, control=False)
        if not trained.steps:  # the model is the one that was measured before
            self.found.metrics["final"] = initial
        final = self._measured("final", student, teacher)
        control = self._dense_control(teacher)
        result = self._result(dense, initial, final, control, trained)
        finish_run(self.job, self.folder, self.accelerator, student, starts, asdict(result), self.command)
        return result

    # -- phases ------------------------------------------------------------------------------------------------

    def _allocate(self, teacher: nn.Module) -> None:
        """Make the plan anew with densities that follow the data, where the recipe asks for that."""
        if self.recipe.allocation not in DATA_ALLOCATIONS:
            return
        if self.found.densities is None:
            self.event(PhaseStarted("allocate"))
            batches = self.job.calibration_batches(self.accelerator.device)
            # Sums may differ in the last bit between processes; all must have one plan.
            found = [allocate(teacher, self.job.plan, batches, self.recipe, self.event)]
            self.found.densities = broadcast_object_list(found)[0]
            self._save_progress()
        self.job = replace(self.job, plan=plan_for(self.job.source, self.recipe, self.found.densities))

    def _start(self, teacher: nn.Module, student: nn.Module) -> dict[str, LayerStart]:
        path = self.folder.state / "start.pt"
        if path.is_file():
            return load_starts(path, self.job, student)
        self.event(PhaseStarted("calibrate", len(self.job.plan.layers)))
        batches = self.job.calibration_batches(self.accelerator.device)
        starts = initialise(teacher, student, self.job.plan, batches, self.recipe, self.event)
        if self.folder.main:
            save_starts(path, starts)
        return starts

    def _train(self, student: nn.Module, teacher: nn.Module | None, control: bool) -> TrainResult:
        phase = "dense control" if control else "train"
        store = StateStore(self.folder.state / ("control" if control else "train"))
        resume = store.exists()
        if resume:
            self.folder.rewind_log(store.step(), control)
        elif not control or not self._logged(phase):
            self.event(PhaseStarted(phase, self.recipe.training.steps))
        self.accelerator.wait_for_everyone()
        return train(
            student,
            self.job.objective(None if control else teacher),
            self.job.items,
            self.recipe,
            self.accelerator,
            store=store,
            on_event=self.event,
            resume=resume,
            evaluate=None if control else self._evaluator(teacher),
            control=control,
        )

    def _dense_control(self, teacher: nn.Module) -> EvalResult | None:
        """Fine-tune the dense model as long, where the job has a control."""
        if not self.job.has_control:
            return None
        set_seed(self.recipe.seed)
        # Distillation froze the teacher.
        control = copy.deepcopy(teacher).requires_grad_(True)
        self._train(control, None, control=True)
        return self._measured("dense_finetuned", control, teacher)

    # -- figures -----------------------------------------------------------------------------------------------

    def _evaluator(self, reference: nn.Module | None) -> Callable[[nn.Module], tuple[str, float]]:
        def measure(model: nn.Module) -> tuple[str, float]:
            result = self._evaluate(model, reference)
            return result.metric_name, result.value

        return measure

    def _evaluate(self, model: nn.Module, reference: nn.Module | None) -> EvalResult:
        training = model.training
        model.eval()
        result = evaluate_model(
            model,
            self.job.processor,
            self.job.source.task,
            self.job.heldout,
            max_samples=self.recipe.eval_samples,
            reference=reference,
            device=self.accelerator.device,
        )
        model.train(training)
        return result

    def _measured(self, phase: str, model: nn.Module, reference: nn.Module | None) -> EvalResult:
        """Evaluate once per run: what an earlier session measured is taken from the progress file."""
        if phase not in self.found.metrics:
            self.event(PhaseStarted(f"evaluate {phase}"))
            needs_reference = self.job.source.task == "encoder"
            result = self._evaluate(model, model if needs_reference and reference is None else reference)
            self.found.metrics[phase] = result
            steps = 0 if phase in ("dense", "initial") else self.recipe.training.steps
            self.event(Evaluated(steps, result.metric_name, result.value, phase))
            self._save_progress()
        return self.found.metrics[phase]

    def _result(
        self,
        dense: EvalResult,
        initial: EvalResult,
        final: EvalResult,
        control: EvalResult | None,
        trained: TrainResult,
    ) -> SparsifyResult:
        plan = self.job.plan
        sharing = sum(bool(layer.shared) for layer in plan.layers)
        return SparsifyResult(
            output=str(self.folder.path),
            task=self.job.source.task,
            structure=self.recipe.structure,
            sparsity_requested=plan.sparsity_requested,
            sparsity_achieved=plan.sparsity_achieved,
            whole_model_density=plan.whole_model_density,
            layers=len(plan.layers),
            steps=trained.steps,
            seconds=time.perf_counter() - self.began,
            tokens_or_images_seen=trained.items_seen * self._tokens_an_item(),
            metric={
                "name": final.metric_name,
                "dense": dense.value,
                "dense_finetuned": control.value if control else None,
                "initial": initial.value,
                "final": final.value,
            },
            kl_to_dense=final.kl_to_dense,
            dense_finetuned_kl_to_dense=control.kl_to_dense if control else None,
            permutations=trained.permutations | ({"sharing_layers": sharing} if sharing else {}),
            dense_bytes=plan.dense_bytes(torch.float32),
            packed_bytes=plan.packed_bytes(torch.float32, torch.float32),
            train_data=self.job.train_corpus.name,
            eval_data=self.job.heldout.name,
            eval_digest=self.job.heldout.digest,
            environment=environment(self.accelerator),
        )

    def _tokens_an_item(self) -> int:
        return self.recipe.training.max_seq_length if self.job.source.modality == "text" else 1

    # -- bookkeeping -------------------------------------------------------------------------------------------

    def _check_same_data(self) -> None:
        """Keep the digests of the data; raise `PadstError` where an earlier session saw others under the same name."""
        data = {"training data": self.job.train_corpus, "held-out data": self.job.heldout}
        for what, corpus in data.items():
            if self.found.digests.get(what, corpus.digest) != corpus.digest:
                raise PadstError(
                    f"the {what} '{corpus.name}' changed since the run in '{self.folder.path}' began; "
                    "put them back as they were and resume, or start anew with --overwrite"
                )
        self.found.digests = {what: corpus.digest for what, corpus in data.items()}
        self._save_progress()

    def event(self, event: Event) -> None:
        """Log an event and pass it on to the listener (on the main process)."""
        self.folder.log(event)
        if self.folder.main:
            self.listener(event)

    def _logged(self, phase: str) -> bool:
        return any(e["event"] == "PhaseStarted" and e["phase"] == phase for e in self.folder.events())

    def _save_progress(self) -> None:
        self.found.seconds = time.perf_counter() - self.began
        self.folder.save_progress(asdict(self.found))


def save_starts(path: Path, starts: dict[str, LayerStart]) -> None:
    """Keep the start of training on disk, whole or not at all, so that a resumed run need not calibrate again."""
    raw = {
        name: {key: value for key, value in vars(start).items() if key not in ("name", "structure")}
        for name, start in starts.items()
    }
    with replaced(path) as file:
        torch.save(raw, file)


@torch.no_grad()
def load_starts(path: Path, job: Job, student: nn.Module) -> dict[str, LayerStart]:
    """Inverse of `save_starts`; puts the sparse weights into `student` as calibration would have.

    Raises `PadstError` where the file cannot be read.
    """
    try:
        raw = torch.load(path, weights_only=True, map_location=next(student.parameters()).device)
        starts = {
            layer.name: LayerStart(name=layer.name, structure=layer.structure, **raw[layer.name])
            for layer in job.plan.layers
        }
    except Exception as error:
        raise PadstError(
            f"'{path}' cannot be read ({type(error).__name__}); remove it and resume: the run then calibrates anew"
        ) from error
    for layer in job.plan.layers:
        start = starts[layer.name]
        weight = from_structure(start.weight, start.perm_in, start.perm_out)
        student.get_submodule(layer.name).get_parameter("weight").copy_(weight.T if layer.transposed else weight)
    return starts
