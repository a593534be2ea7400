"""`padst bench MODEL`: how fast the sparse layers and the sparse model run against dense ones, here and now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    structure: Annotated[str | None, typer.Option("--structure", help="With --random-weights; default: diag.")] = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="With --random-weights; default: that of --nm, else 0.9.")
    ] = None,
    nm: Annotated[str | None, typer.Option("--nm", help="With --random-weights: N:M.")] = None,
    block_size: Annotated[
        int | None, typer.Option("--block-size", help="With --random-weights: 16, 32 or 64; default: 16.")
    ] = None,
    block_rows: Annotated[
        str | None, typer.Option("--block-rows", help="With --random-weights: auto, even or free; default: auto.")
    ] = None,
    band: Annotated[
        int | None, typer.Option("--band", help="With --random-weights: diagonals in runs of this many; default: 1.")
    ] = None,
    value_dtype: Annotated[
        str | None,
        typer.Option(
            "--value-dtype", help="With --random-weights: dtype of values; default: float32, on a GPU --dtype."
        ),
    ] = None,
    permutation: Annotated[
        str | None, typer.Option("--permutation", help="With --random-weights: random or none; default: random.")
    ] = None,
    side: Annotated[
        str | None,
        typer.Option(
            "--side",
            help="With --random-weights: what is permuted: auto, both, smaller, input or output; default: auto.",
        ),
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option("--targets", help="With --random-weights: only these layers; may be repeated.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="With --random-weights: not these layers; may be repeated.")
    ] = None,
    break_even: Annotated[bool, typer.Option("--break-even", help="Also find the density where dense wins.")] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure anew what paths are chosen by, and keep it; with --train also on a GPU those of training.",
        ),
    ] = False,
    train: Annotated[bool, typer.Option("--train", help="Also time training steps: forward and backward.")] = False,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Sequences or images of a whole-model call; default: 1 or 8."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="On a GPU: both whole models through torch.compile.")
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="On a GPU: time both sides in CUDA graphs.")
    ] = True,
    chart: Annotated[
        Path | None, typer.Option("--chart", help="Write a chart of speed-up over tokens to this .svg file.")
    ] = None,
    *,
    common: Common,
) -> None:
    """Time sparse against dense: interleaved runs, medians, weights from memory, the same process."""
    with common.running() as console:
        from padst_cli import pipeline

        if baseline != "dense":
            raise PadstError(f"--baseline '{baseline}' is unknown; the only baseline is dense")
        if chart is not None and (chart.suffix != ".svg" or chart.is_dir() or not chart.parent.is_dir()):
            raise PadstError(f"--chart '{chart}' is not the name of an .svg file in a folder that exists")
        made = {
            "structure": structure,
            "sparsity": sparsity,
            "nm": nm,
            "block_size": block_size,
            "block_rows": block_rows,
            "band": band,
            "permutation.kind": permutation,
            "permutation.side": side,
            "targets": tuple(targets) if targets else None,
            "ignore": tuple(ignore) if ignore else None,
        }
        made = {key: value for key, value in made.items() if value is not None}
        if not random_weights:
            _refuse_unused(model, {**made, **({} if value_dtype is None else {"value_dtype": value_dtype})})
        if layers_only and batch_size is not None and not train:
            raise PadstError("--batch-size is that of whole models: it has no use with --layers-only")
        changes = {"structure": "diag", "permutation.kind": "random", **made, "seed": common.seed}
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
                calibrate=calibrate,
                train=train,
                batch=batch_size,
                compiled=compiled,
                cuda_graphs=cuda_graphs,
                chart=chart,
                device=common.device.value,
                dtype=common.dtype,
                seed=common.seed,
                on_event=on_event,
            )
        console.result(result, render=lambda: _render(console, result))


def _refuse_unused(model: str, made: dict[str, Any]) -> None:
    """Raise `PadstError` for flags that say how random layers are made, where the model's own are timed."""
    if made:
        names = " and ".join(f"--{key.removesuffix('.kind').rpartition('.')[2].replace('_', '-')}" for key in made)
        raise PadstError(
            f"{names} {'say' if len(made) > 1 else 'says'} how layers are made with --random-weights; without it the "
            f"layers of '{model}' are timed as they are"
        )


def _token_counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise PadstError(f"--tokens '{text}' is not a list of positive numbers such as 1,32,512")
    return tuple(int(part) for part in parts)


_COLUMNS = (
    *("layer", "out x in", "structure", "density", "tokens", "dense us", "sparse us", "speed-up", "of the limit"),
    *("resident", "kernel"),
)


def _render(console: Console, result: BenchResult) -> None:
    figures = result.to_json()
    rows = [_layer_row(layer) for layer in figures["layers"]]
    where = f"{figures['threads']} threads" if result.gpu is None else result.gpu.sentence
    console.table(f"{figures['device']}, {where}, {figures['dtype']}", _COLUMNS, rows)
    limits = figures["limits"]
    console.message(
        f"of the limit: the share reached of what reading {limits['read_bytes_per_s'] / 1e9:.1f} GB/s (bytes) or "
        f"{limits['fma_per_s'] / 1e9:.1f} billion multiply-adds/s (fma) allow; "
        "resident: bytes of the weight over its bound"
    )
    for one in result.faster_dense:
        console.message(one.sentence)
    for note in result.notes:
        console.message(note)
    if figures["break_even_density"] is not None:
        crossings = [
            (tokens, "none tried" if density is None else f"{density:.3f}")
            for tokens, density in figures["break_even_density"].items()
        ]
        console.table("density at which dense is as fast", ("tokens", "density"), crossings)
    if figures["train"]:
        _render_train(console, figures["train"])
    if figures["model"]:
        _render_model(console, figures["model"])


def _layer_row(layer: dict[str, Any]) -> tuple[str, ...]:
    roofline = layer["roofline"]
    return (
        layer["name"],
        f"{layer['out_features']} x {layer['in_features']}",
        layer["structure"],
        f"{layer['density']:.3f}",
        str(layer["tokens"]),
        f"{layer['dense_us']:.1f}",
        f"{layer['sparse_us']:.1f}",
        f"{layer['speedup']:.2f}",
        f"{roofline['fraction']:.2f} {roofline['bound']}",
        f"{layer['resident_bytes'] / layer['resident_bound']:.2f}",
        layer["kernel"],
    )


def _render_train(console: Console, train: dict[str, Any]) -> None:
    rows = [
        (
            layer["name"],
            f"{layer['out_features']} x {layer['in_features']}",
            f"{layer['density']:.3f}",
            str(layer["tokens"]),
            f"{layer['dense_us'] / 1e3:.2f}",
            f"{layer['sparse_us'] / 1e3:.2f}",
            f"{layer['speedup']:.2f}",
            layer["kernel"],
        )
        for layer in train["layers"]
    ]
    columns = ("layer", "out x in", "density", "tokens", "dense ms", "sparse ms", "speed-up", "kernel")
    console.table("training step of a layer: forward and backward", columns, rows)
    step = train["step"]
    if step:
        row = (str(step["tokens"]), *(f"{step[key]:.2f}" for key in ("dense_per_s", "sparse_per_s", "speedup")))
        console.table(
            "optimizer step of the model, hardened, without a teacher",
            ("tokens", "dense tokens/s", "sparse tokens/s", "speed-up"),
            [row],
        )


def _render_model(console: Console, model: dict[str, Any]) -> None:
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
