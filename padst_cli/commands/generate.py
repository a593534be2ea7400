"""`padst generate MODEL`: text from a dense or a sparse causal LM."""

from __future__ import annotations

from typing import Annotated

import typer

from padst_cli.commands.common import Common, Model, common_flags


@common_flags()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    *,
    common: Common,
) -> None:
    """Generate text, and say how fast and by which kernels."""
    with common.running() as console:
        from padst_cli import pipeline

        result = pipeline.generate(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            device=common.device.value,
            dtype=common.dtype,
            seed=common.seed,
        )
        console.message(
            f"{result.new_tokens} tokens, {result.tokens_per_s:.1f} tokens/s on {result.device} "
            f"by {', '.join(result.kernels) or 'dense layers'}"
        )
        console.result(result, render=lambda: typer.echo(result.text))
