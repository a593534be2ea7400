"""The whole model, sparse against dense: one pass over a prompt (or images), and decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from padst_cli.bench.result import ModelRates
from padst_cli.evaluation.forward import accepted
from padst_cli.evaluation.text import max_positions
from padst_cli.runtime.packing import resident_bytes
from padst_cli.stopwatch import Progress, Rate, Stopwatch

_DECODE_STEPS = 32
_PROMPT = 16
_IMAGES = 8


def model_rates(
    sparse: Any, dense: Any, task: str, tokens: int, stopwatch: Stopwatch, seed: int, progress: Progress
) -> ModelRates:
    """Prefill, decoding where the task is `causal-lm`, and resident bytes; `tokens` is the length of the prompt."""
    generator = torch.Generator().manual_seed(seed)
    decode = None
    progress.next("whole model")
    if sparse.main_input_name == "pixel_values":
        size = sparse.config.image_size
        shape = (_IMAGES, sparse.config.num_channels, *((size, size) if isinstance(size, int) else size))
        inputs = {"pixel_values": torch.randn(shape, generator=generator)}
        prefill = _forward_rate(sparse, dense, inputs, {}, stopwatch, ("images", _IMAGES, _IMAGES))
    else:
        config = sparse.config.get_text_config()
        tokens = min(tokens, max_positions(sparse) or tokens)
        ids = torch.randint(config.vocab_size, (1, tokens), generator=generator)
        causal = task == "causal-lm"
        options = accepted(sparse, use_cache=True, logits_to_keep=1) if causal else {}
        unit = ("tokens", tokens, tokens) if causal else ("sequences", tokens, 1)
        prefill = _forward_rate(sparse, dense, {"input_ids": ids}, options, stopwatch, unit)
        if causal:
            progress.next("decoding")
            decode = _decode_rate(sparse, dense, stopwatch, generator)
    return ModelRates(prefill, decode, {"dense": resident_bytes(dense), "sparse": resident_bytes(sparse)})


def _forward_rate(
    sparse: Any,
    dense: Any,
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    stopwatch: Stopwatch,
    unit: tuple[str, int, int],
) -> Rate:
    def step(model: Any) -> Callable[[], Any]:
        moved = {
            key: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for key, x in inputs.items()
        }
        return lambda: model(**moved, **options)

    name, tokens, done = unit
    return Rate.of(name, tokens, done, stopwatch.calls(step(dense), step(sparse)))


def _decode_rate(sparse: Any, dense: Any, stopwatch: Stopwatch, generator: torch.Generator) -> Rate:
    """Greedy decoding with a key-value cache, one sequence; the prompt's pass is not timed."""
    limit = max_positions(sparse) or _PROMPT + _DECODE_STEPS
    prompt = min(_PROMPT, max(1, limit // 2))
    steps = max(1, min(_DECODE_STEPS, limit - prompt))
    ids = torch.randint(sparse.config.get_text_config().vocab_size, (1, prompt), generator=generator)

    def decode(model: Any) -> Callable[[], float]:
        return lambda: _decode_seconds(model, ids.to(model.device), steps, stopwatch)

    for model in (dense, sparse):
        decode(model)()
    return Rate.of("tokens", steps, steps, stopwatch.alternate(decode(dense), decode(sparse)))


def _decode_seconds(model: Any, ids: Tensor, steps: int, stopwatch: Stopwatch) -> float:
    options = accepted(model, logits_to_keep=1)
    state = model(input_ids=ids, use_cache=True, **options)

    def generate() -> None:
        nonlocal state
        for _ in range(steps):
            token = state.logits[:, -1:].argmax(dim=-1)
            state = model(input_ids=token, past_key_values=state.past_key_values, use_cache=True, **options)

    return stopwatch.once(generate)
