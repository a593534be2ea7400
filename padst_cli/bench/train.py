"""Training steps, sparse against dense: forward and backward of a layer, and a whole optimizer step of the model.

The sparse side is what fine-tuning runs once every permutation has hardened and between support updates: gradients on
the support alone. Values change before every step, as an optimizer changes them, so that nothing prepared is reused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padst_cli.bench.result import TrainRates, TrainRow
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.quantizer import packed_layers
from padst_cli.stopwatch import Progress, Rate, Stopwatch
from padst_cli.training.activations import in_one_operation
from padst_cli.training.memory import kept_memory
from padst_cli.training.optimizer import AdamW
from padst_cli.training.permutation import Permutation
from padst_cli.training.sparse_linear import SparseLinear

_STEP_REPEATS = 3
"""Whole steps take seconds, and what they are compared for is no matter of percents."""
_SEQUENCE = 512
_LEARNING_RATE = 1e-6


@torch.enable_grad()  # benchmarks of inference run without
def train_rates(
    sparse: Any,
    dense: Any | None,
    groups: Sequence[list[str]],
    tokens: Sequence[int],
    task: str,
    stopwatch: Stopwatch,
    seed: int,
    progress: Progress,
    batch: int | None = None,
) -> TrainRates:
    """Rows for each group of like layers at each token count; with `dense` also the step of the whole model: the most
    tokens in sequences of 512, or `batch` sequences of so many. Only a causal LM has a loss that random inputs serve;
    for other tasks there is no step.
    """
    packed = packed_layers(sparse)
    generator = torch.Generator().manual_seed(seed)
    rows, step = [], None
    with kept_memory(sparse.device):  # on both sides, as fine-tuning does
        for names in groups:
            layer = packed[names[0]]
            for count in tokens:
                progress.next(f"training {names[0]}, {count} tokens")
                rows.append(_layer_row(names, layer, count, stopwatch, generator))
        if dense is not None and task == "causal-lm":
            progress.next("training the whole model")
            step = step_rate(sparse, dense, max(tokens), stopwatch, generator, batch)
    return TrainRates(tuple(rows), step)


def _layer_row(
    names: list[str], layer: PackedLinear, tokens: int, stopwatch: Stopwatch, generator: torch.Generator
) -> TrainRow:
    trained = as_trained(layer)
    x, dy = random_pair(layer, tokens, generator)
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).to(trained.weight)
    pair = stopwatch.uncaptured(
        layer_step(lambda u: F.linear(u, dense.weight, dense.bias), dense, x, dy), layer_step(trained, trained, x, dy)
    )
    return TrainRow(
        name=names[0],
        count=len(names),
        out_features=layer.out_features,
        in_features=layer.in_features,
        structure=layer.format.structure.name,
        density=layer.format.structure.density,
        tokens=tokens,
        dense_us=pair.dense * 1e6,
        sparse_us=pair.sparse * 1e6,
        speedup=pair.dense / pair.sparse,
        kernel=str(trained.computed_by),
        dense_spread=pair.dense_spread,
        sparse_spread=pair.sparse_spread,
    )


def random_pair(layer: PackedLinear, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Activations `[tokens, in]` and gradients of the output `[tokens, out]`, in the layer's dtype and where it is."""
    x, dy = (torch.randn(tokens, width, generator=generator) for width in (layer.in_features, layer.out_features))
    return x.to(layer.weight), dy.to(layer.weight)


def as_trained(layer: PackedLinear) -> SparseLinear:
    """`trainable` with the weight as fine-tuning keeps it: on a GPU in float32, its products in the layer's dtype."""
    trained = trainable(layer)
    return trained.float() if layer.weight.is_cuda else trained


def layer_step(product: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward in the dtype of x, and gradients of the input, the weight and the bias."""
    inputs, weight = x.clone().requires_grad_(), module.get_parameter("weight")

    def step() -> None:
        inputs.grad = None
        module.zero_grad(set_to_none=True)
        _touch(weight)
        with _products_in(x.dtype, x.device):
            y = product(inputs)
        y.backward(dy)

    return step


def _products_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """On a GPU products of float32 weights are computed in `dtype`, as fine-tuning does."""
    return torch.autocast(device.type, dtype, enabled=device.type == "cuda" and dtype is not torch.float32)


@torch.no_grad()
def _touch(weight: Tensor) -> None:
    """Change the weight in place, as a step does, at no cost."""
    weight[:1, :1].mul_(1.0)


def trainable(layer: PackedLinear) -> SparseLinear:
    """The layer in the form in which it is trained, hardened, for steps between support updates."""
    perm_in, perm_out = (
        None if perm is None else Permutation(perm, mixing=None) for perm in copy.deepcopy(layer).permutations()
    )
    source = copy.deepcopy(layer)
    made = SparseLinear(
        source.format.structure,
        source.structured_weight().to(source.weight.dtype),
        source.support(),
        None if source.bias is None else source.bias.detach(),
        perm_in,
        perm_out,
    ).to(source.weight.device)
    made.dense_gradient = False
    return made


class _Transposed(nn.Module):
    """Stands where a GPT-2 `Conv1D` was: code there asks for its `nf`."""

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        self.layer, self.nf = layer, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in] -> [..., out]`."""
        result: Tensor = self.layer(x)
        return result


@torch.enable_grad()
def step_rate(
    sparse: Any,
    dense: Any,
    tokens: int,
    stopwatch: Stopwatch,
    generator: torch.Generator,
    batch: int | None = None,
    used: set[str] | None = None,
) -> Rate:
    """Loss, backward pass and AdamW step, without a teacher, over `tokens` tokens in sequences of at most 512, or over
    `batch` sequences of `tokens`; no sequence is longer than the model's positions. On a GPU as fine-tuning there: the
    weights in float32, products in the model's dtype. What computed the sparse layers is added to `used`.
    """
    student = copy.deepcopy(dense)
    for name, layer in packed_layers(sparse).items():
        module: nn.Module = trainable(layer)
        student.set_submodule(name, _Transposed(module) if layer.format.transposed else module)  # type: ignore[arg-type]
    config = dense.config.get_text_config()
    longest = tokens if batch else min(tokens, _SEQUENCE)
    length = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    shape = (batch or max(1, tokens // length), length)
    ids = torch.randint(config.vocab_size, shape, generator=generator).to(dense.device)
    watch = copy.copy(stopwatch)
    watch.timing = replace(stopwatch.timing, repeats=_STEP_REPEATS)
    models = copy.deepcopy(dense), student
    for model in models:  # both as fine-tuning has them
        in_one_operation(model)
    steps = [_optimizer_step(model, {"input_ids": ids, "labels": ids}) for model in models]
    rate = Rate.of("tokens", ids.numel(), ids.numel(), watch.uncaptured(steps[0], steps[1]))
    if used is not None:
        used.update(str(module.computed_by) for module in student.modules() if isinstance(module, SparseLinear))
    return rate


def _optimizer_step(model: Any, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    device, dtype = model.device, model.dtype
    model.train()
    if device.type == "cuda":
        model.float()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    optimizer = AdamW([{"params": model.parameters()}], _LEARNING_RATE)

    def step() -> None:
        with _products_in(dtype, device):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
