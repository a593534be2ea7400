"""`padst bench MODEL`: how fast the sparse layers and the sparse model run against dense ones, here and now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from padst_cli.commands.common import Common, Model, common_flags
from padst_cli.commands.recipe_flags import build_recipe
from padst_cli.errors import PadstError

if TYPE_CHECKING:
    from padst_cli.bench import BenchResult
    from padst_cli.console import Console


@common_flags()
def bench(
    model: Model,
    tokens: Annotated[str, typer.Option("--tokens", help="Token counts, comma separated.")] = "1,32,512",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads; default: torch's.")] = None,
    layers_only: Annotated[bool, typer.Option("--layers-only", help="Leave the whole model out.")] = False,
    baseline: Annotated[str, typer.Option("--baseline", help="What to compare with: dense.")] = "dense",
    random_weights: Annotated[bool, typer.Option("--random-weights", help="MODEL needs only a config.json.")] = False,
    structure: Annotated[str, typer.Option("--structure", help="With --random-weights.")] = "diag",
    sparsity: Annotated[float, typer.Option("--sparsity", help="With --random-weights.")] = 0.9,
    nm: Annotated[str | None, typer.Option("--nm", help="With --random-weights: N:M.")] = None,
    block_size: Annotated[int, typer.Option("--block-size", help="With --random-weights: 16, 32 or 64.")] = 16,
    band: Annotated[int, typer.Option("--band", help="With --random-weights: diagonals in runs of this many.")] = 1,
    value_dtype: Annotated[
        str, typer.Option("--value-dtype", help="With --random-weights: dtype of values.")
    ] = "float32",
    permutation: Annotated[
        str, typer.Option("--permutation", help="With --random-weights: random or none.")
    ] = "random",
    break_even: Annotated[bool, typer.Option("--break-even", help="Also find the density where dense wins.")] = False,
    *,
    common: Common,
) -> None:
    """Time sparse against dense: interleaved runs, medians, weights from memory, the same process."""
    with common.running() as console:
        from padst_cli import pipeline

        if baseline != "dense":
            raise PadstError(f"--baseline '{baseline}' is unknown; the only baseline is dense")
        changes = {
            "structure": structure,
            "sparsity": sparsity,
            "nm": nm,
            "block_size": block_size,
            "band": band,
            "permutation.kind": permutation,
            "seed": common.seed,
        }
        chosen = build_recipe(model, None, changes)
        with console.progress() as on_event:
            result = pipeline.bench(
                model,
                tokens=_token_counts(tokens),
                threads=threads,
                layers_only=layers_only,
                random_recipe=chosen if random_weights else None,
                value_dtype=value_dtype,
                break_even=break_even,
                device=common.device.value,
                dtype=common.dtype,
                seed=common.seed,
                on_event=on_event,
            )
        console.result(result, render=lambda: _render(console, result))


def _token_counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise PadstError(f"--tokens '{text}' is not a list of positive numbers such as 1,32,512")
    return tuple(int(part) for part in parts)


def _render(console: Console, result: BenchResult) -> None:
    figures = result.to_json()
    rows = [
        (
            layer["name"],
            f"{layer['out_features']} x {layer['in_features']}",
            layer["structure"],
            f"{layer['density']:.3f}",
            str(layer["tokens"]),
            f"{layer['dense_us']:.1f}",
            f"{layer['sparse_us']:.1f}",
            f"{layer['speedup']:.2f}",
            layer["kernel"],
        )
        for layer in figures["layers"]
    ]
    columns = ("layer", "out x in", "structure", "density", "tokens", "dense us", "sparse us", "speed-up", "kernel")
    console.table(f"{figures['device']}, {figures['threads']} threads, {figures['dtype']}", columns, rows)
    model = figures.get("model")
    if model:
        speeds = []
        for name in ("prefill", "decode"):
            rate = model[name]
            if rate:
                figures_of = (f"{rate['dense_per_s']:.1f}", f"{rate['sparse_per_s']:.1f}", f"{rate['speedup']:.2f}")
                speeds.append((name, str(rate["tokens"]), *figures_of))
        console.table("whole model", ("", "tokens", "dense/s", "sparse/s", "speed-up"), speeds)
        resident = model["resident_bytes"]
        console.table(
            "resident MB", ("dense", "sparse"), [(f"{resident['dense'] / 1e6:.2f}", f"{resident['sparse'] / 1e6:.2f}")]
        )
