"""Greedy decoding of one sequence: with a growing cache as `generate` does it, or with a static one for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from padst_cli.bench.cuda import CudaStopwatch, repeated
from padst_cli.evaluation.forward import accepted
from padst_cli.evaluation.text import max_positions
from padst_cli.stopwatch import Rate, Stopwatch

_STEPS = 32
_PROMPT = 16

Runner = Callable[[Any], Callable[..., Any]]
"""What calls a model: itself, or its compiled form."""


def decode_rate(sparse: Any, dense: Any, stopwatch: Stopwatch, generator: torch.Generator, runner: Runner) -> Rate:
    """New tokens a second with a key-value cache, one sequence; the prompt's pass is not timed."""
    limit = max_positions(sparse) or _PROMPT + _STEPS
    prompt = min(_PROMPT, max(1, limit // 2))
    steps = max(1, min(_STEPS, limit - prompt))
    ids = torch.randint(sparse.config.get_text_config().vocab_size, (1, prompt), generator=generator)
    if isinstance(stopwatch, CudaStopwatch):
        sides = [_StaticDecoding(model, ids.to(model.device), steps, runner(model)) for model in (dense, sparse)]
        return Rate.of("tokens", steps, steps, stopwatch.alternate(*_timed(sides, stopwatch)))

    def decode(model: Any) -> Callable[[], float]:
        return lambda: _growing_seconds(model, ids.to(model.device), steps, stopwatch)

    for model in (dense, sparse):
        decode(model)()
    return Rate.of("tokens", steps, steps, stopwatch.alternate(decode(dense), decode(sparse)))


def _growing_seconds(model: Any, ids: Tensor, steps: int, stopwatch: Stopwatch) -> float:
    options = accepted(model, logits_to_keep=1)
    state = model(input_ids=ids, use_cache=True, **options)

    def generate() -> None:
        nonlocal state
        for _ in range(steps):
            token = state.logits[:, -1:].argmax(dim=-1)
            state = model(input_ids=token, past_key_values=state.past_key_values, use_cache=True, **options)

    return stopwatch.once(generate)


class _StaticDecoding:
    """One sequence after its prompt: `step` makes a token, always from the same memory, `rewind` goes back to the
    prompt.
    """

    def __init__(self, model: Any, ids: Tensor, steps: int, run: Callable[..., Any]) -> None:
        from transformers import StaticCache

        self.prompt, self.steps, self._run = ids.shape[1], steps, run
        self._options = accepted(model, logits_to_keep=1)
        self._cache = StaticCache(config=model.config, max_cache_len=self.prompt + steps)
        first = model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._options)
        self.token = first.logits[:, -1:].argmax(dim=-1)

    def step(self) -> None:
        """The next token in place of the last one."""
        found = self._run(input_ids=self.token, past_key_values=self._cache, use_cache=True, **self._options)
        self.token.copy_(found.logits[:, -1:].argmax(dim=-1))

    def rewind(self) -> None:
        """Forget all tokens after the prompt; the cache counts them on the device."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self.prompt)


def _timed(sides: list[_StaticDecoding], stopwatch: CudaStopwatch) -> list[Callable[[], float]]:
    """For each side a function that decodes from the prompt on and returns seconds."""
    for side in sides:
        for _ in range(min(2, side.steps)):  # compiles
            side.step()
        side.rewind()
    replays = stopwatch.replays("decoding", [side.step for side in sides])

    def seconds(side: _StaticDecoding, replay: Callable[[], None]) -> float:
        side.rewind()
        return stopwatch.once(repeated(replay, side.steps))

    return [partial(seconds, side, replay) for side, replay in zip(sides, replays, strict=True)]
