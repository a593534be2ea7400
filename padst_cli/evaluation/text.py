"""How many tokens of context a model may be given."""

from __future__ import annotations

from typing import Any

from padst_cli.errors import PadstError

DEFAULT_CONTEXT = 1024
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")


def max_positions(model: Any, tokenizer: Any = None) -> int | None:
    """The most tokens the model's configuration gives positions for, None where it names no limit.

    With a tokenizer its own limit counts too: RoBERTa-like encoders spend some of the positions they name on padding.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, key, None) for key in _POSITION_KEYS]
    limits.append(getattr(tokenizer, "model_max_length", None))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def choose_context(context: int | None, limit: int | None) -> int:
    """The context to use: as asked, by default the model's limit or 1024 tokens, whichever is less.

    Raises `PadstError` for a context under one token or over the model's limit.
    """
    if context is None:
        return min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if context < 1:
        raise PadstError(f"a context of {context} tokens is too short; use --context 1 or more")
    if limit is not None and context > limit:
        raise PadstError(
            f"a context of {context} tokens exceeds the model's {limit} positions; use --context {limit} or less"
        )
    return context
