"""Continuing a prompt with a causal language model, and how fast that went."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Final

import torch

from padst_cli.data.items import check_vocabulary, vocabulary_size
from padst_cli.errors import PadstError
from padst_cli.runtime.load import Loaded

_COLDEST: Final = 1e-6
"""Under this temperature the likeliest token is as good as certain, and logits divided by it may overflow."""
_EMPTY: Final = "the prompt is empty; give at least one word with --prompt"


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

    Raises `PadstError` as `check_request` does, for a model that is no causal language model, has no tokenizer, or
    whose context is too short for prompt and continuation, and for a prompt outside the model's vocabulary.
    """
    check_request(prompt, max_new_tokens, temperature)
    if loaded.source.task != "causal-lm":
        raise PadstError(
            f"'{loaded.source.name}' is for {loaded.source.task}; only causal language models generate text"
        )
    if loaded.processor is None:
        raise PadstError(f"'{loaded.source.name}' comes without a tokenizer, so it cannot read a prompt")
    ids = _encode(loaded, prompt)
    _check_context(loaded, ids.shape[1], max_new_tokens)
    options: dict[str, Any] = {"do_sample": temperature > _COLDEST, "use_cache": True, "max_new_tokens": max_new_tokens}
    if options["do_sample"]:
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


def check_request(prompt: str, max_new_tokens: int, temperature: float) -> None:
    """Raise `PadstError` for what no model can answer: a prompt that is empty or not UTF-8, a number out of range."""
    if max_new_tokens < 1:
        raise PadstError(f"the number of new tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:  # NaN is refused by this as well
        raise PadstError(f"the temperature must be a finite number of 0 or more, not {temperature}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise PadstError("the prompt is not UTF-8 text; give it in the encoding of the terminal") from None
    if not prompt:
        raise PadstError(_EMPTY)


def _encode(loaded: Loaded, prompt: str) -> torch.Tensor:
    tokenizer: Any = loaded.processor
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise PadstError(_EMPTY)
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
