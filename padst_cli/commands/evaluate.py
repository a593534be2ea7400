"""`padst eval MODEL`: held-out figures of a dense or a sparse model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from padst_cli.commands.common import Common, Model, comma_separated, common_flags
from padst_cli.errors import PadstError

if TYPE_CHECKING:
    from padst_cli.console import Console
    from padst_cli.pipeline import EvaluateResult


@common_flags()
def evaluate(
    model: Model,
    data: Annotated[
        str | None, typer.Option("--data", help="Held-out data; default: WikiText-103 for causal LMs.")
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="auto, or a metric of the model's task.")] = "auto",
    context: Annotated[int | None, typer.Option("--context", help="Tokens a prediction may look back on.")] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Tokens scored per window; default: the context.")
    ] = None,
    compare: Annotated[str | None, typer.Option("--compare", help="Another model, measured on the same data.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="lm-eval task names, comma separated.")] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder of further lm-eval tasks.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="At most this many lm-eval examples a task.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows or images at once.")] = 8,
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", min=1, help="At most this many windows or images.")
    ] = None,
    *,
    common: Common,
) -> None:
    """Measure MODEL on held-out data: perplexity, top-1 and top-5, or feature error, by its task."""
    with common.running() as console:
        from padst_cli import pipeline

        _check_flags(tasks, {"--include-path": include_path, "--limit": limit}, {"context": context, "stride": stride})
        with console.progress() as on_event:
            result = pipeline.evaluate(
                model,
                data,
                metric=metric,
                context=context,
                stride=stride,
                compare=compare,
                tasks=comma_separated(tasks, str, "--tasks"),
                include_path=include_path,
                limit=limit,
                batch_size=batch_size,
                max_samples=max_samples,
                device=common.device.value,
                dtype=common.dtype,
                seed=common.seed,
                on_event=on_event,
            )
        console.result(result, render=lambda: _render(console, result))


def _check_flags(tasks: str | None, of_tasks: Mapping[str, object], lengths: Mapping[str, int | None]) -> None:
    """Raise `PadstError` for what no model could make right, before one is opened."""
    for flag, value in of_tasks.items():
        if tasks is None and value is not None:
            raise PadstError(f"{flag} is for lm-eval's tasks: name some with --tasks, or leave it out")
    for name, length in lengths.items():
        if length is not None and length < 1:
            raise PadstError(f"a {name} of {length} tokens is too short; use --{name} 1 or more")


def _render(console: Console, result: EvaluateResult) -> None:
    names = [
        "value",
        "kl_to_dense",
        "bits_per_char",
        "word_perplexity",
        "top5",
        "samples",
        "tokens",
        "context",
        "stride",
    ]
    figures = result.to_json()
    other = figures.get("other")
    rows = []
    for name in names:
        if figures.get(name) is None:
            continue
        label = result.metric_name if name == "value" else name.replace("_", " ")
        row = [label, _figure(figures[name])]
        if other:
            row.append(_figure(other.get(name)))
        rows.append(tuple(row))
    if other:
        rows.append(("ratio", "", _figure(figures["ratio"])))
    for task, scores in (figures.get("tasks") or {}).items():
        rows += [(f"{task} {name}", _figure(value)) for name, value in scores.items()]
    columns = ("", figures["model"], other["model"]) if other else ("", figures["model"])
    console.table(f"{figures['data']} ({figures['split']}, digest {figures['digest'][:12]})", columns, rows)
    if not result.same_inputs and result.metric_name in ("perplexity", "masked_perplexity"):
        console.message("the two models read other tokens or contexts: their perplexities a token are not comparable")


def _figure(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "-" if value is None else str(value)
