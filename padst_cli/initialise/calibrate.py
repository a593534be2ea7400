"""Sequential calibration: every layer starts from what the already sparse model before it really passes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from padst_cli.errors import PadstError
from padst_cli.events import CalibrationProgress, Message, OnEvent
from padst_cli.initialise.blocks import Group, Unit, find_units
from padst_cli.initialise.layer import DenseLayer, start_layers
from padst_cli.initialise.sensitivity import output_sensitivity
from padst_cli.initialise.start import LayerStart
from padst_cli.initialise.statistics import InputStatistics
from padst_cli.initialise.streams import Stream
from padst_cli.permutation.apply import from_structure
from padst_cli.plan import LayerPlan, Plan
from padst_cli.recipe import Recipe
from padst_cli.tracing import Inputs
from padst_cli.tying import tied_weights


@torch.no_grad()
def initialise(
    teacher: nn.Module,
    student: nn.Module,
    plan: Plan,
    batches: Sequence[dict[str, Tensor]],
    recipe: Recipe,
    on_event: OnEvent,
) -> dict[str, LayerStart]:
    """Give every planned layer its permutation, support and refitted weights; returns them by name, in plan order.

    `student` starts as a copy of the dense `teacher`, with memory of its own, untied where the plan unties. Layers are
    taken in execution order; as one is done, its dense weight in `student` (and nothing else) is overwritten with the
    sparse one, so that later layers see sparse inputs X' while aiming at the dense outputs. `batches` are model inputs;
    `labels` are ignored, and tokens that `attention_mask` leaves out do not count. Both models run in eval mode and get
    their mode back. Deterministic for `recipe.seed`. Raises `PadstError` for empty batches and inputs that are not
    finite.
    """
    if plan.unties and tied_weights(student):
        raise ValueError("untie the student first: a sparse head would overwrite its embedding")
    if not batches:
        raise PadstError("there is no calibration data: the corpus gave no batch; give more text or images with --data")
    device = next(student.parameters()).device
    inputs = [{key: value.to(device) for key, value in batch.items() if key != "labels"} for batch in batches]
    with evaluating(teacher), evaluating(student):
        units = find_units(teacher, [layer.name for layer in plan.layers], inputs[0])
        on_event(Message(_describe(units)))
        run = _Calibration(teacher, student, plan, inputs, recipe, on_event)
        starts = run.over(units)
    return {layer.name: starts[layer.name] for layer in plan.layers}


class _Calibration:
    """One run of `initialise`: what stays the same from layer to layer."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        plan: Plan,
        inputs: Sequence[Inputs],
        recipe: Recipe,
        on_event: OnEvent,
    ) -> None:
        self._models = (teacher, student)
        self._output_weights = _output_weights(teacher, plan, inputs, recipe, on_event)
        self._layers = {layer.name: layer for layer in plan.layers}
        self._inputs = inputs
        self._recipe = recipe
        self._on_event = on_event
        self._starts: dict[str, LayerStart] = {}

    def over(self, units: Sequence[Unit]) -> dict[str, LayerStart]:
        teacher, student = self._models
        dense, sparse = Stream(teacher, units, self._inputs), Stream(student, units, self._inputs)
        for unit in units:
            dense.advance()
            sparse.advance()
            for group in unit.groups:
                statistics = self._collect(group, dense, sparse)
                for layers in self._bundles(group):
                    self._start(layers, statistics)
        return self._starts

    def _collect(self, group: Group, dense: Stream, sparse: Stream) -> InputStatistics:
        width = self._layers[group.layers[0]].in_features
        statistics = InputStatistics(width, _weight(self._models[1], group.layers[0]).device)
        for index, batch in enumerate(self._inputs):
            statistics.add(sparse.layer_inputs(group, index), dense.layer_inputs(group, index), kept_tokens(batch))
        return statistics

    def _bundles(self, group: Group) -> Iterable[list[LayerPlan]]:
        """The layers of a group one by one, those that share their input permutation together."""
        bundles: dict[tuple[str, ...], list[LayerPlan]] = {}
        for name in group.layers:
            layer = self._layers[name]
            bundles.setdefault(layer.shared or (name,), []).append(layer)
        for shared, layers in bundles.items():
            if len(layers) != len(shared):
                raise PadstError(
                    f"{' and '.join(shared)} were planned to share one permutation, but on this data they do not read "
                    "the same input; leave out --share-permutations"
                )
        return bundles.values()

    def _start(self, layers: Sequence[LayerPlan], statistics: InputStatistics) -> None:
        dense = [
            replace(dense_layer(self._models[1], layer), output_weights=self._output_weights.get(layer.name))
            for layer in layers
        ]
        started = start_layers(layers, dense, statistics, self._recipe, self._on_event)
        for layer, (start, escalated) in zip(layers, started, strict=True):
            self._accept(layer, start, escalated, bool(statistics.tokens))

    def _accept(self, layer: LayerPlan, start: LayerStart, escalated: int, seen: bool) -> None:
        """Put a start into the student and tell of it."""
        parameter = _weight(self._models[1], layer.name)
        final = from_structure(start.weight, start.perm_in, start.perm_out)
        parameter.copy_(final.T if layer.transposed else final)
        self._starts[layer.name] = start
        if not seen:
            self._on_event(
                Message(f"{layer.name} saw no calibration input; it keeps its largest weights without a refit")
            )
        if escalated:
            self._on_event(Message(f"{layer.name}: {escalated} rows needed more damping than {self._damping} to refit"))
        done, total = len(self._starts), len(self._layers)
        self._on_event(CalibrationProgress(layer.name, done, total, start.error_mask, start.error))

    @property
    def _damping(self) -> float:
        return self._recipe.calibration.damping


def _output_weights(
    teacher: nn.Module, plan: Plan, inputs: Sequence[Inputs], recipe: Recipe, on_event: OnEvent
) -> dict[str, Tensor]:
    """By layer, `[out]`: the outputs' sensitivities to the recipe's power; empty where all outputs count alike."""
    power = recipe.calibration.sensitivity
    if power == 0.0 or recipe.calibration.start != "saliency":
        return {}
    on_event(Message("measuring how much each output of a layer matters to the dense model's prediction"))
    names = [layer.name for layer in plan.layers]
    found = output_sensitivity(teacher, names, inputs, recipe.seed)
    return {name: each.pow(power) for name, each in found.items()}


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_submodule(name).get_parameter("weight")


def kept_tokens(batch: Inputs) -> Tensor | None:
    """Which tokens of a batch, flattened, its attention mask lets count; None for all."""
    keep = batch.get("attention_mask")
    return keep.bool().ravel() if keep is not None and keep.dim() == 2 else None


def dense_layer(model: nn.Module, layer: LayerPlan) -> DenseLayer:
    """The weight of a planned layer as it is now in `model`, `[out, in]`, and its bias."""
    weight = _weight(model, layer.name)
    return DenseLayer(weight.T if layer.transposed else weight, getattr(model.get_submodule(layer.name), "bias", None))


def _describe(units: Sequence[Unit]) -> str:
    layers = sum(len(group.layers) for unit in units for group in unit.groups)
    blocks = sum(bool(unit.module) for unit in units)
    passes = sum(not unit.chained and bool(unit.module) for unit in units)
    outside = sum(len(group.layers) for unit in units if not unit.module for group in unit.groups)
    text = f"calibrating {layers} layers"
    if blocks:
        text += f" in {blocks} blocks, block by block from {passes} full {'pass' if passes == 1 else 'passes'}"
    if outside:
        text += f"; {outside} layers outside plain blocks by full forward passes"
    return text


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
