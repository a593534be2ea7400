"""Using what was written: generate text, time it, look into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from padst_cli.bench import BenchResult, random_sparse, speedup_chart
from padst_cli.bench import bench as bench_model
from padst_cli.checkpoint.format import VALUE_DTYPES
from padst_cli.checkpoint.reader import open_source
from padst_cli.errors import PadstError
from padst_cli.events import Message, OnEvent, PhaseStarted, ignore
from padst_cli.recipe import Recipe
from padst_cli.runtime.describe import Description, describe
from padst_cli.runtime.generate import check_request
from padst_cli.runtime.generate import generate as generate_text
from padst_cli.runtime.load import load, resolve_device, resolve_dtype
from padst_cli.runtime.quantizer import kernels_of


@dataclass(frozen=True)
class GenerateResult:
    """What `padst generate` reports; `tokens_per_s` is new tokens over the whole call, prompt included."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_s: float
    device: str
    kernels: list[str]


def generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
) -> GenerateResult:
    """Go on from `prompt` with a dense or sparse causal LM.

    Raises `PadstError` for what no model can answer before the model is read, and for models that generate no text.
    """
    check_request(prompt, max_new_tokens, temperature)
    loaded = load(model, device=device, dtype=dtype, fused=True)
    said = generate_text(loaded, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return GenerateResult(
        prompt=prompt,
        text=said.text,
        prompt_tokens=said.prompt_tokens,
        new_tokens=said.new_tokens,
        seconds=said.seconds,
        tokens_per_s=said.tokens_per_second,
        device=str(loaded.device),
        kernels=kernels_of(loaded.model, 1, said.prompt_tokens),
    )


def inspect(folder: Path | str, *, device: str = "auto") -> Description:
    """What is in a padst folder, layer by layer; raises `PadstError` for the first thing that is wrong with it."""
    return describe(str(folder), device=resolve_device(device))


def bench(
    model: str,
    *,
    tokens: tuple[int, ...] = (1, 32, 512),
    threads: int | None = None,
    layers_only: bool = False,
    random_recipe: Recipe | None = None,
    value_dtype: str | None = None,
    break_even: bool = False,
    calibrate: bool = False,
    train: bool = False,
    batch: int | None = None,
    compiled: bool = False,
    cuda_graphs: bool = True,
    chart: Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
    seed: int = 0,
    on_event: OnEvent = ignore,
) -> BenchResult:
    """Time a padst folder, or a config with random weights made sparse after `random_recipe`, against itself made
    dense.

    Dense speed does not depend on the values of the weights, so no dense checkpoint is needed. `value_dtype` counts for
    random weights (default: float32, on a GPU that of the activations); a folder's is its own. `chart` is an .svg file
    to draw speed-up over tokens in.
    """
    if random_recipe is None:
        loaded = load(model, device=device, dtype=dtype)
        task, sparse = loaded.source.task, loaded.model
    else:
        source = open_source(model, weights=False)
        where, activations = resolve_device(device), resolve_dtype(dtype) or torch.float32
        values = activations if value_dtype is None and where.type == "cuda" else _value_dtype(value_dtype or "float32")
        task = source.task
        sparse = random_sparse(source, random_recipe, value_dtype=values, dtype=activations, device=where)
    on_event(PhaseStarted("bench"))
    result = bench_model(
        sparse,
        task=task,
        tokens=tokens,
        threads=threads,
        layers_only=layers_only,
        break_even=break_even,
        calibrate=calibrate,
        train=train,
        batch=batch,
        compiled=compiled,
        cuda_graphs=cuda_graphs,
        seed=seed,
        on_progress=lambda done, total, what: on_event(Message(f"{done}/{total} {what}")),
    )
    if chart is not None:
        chart.write_text(speedup_chart(result), encoding="utf-8")
    return result


def _value_dtype(name: str) -> torch.dtype:
    if name not in VALUE_DTYPES:
        raise PadstError(f"--value-dtype '{name}' is unknown; choose one of {', '.join(VALUE_DTYPES)}")
    return VALUE_DTYPES[name]
