"""The training loop of PA-DST: one function for the sparse student and for the dense control, on accelerate.

Nothing is wrapped: gradients are averaged over the processes explicitly, because soft permutations leave the set of
parameters as they harden and support updates need the dense gradient of every weight. The batch of a step is a pure
function of (seed, step); every process computes its slice of it, so that a resumed run needs no data loader state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from padst_cli.data.items import Items, collate, step_indices
from padst_cli.errors import Interrupted, PadstError
from padst_cli.events import Evaluated, Hardened, Message, OnEvent, Saved, Step, SupportUpdated, ignore
from padst_cli.recipe import Recipe, TrainingRecipe
from padst_cli.training.activations import in_one_operation
from padst_cli.training.averaging import Average
from padst_cli.training.density import narrowed_at, narrows
from padst_cli.training.dynadiag import score_learning_rate, temperature_at
from padst_cli.training.hardening import HardenedRecord, Hardener, forget_parameter, learned_before
from padst_cli.training.memory import kept_memory
from padst_cli.training.objective import TEACHER_LOGITS, Batch, Objective
from padst_cli.training.optimizer import AdamW
from padst_cli.training.projected import GRADIENT_EVERY, Projection
from padst_cli.training.remembered import remember, worth_remembering
from padst_cli.training.result import Progress, TrainResult, result_of
from padst_cli.training.seeds import seeded
from padst_cli.training.sentences import of_kernels, of_learned, of_resting
from padst_cli.training.sparse_linear import mean_density, sparse_layers
from padst_cli.training.state import (
    STATE_VERSION,
    StateStore,
    StopRequest,
    check_same_run,
    random_state,
    restore_random_state,
    stop_on_signals,
)
from padst_cli.training.support import fraction_at, is_due, move_support, next_mask
from padst_cli.training.swap import match_layout

# Gradients of log M are as small as the entries of M: Adam's usual 1e-8 would hold the small ones still.
_SOFT_EPSILON = 1e-15

Evaluate = Callable[[nn.Module], tuple[str, float]]


def make_accelerator(device: str = "auto", dtype: str = "auto") -> Accelerator:
    """accelerate's view of devices and processes for a run.

    Autocasts to bfloat16 where `dtype` is "bfloat16", and with "auto" on a CUDA device that has it. Raises `PadstError`
    where "cuda" is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise PadstError("--device cuda: this machine shows no CUDA device; use --device cpu or auto")
    cpu = device == "cpu" or not torch.cuda.is_available()
    bf16 = dtype == "bfloat16" or (dtype == "auto" and not cpu and torch.cuda.is_bf16_supported())
    return Accelerator(cpu=cpu, mixed_precision="bf16" if bf16 else "no")


def rows_of_pass(training: TrainingRecipe, processes: int) -> int:
    """How many rows of the global batch one process takes at a time; raises `PadstError` where they do not divide."""
    parts = processes * training.accumulation
    if training.batch_size % parts:
        raise PadstError(
            f"batch_size {training.batch_size} does not divide over {processes} processes with accumulation "
            f"{training.accumulation}; make it a multiple of {parts}"
        )
    return training.batch_size // parts


def train(
    model: nn.Module,
    objective: Objective,
    dataset: Items,
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    store: StateStore | None = None,
    on_event: OnEvent = ignore,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    control: bool = False,
) -> TrainResult:
    """Train `model` in place for `recipe.training.steps` optimizer steps; afterwards no permutation is soft any more.

    A model without sparse layers is trained just the same (the dense control; `control` marks its events). `evaluate`
    is called in the main process every `eval_every` steps with the model in eval mode. With `resume` the run goes on
    from `store`'s state and ends with the weights of an uninterrupted one. Raises `PadstError` for a batch that does
    not divide, a loss that is not finite, or a state that does not fit, and `Interrupted` after SIGINT or SIGTERM, once
    the state is saved.
    """
    trainer = Trainer(model, objective, dataset, recipe, accelerator, store, on_event, evaluate, control)
    trainer.start(resume)
    return trainer.run()


