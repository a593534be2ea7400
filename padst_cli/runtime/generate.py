"""Continuing a prompt with a causal language model, and how fast that went."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from padst_cli.data.items import check_vocabulary, vocabulary_size
from padst_cli.errors import PadstError
from padst_cli.runtime.load import Loaded


@dataclass(frozen=True)
class Generated:
    """What came out: the prompt, its continuation, and the decoding speed (prompt processing included)."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_second: float


def generate(
    loaded: Loaded,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generated:
    """Continue `prompt` by up to `max_new_tokens` tokens with the KV cache; temperature 0 is greedy.

    Raises `PadstError` for a model that is no causal language model, has no tokenizer, or whose context is too short
    for prompt and continuation, and for a prompt that is empty, not UTF-8 or outside the model's vocabulary.
    """
    if loaded.source.task != "causal-lm":
        raise PadstError(
            f"'{loaded.source.name}' is for {loaded.source.task}; only causal language models generate text"
        )
    if loaded.processor is None:
        raise PadstError(f"'{loaded.source.name}' comes without a tokenizer, so it cannot read a prompt")
    if max_new_tokens < 1:
        raise PadstError(f"the number of new tokens must be at least 1, not {max_new_tokens}")
    if temperature < 0:
        raise PadstError(f"the temperature must be 0 or more, not {temperature}")
    ids = _encode(loaded, prompt)
    _check_context(loaded, ids.shape[1], max_new_tokens)
    options: dict[str, Any] = {"do_sample": temperature > 0, "use_cache": True, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        options["temperature"] = temperature
    torch.manual_seed(seed)
    start = time.perf_counter()
    with torch.inference_mode():
        output = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=_padding(loaded), **options
        )
    new = output[0, ids.shape[1] :].tolist()
    seconds = time.perf_counter() - start
    return Generated(
        prompt=prompt,
        text=str(loaded.processor.decode(new, skip_special_tokens=True)),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        seconds=seconds,
        tokens_per_second=len(new) / seconds,
    )


def _encode(loaded: Loaded, prompt: str) -> torch.Tensor:
    tokenizer: Any = loaded.processor
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise PadstError("the prompt is not UTF-8 text; give it in the encoding of the terminal") from None
    ids = tokenizer(prompt)["input_ids"]
    if not prompt or not ids:
        raise PadstError("the prompt is empty; give at least one word with --prompt")
    check_vocabulary(max(ids), vocabulary_size(loaded.model), "the prompt")
    return torch.tensor([ids], dtype=torch.int64, device=loaded.device)


def _check_context(loaded: Loaded, prompt_tokens: int, new_tokens: int) -> None:
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and prompt_tokens + new_tokens > longest:
        raise PadstError(
            f"the model's context is {longest} tokens: {prompt_tokens} of the prompt and {new_tokens} new ones do not "
            "fit; shorten the prompt or lower --max-new-tokens"
        )


def _padding(loaded: Loaded) -> int | None:
    # One unpadded prompt needs no padding token; naming one keeps `generate` from warning about it.
    tokenizer: Any = loaded.processor
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
