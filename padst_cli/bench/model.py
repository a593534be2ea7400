"""The whole model, sparse against dense: one pass over a prompt (or images), and decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padst_cli.bench.decode import decode_rate
from padst_cli.bench.result import ModelRates
from padst_cli.evaluation.forward import accepted
from padst_cli.evaluation.text import max_positions
from padst_cli.runtime.packing import resident_bytes
from padst_cli.stopwatch import Progress, Rate, Stopwatch

_IMAGES = 8


@dataclass(frozen=True)
class Whole:
    """How whole models are run: so many sequences or images at a time (None: 1 and 8), as they are or compiled."""

    batch: int | None = None
    compiled: bool = False

    def runner(self, model: Any) -> Callable[..., Any]:
        """What calls the model."""
        return torch.compile(model, dynamic=False) if self.compiled else model


def model_rates(
    sparse: Any, dense: Any, task: str, tokens: int, stopwatch: Stopwatch, seed: int, progress: Progress, whole: Whole
) -> ModelRates:
    """Prefill, decoding where the task is `causal-lm`, and resident bytes; `tokens` is the length of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    decode = None
    progress.next("whole model")
    prefill = prefill_rate(sparse, dense, task, tokens, stopwatch, generator, whole)
    if task == "causal-lm":
        progress.next("decoding")
        decode = decode_rate(sparse, dense, stopwatch, generator, whole.runner)
    return ModelRates(prefill, decode, {"dense": resident_bytes(dense), "sparse": resident_bytes(sparse)})


def prefill_rate(
    sparse: Any, dense: Any, task: str, tokens: int, stopwatch: Stopwatch, generator: torch.Generator, whole: Whole
) -> Rate:
    """One pass over images, or over prompts of `tokens` tokens where the model has so many positions."""
    if sparse.main_input_name == "pixel_values":
        size, batch = sparse.config.image_size, whole.batch or _IMAGES
        shape = (batch, sparse.config.num_channels, *((size, size) if isinstance(size, int) else size))
        inputs = {"pixel_values": torch.randn(shape, generator=generator)}
        return _forward_rate(sparse, dense, inputs, {}, stopwatch, ("images", batch, batch), whole)
    config = sparse.config.get_text_config()
    tokens, batch = min(tokens, max_positions(sparse) or tokens), whole.batch or 1
    ids = torch.randint(config.vocab_size, (batch, tokens), generator=generator)
    causal = task == "causal-lm"
    options = accepted(sparse, use_cache=True, logits_to_keep=1) if causal else {}
    unit = ("tokens", batch * tokens, batch * tokens) if causal else ("sequences", tokens, batch)
    return _forward_rate(sparse, dense, {"input_ids": ids}, options, stopwatch, unit, whole)


def _forward_rate(
    sparse: Any,
    dense: Any,
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    stopwatch: Stopwatch,
    unit: tuple[str, int, int],
    whole: Whole,
) -> Rate:
    def step(model: Any) -> Callable[[], Any]:
        run = whole.runner(model)
        moved = {
            key: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for key, x in inputs.items()
        }
        return lambda: run(**moved, **options)

    name, tokens, done = unit
    return Rate.of(name, tokens, done, stopwatch.calls(step(dense), step(sparse)))