class Trainer:
    """One run of `train`, whose arguments these are: `start` it, then `run` it, or `step` by step beside others."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        dataset: Items,
        recipe: Recipe,
        accelerator: Accelerator,
        store: StateStore | None = None,
        on_event: OnEvent = ignore,
        evaluate: Evaluate | None = None,
        control: bool = False,
    ) -> None:
        self.rows = rows_of_pass(recipe.training, accelerator.num_processes)
        self.model, self.objective, self.dataset = model.to(accelerator.device), objective, dataset
        self.recipe, self.accelerator, self.store = recipe, accelerator, store
        self.on_event = on_event if accelerator.is_main_process else ignore
        self.evaluate, self.control = evaluate, control
        self.progress = Progress()
        self.remembered: Tensor | None = None
        objective.to(accelerator.device)
        for trained in (model, objective.teacher):
            if trained is not None:
                in_one_operation(trained)

    # -- beginning, and beginning again ------------------------------------------------------------------------------

    def start(self, resume: bool) -> None:
        """Build what trains, from the model as given or from the saved state."""
        state = None
        if resume:
            if self.store is None:
                raise ValueError("nothing to resume from without a store")
            state = self.store.load()
            check_same_run(state, self.recipe, self.accelerator.num_processes, len(self.dataset))
            match_layout(self.model, state["model"])
            self.model.load_state_dict(state["model"])
        else:
            set_seed(self.recipe.seed, device_specific=True)
            self._agree()
        self.layers = sparse_layers(self.model)
        self.hardener = Hardener(self.layers, self.recipe)
        self.projection = Projection(self.layers, self.recipe)
        self._build_optimizer()
        self.average = Average(self.weights, self.recipe.training)
        if state is None:
            self._tell_start()
        else:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.average.load_state_dict(state["average"])
            saved = state["progress"]
            self.progress = Progress(**{**saved, "hardened": [HardenedRecord(**each) for each in saved["hardened"]]})
            restore_random_state(state["random"][self.accelerator.process_index])

    def _agree(self) -> None:
        # Calibration sums may differ in the last bit between machines; from here on all must hold the same numbers.
        if self.accelerator.num_processes > 1:
            for tensor in self.model.state_dict().values():
                broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor)

    def _build_optimizer(self) -> None:
        training = self.recipe.training
        if training.learning_rate is None:
            raise ValueError("the recipe has no learning rate; its default depends on the task")
        soft = [p for _, perm in self.hardener.soft.items() for p in perm.parameters() if p.requires_grad]
        scores = [layer.gates.scores for layer in self.layers.values() if layer.gates is not None]
        special = {id(p) for p in (*soft, *scores)}
        self.weights = [p for p in self.model.parameters() if p.requires_grad and id(p) not in special]
        plain = {"weight_decay": 0.0}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.weights if p.dim() >= 2]},
            {"params": [p for p in self.weights if p.dim() < 2], **plain},
            {"params": soft, "lr": self.recipe.permutation.learning_rate, "eps": _SOFT_EPSILON, **plain},
            {"params": scores, "lr": score_learning_rate(training.steps, self.recipe.support.until), **plain},
        ]
        self.optimizer = AdamW(groups, training.learning_rate, training.weight_decay)
        warmup = round(training.warmup * training.steps)
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, warmup, max(1, training.steps))

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Step until the end, a signal, or a loss that is not finite."""
        training, progress = self.recipe.training, self.progress
        self.model.train()
        self._remember()
        said = False
        with stop_on_signals() as stop, kept_memory(self.accelerator.device):
            while progress.step < training.steps:
                began = time.perf_counter()
                terms, wants_stop = self.step(stop)
                progress.seconds += time.perf_counter() - began
                self._report(terms)
                if not said:
                    self._say(of_kernels(self.layers.values()))
                    said = True
                last = progress.step == training.steps
                if wants_stop and not last:
                    self._stop()
                if last or progress.step % training.save_every == 0:
                    self._save()
        self._finish()
        return result_of(self.progress)

    def _remember(self) -> None:
        """Keep what the teacher says of every item, where training asks often enough."""
        left = self.recipe.training.steps - self.progress.step
        if left and worth_remembering(self.objective, len(self.dataset), self.recipe.training):
            self.remembered = remember(self.objective, self.dataset, self.rows, self.accelerator, self.on_event)

    def step(self, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """One optimizer step: the loss's terms, averaged over all processes, and whether any of these wants to stop."""
        index = self.progress.step
        self._anneal(index)
        sums = self._backward(index)
        terms = self._averaged({**sums, "stop": torch.tensor(float(stop.requested))})
        wants_stop = terms.pop("stop") > 0.0
        self._check_finite(terms["loss"], "loss")
        self._move_support(index)
        for layer in self.layers.values():
            if layer.weight.grad is not None and (layer.latent is None or not layer.dense_gradient):
                layer.weight.grad.masked_fill_(~layer.mask, 0.0)
        # Soft matrices are left out: the size of their penalty's gradient says nothing about the weights' step.
        norm = self.accelerator.clip_grad_norm_(self.weights, self.recipe.training.clip_norm)
        self._check_finite(float(norm), "gradient")
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.hardener.project(index + 1)
        self.progress.step = index + 1
        self.progress.items_seen += self.recipe.training.batch_size
        self.progress.loss = terms.pop("loss")
        self._harden()
        self.average.see(self.progress.step)
        return terms, wants_stop

    def _backward(self, index: int) -> dict[str, Tensor]:
        """Gradients of the step's whole batch into `.grad`; returns the mean loss and terms of this process's slice."""
        accumulation = self.recipe.training.accumulation
        due = self._is_due(index)
        for layer in self.layers.values():
            layer.dense_gradient = due or (layer.latent is not None and index % GRADIENT_EVERY == 0)
        sums: dict[str, Tensor] = {}
        for part in range(accumulation):
            batch = self._rows_of(index, part)
            with self.accelerator.autocast():
                loss, terms = self.objective(self.model, batch)
            self.accelerator.backward(loss / accumulation)
            for key, value in {"loss": loss.detach(), **terms}.items():
                sums[key] = sums.get(key, torch.zeros_like(value)) + value / accumulation
        if self.hardener.penalised:
            # Once a step, in full precision; the same in every process, so that averaging leaves it as it is.
            penalty = self.hardener.penalty()
            if penalty.requires_grad:
                self.accelerator.backward(self.hardener.penalty_weight(index) * penalty)
            sums["penalty"] = penalty.detach()
        if self.accelerator.num_processes > 1:
            self._average_gradients()
            self.projection.average()
        return sums

    def _average_gradients(self) -> None:
        """The mean over all processes; a parameter that some of them did not use has a gradient of zero there."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        used = torch.tensor([float(parameter.grad is not None) for parameter in trained])
        counts = self.accelerator.reduce(used.to(self.accelerator.device), "sum").tolist()
        for parameter, count in zip(trained, counts, strict=True):
            if count:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "mean")

    def _rows_of(self, index: int, part: int) -> Batch:
        """This process's rows of accumulation part `part` of the global batch of step `index`, on its device."""
        training = self.recipe.training
        first = (self.accelerator.process_index * training.accumulation + part) * self.rows
        everyone = step_indices(len(self.dataset), training.batch_size, self.recipe.seed, index)
        numbers = everyone[first : first + self.rows]
        batch = self.objective.prepare(collate([self.dataset[n] for n in numbers]), self.recipe.seed, index, first)
        batch = {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}
        return batch if self.remembered is None else {**batch, TEACHER_LOGITS: self.remembered[numbers]}

    def _averaged(self, terms: dict[str, Tensor]) -> dict[str, float]:
        # One reduction and one wait for the device, whatever the number of terms.
        stacked = torch.stack([value.to(self.accelerator.device, torch.float64) for value in terms.values()])
        return dict(zip(terms, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def _check_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise PadstError(
                f"the {what} is {value} at step {self.progress.step + 1} of {self.recipe.training.steps}; "
                "start again with a lower --learning-rate or a smaller training.clip_norm"
            )

    # -- what sparse layers need -------------------------------------------------------------------------------------

    def _anneal(self, index: int) -> None:
        """Set the temperature of DynaDiag's gates for this step, or fold them; drop latent weights after their time."""
        support, share = self.recipe.support, index / self.recipe.training.steps
        if self.projection.is_over(index):
            self._settle()
            self._say(of_resting(self.layers, self.recipe, index))
        first = temperature_at(0.0, support.until, *support.dynadiag_temperature)
        for layer in self.layers.values():
            if layer.gates is None:
                continue
            layer.gates.temperature = temperature_at(share, support.until, *support.dynadiag_temperature) / first
            if share >= support.until:
                forget_parameter(self.optimizer, layer.gates.scores)
                layer.fold_gates()

    def _is_due(self, index: int) -> bool:
        """Whether supports are chosen or move in step `index`."""
        if self.projection.layers:
            return self.projection.is_due(index)
        return is_due(self.recipe.support, index, self.recipe.training.steps)

    def _move_support(self, index: int) -> None:
        support, steps = self.recipe.support, self.recipe.training.steps
        due, narrower = self._is_due(index), narrows(support, index, steps)
        if not (due or narrower) or not self.layers:
            return
        if self.projection.layers:
            moved = self.projection.update(index, self.optimizer)
            fraction = sum(moved.values()) / sum(layer.structure.nonzeros for layer in self.layers.values())
        else:
            fraction = fraction_at(support, index, steps) if due else 0.0
            moved = self._drop_and_grow(index, fraction)
        self.progress.support_moved += sum(moved.values())
        self.on_event(SupportUpdated(index + 1, fraction, moved, mean_density(self.layers.values())))

    def _drop_and_grow(self, index: int, fraction: float) -> dict[str, int]:
        support, steps, moved = self.recipe.support, self.recipe.training.steps, {}
        for number, (name, layer) in enumerate(self.layers.items()):
            narrowed = narrowed_at(support, layer.structure, index, steps)
            mask = next_mask(layer, support, fraction, seeded(self.recipe.seed, index, number), narrowed)
            moved[name] = move_support(layer, broadcast(mask.view(torch.uint8)).view(torch.bool), self.optimizer)
        return moved

    def _harden(self, final: bool = False) -> None:
        done = self.progress.step
        for label, (penalty, cause) in self.hardener.due(done, final).items():
            self._record(self.hardener.harden(label, done, penalty, cause, self.optimizer))

    def _settle(self) -> None:
        for record in self.projection.settle(self.progress.step, self.optimizer):
            self._record(record)

    def _tell_start(self) -> None:
        """Of permutations that were learned before training, and of supports that will rest against the intention."""
        records = learned_before(self.layers, self.recipe)
        for record in records:
            self._record(record)
        self._say(of_learned(records))
        if not self.projection.layers:
            self._say(of_resting(self.layers, self.recipe))

    def _say(self, sentence: str | None) -> None:
        if sentence:
            self.on_event(Message(sentence))

    def _record(self, record: HardenedRecord) -> None:
        self.progress.hardened.append(record)
        self.on_event(Hardened(**asdict(record)))

    def _finish(self) -> None:
        """Leave plain sparse layers behind: gates folded, latent values dropped, every permutation an index."""
        self._harden(final=True)
        self._settle()
        for layer in self.layers.values():
            layer.fold_gates()
        self.average.take()
        self.model.eval()

    # -- telling and keeping -----------------------------------------------------------------------------------------

    def _report(self, terms: dict[str, float]) -> None:
        training, progress = self.recipe.training, self.progress
        last = progress.step == training.steps
        if last or progress.step % training.log_every == 0:
            self.on_event(self._step_event(terms))
        if self.evaluate is not None and training.eval_every and progress.step % training.eval_every == 0 and not last:
            self._evaluate(self.evaluate)

    def _step_event(self, terms: dict[str, float]) -> Step:
        progress, hardened = self.progress, len(self.progress.hardened)
        return Step(
            step=progress.step,
            steps=self.recipe.training.steps,
            loss=progress.loss,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            hardened=hardened,
            layers=hardened + len(self.hardener.soft) + len(self.projection.permutations),
            seconds=progress.seconds,
            items_seen=progress.items_seen,
            terms=terms,
            penalties=self.hardener.penalties(),
            control=self.control,
        )

    def _evaluate(self, evaluate: Evaluate) -> None:
        if self.accelerator.is_main_process:
            # Whether and how often one looks must not change what is learned.
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
            self.model.eval()
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                metric, value = evaluate(self.model)
            self.model.train()
            self.on_event(Evaluated(self.progress.step, metric, value, "during"))
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.store is None:
            return
        randoms = gather_object([random_state()])
        if self.accelerator.is_main_process:
            path = self.store.save(
                {
                    "version": STATE_VERSION,
                    "step": self.progress.step,
                    "recipe": self.recipe.model_dump(mode="json"),
                    "processes": self.accelerator.num_processes,
                    "items": len(self.dataset),
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "average": self.average.state_dict(),
                    "random": randoms,
                    "progress": asdict(self.progress),
                }
            )
            self.on_event(Saved(self.progress.step, str(path)))
        self.accelerator.wait_for_everyone()

    def _stop(self) -> None:
        progress, steps = self.progress, self.recipe.training.steps
        if self.store is None:
            raise Interrupted(f"stopped after step {progress.step} of {steps}; nothing was saved")
        self._save()
        raise Interrupted(
            f"stopped after step {progress.step} of {steps}; the state is in '{self.store.path}': "
            "give the same command with --resume to go on"
        )
