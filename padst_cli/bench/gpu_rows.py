"""The rows of the GPU table, and how each of them is measured: models of configs alone, with random weights at 0.9.

Before a row is measured its kernels are tuned and its paths timed for its own number of tokens, as `--calibrate` does.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from padst_kernels.dispatch import calibrate_gpu

from padst_cli.bench.calibrate import calibrate_steps
from padst_cli.bench.cuda import stopwatch_for
from padst_cli.bench.decode import decode_rate
from padst_cli.bench.layers import LayerBench
from padst_cli.bench.model import Whole, prefill_rate
from padst_cli.bench.random_model import random_linear, random_sparse
from padst_cli.bench.train import step_rate
from padst_cli.checkpoint.reader import open_source
from padst_cli.evaluation.forward import evaluating
from padst_cli.recipe import Recipe
from padst_cli.runtime.fusion import fuse
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.packing import densify
from padst_cli.runtime.quantizer import kernels_of, packed_layers
from padst_cli.stopwatch import Rate, Stopwatch, Timing
from padst_cli.structures import StructureOptions

SPARSITY = 0.9

_TUNING = 60.0
"""Seconds that a row may take for tuning, at most a third of what its group has left."""


@dataclass(frozen=True, eq=False)
class Sizes:
    """What is measured: a layer (inputs, outputs), its few and many tokens, and the configs and batches of models."""

    layer: tuple[int, int] = (4096, 11008)
    few: tuple[int, int] = (1, 16)
    many: int = 4096
    llama: Mapping[str, Any] = field(default_factory=dict)
    vit: Mapping[str, Any] = field(default_factory=lambda: {"num_labels": 1000})
    gpt2: Mapping[str, Any] = field(default_factory=dict)
    images: int = 256
    prompts: tuple[int, int] = (16, 1024)
    training: tuple[int, int] = (8, 1024)


FULL = Sizes()
"""The defaults of transformers' configs: Llama-2-7B, ViT-B/16, GPT-2 small."""

_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
TINY = Sizes(
    layer=(64, 176),
    few=(1, 4),
    many=32,
    llama={**_SMALL, "intermediate_size": 176, "vocab_size": 64, "max_position_embeddings": 32},
    vit={**_SMALL, "intermediate_size": 128, "image_size": 32, "num_labels": 5},
    gpt2={**_SMALL, "vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0},
    images=2,
    prompts=(2, 16),
    training=(2, 16),
)
"""Runs in seconds on a CPU: to see that everything runs, not how fast."""


_TIMING = Timing(repeats=5, run_seconds=0.02)


@dataclass(frozen=True)
class Setting:
    """Where and with what rows are measured; past `deadline` (seconds of `time.monotonic`) nothing more is tuned."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes = FULL
    timing: Timing = _TIMING
    deadline: float = float("inf")
    seed: int = 0

    @property
    def whole(self) -> Whole:
        """Models are compiled on a GPU."""
        return Whole(compiled=self.device.type == "cuda")

    def stopwatch(self) -> Stopwatch:
        """A new one, without notes."""
        return stopwatch_for(self.timing, torch.get_num_threads(), self.device, graphs=True)


@dataclass(frozen=True)
class Figures:
    """One measured row: time or rate of both sides with its unit, what computed the sparse one, and what to know."""

    dense: float
    sparse: float
    unit: str
    speedup: float
    kernels: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of_rate(cls, rate: Rate, kernels: str, stopwatch: Stopwatch, unit: str = "") -> Figures:
        """A model's row."""
        per = unit or f"{rate.unit}/s"
        return cls(rate.dense_per_s, rate.sparse_per_s, per, rate.speedup, kernels, _notes(stopwatch))


@dataclass(frozen=True)
class Row:
    """A line of the table: its name, the speed-up to reach (None where none is set), and what measures it."""

    name: str
    goal: float | None
    measure: Callable[[Setting], Figures]


@dataclass(frozen=True)
class Group:
    """Rows that are measured in one process, within `budget` seconds."""

    name: str
    budget: float
    rows: tuple[Row, ...]


def groups(sizes: Sizes) -> tuple[Group, ...]:
    """The whole table, the most telling rows first."""
    return (
        Group("layers", 110, _layer_rows(sizes)),
        Group("vit", 60, (Row(f"ViT-B/16, batch {sizes.images}, block 64", 1.8, _vit),)),
        Group("gpt2", 80, _prefill_rows(sizes)),
        Group(
            "training", 60, (Row(f"GPT-2 small, fine-tuning step, {_times(sizes.training)}, block 64", 1.21, _train),)
        ),
        Group("llama", 150, (Row("Llama-2-7B, decoding, batch 1, block 32", 3.0, _llama),)),
    )


_VARIANTS: Mapping[str, tuple[str, StructureOptions]] = {
    "diag": ("diag", StructureOptions()),
    "diag, bands of 16": ("diag", StructureOptions(band=16)),
    "diag, bands of 64": ("diag", StructureOptions(band=64)),
    "block 32": ("block", StructureOptions(block_size=32)),
    "block 64": ("block", StructureOptions(block_size=64)),
    "nm": ("nm", StructureOptions()),
    "2:4": ("nm", StructureOptions(nm=(2, 4))),
}
_FEW_GOALS = {"diag": 5.0, "diag, bands of 16": 5.0, "block 32": 5.0, "block 64": 5.0, "nm": 4.5}
_MANY_GOALS = {
    "block 64": 5.0,
    "diag, bands of 64": 2.0,
    "diag, bands of 16": None,
    "block 32": None,
    "diag": None,
    "nm": None,
    "2:4": None,
}


def _layer_rows(sizes: Sizes) -> tuple[Row, ...]:
    inputs, outputs = sizes.layer
    cells: list[tuple[str, int, float | None]]
    cells = [(variant, tokens, goal) for tokens in sizes.few for variant, goal in _FEW_GOALS.items()]
    cells += [(variant, sizes.many, goal) for variant, goal in _MANY_GOALS.items()]
    return tuple(
        Row(f"{inputs} -> {outputs}, T={tokens}, {variant}", goal, functools.partial(_layer, variant, tokens))
        for variant, tokens, goal in cells
    )


def _layer(variant: str, tokens: int, setting: Setting) -> Figures:
    layer = _linear(variant, setting)
    _tune([layer], tokens, setting)
    stopwatch = setting.stopwatch()
    with evaluating(layer):
        pair = LayerBench(stopwatch, setting.device, setting.dtype, setting.seed).compare(layer, tokens)
    kernel = layer.kernel_name(tokens)
    return Figures(pair.dense * 1e6, pair.sparse * 1e6, "us", pair.dense / pair.sparse, kernel, _notes(stopwatch))


@functools.cache  # the layers of all rows together are small, and made on the CPU
def _linear(variant: str, setting: Setting) -> PackedLinear:
    structure, options = _VARIANTS[variant]
    density = 0.5 if options.nm == (2, 4) else 1 - SPARSITY
    inputs, outputs = setting.sizes.layer
    generator = torch.Generator().manual_seed(setting.seed)
    made = random_linear(structure, outputs, inputs, density, options, setting.dtype, generator)
    return made.to(setting.device)


def _vit(setting: Setting) -> Figures:
    sparse, dense, task = _models("vit", setting, structure="block", block_size=64)
    images = setting.sizes.images
    patches = (sparse.config.image_size // sparse.config.patch_size) ** 2 + 1
    return _prefill(sparse, dense, task, 1, setting, images, images * patches)


def _prefill_rows(sizes: Sizes) -> tuple[Row, ...]:
    def measure(setting: Setting, **recipe: Any) -> Figures:
        sparse, dense, task = _models("gpt2", setting, **recipe)
        batch, tokens = setting.sizes.prompts
        return _prefill(sparse, dense, task, tokens, setting, batch, batch * tokens)

    name = f"GPT-2 small, prefill {_times(sizes.prompts)}"
    return (
        Row(f"{name}, block 64", 2.0, functools.partial(measure, structure="block", block_size=64)),
        Row(f"{name}, diag in bands of 64", 1.5, functools.partial(measure, structure="diag", band=64)),
    )


def _prefill(sparse: Any, dense: Any, task: str, tokens: int, setting: Setting, batch: int, rows: int) -> Figures:
    _tune(packed_layers(sparse).values(), rows, setting)
    fuse(sparse)
    stopwatch, whole = setting.stopwatch(), Whole(batch, setting.whole.compiled)
    with evaluating(sparse, dense):
        rate = prefill_rate(sparse, dense, task, tokens, stopwatch, _generator(setting), whole)
    return Figures.of_rate(rate, ", ".join(kernels_of(sparse, rows)), stopwatch)


def _llama(setting: Setting) -> Figures:
    sparse, dense, _ = _models("llama", setting, structure="block", block_size=32)
    _tune(packed_layers(sparse).values(), 1, setting)
    fuse(sparse)
    stopwatch = setting.stopwatch()
    with evaluating(sparse, dense):
        rate = decode_rate(sparse, dense, stopwatch, _generator(setting), setting.whole.runner)
    return Figures.of_rate(rate, ", ".join(kernels_of(sparse, 1)), stopwatch)


def _train(setting: Setting) -> Figures:
    sparse, dense, _ = _models("gpt2", setting, structure="block", block_size=64)
    batch, tokens = setting.sizes.training
    if setting.device.type == "cuda":
        calibrate_steps(sparse, tokens=(batch * tokens,), deadline=_tuning_deadline(setting))
    stopwatch = setting.stopwatch()
    used: set[str] = set()
    rate = step_rate(sparse, dense, tokens, stopwatch, _generator(setting), batch, used)
    return Figures.of_rate(rate, ", ".join(sorted(used)), stopwatch)


def _models(family: str, setting: Setting, **recipe: Any) -> tuple[Any, Any, str]:
    """(sparse, dense, task) of a config alone, with random weights and a permutation for every layer."""
    import transformers

    prefix, head = {
        "llama": ("Llama", "ForCausalLM"),
        "vit": ("ViT", "ForImageClassification"),
        "gpt2": ("GPT2", "LMHeadModel"),
    }[family]
    config = getattr(transformers, f"{prefix}Config")(**getattr(setting.sizes, family))
    config.architectures = [f"{prefix}{head}"]
    chosen = Recipe.from_dict({**recipe, "sparsity": SPARSITY, "permutation": {"kind": "random"}, "seed": setting.seed})
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        source = open_source(folder, weights=False)
        sparse = random_sparse(source, chosen, value_dtype=setting.dtype, dtype=setting.dtype, device=setting.device)
    with torch.no_grad():
        return sparse, densify(sparse), source.task


def _tune(layers: Any, tokens: int, setting: Setting) -> None:
    if setting.device.type == "cuda":
        layouts = [layer.layout() for layer in layers]
        calibrate_gpu(layouts, setting.dtype, tokens=(tokens,), deadline=_tuning_deadline(setting))


def _tuning_deadline(setting: Setting) -> float:
    now = time.monotonic()
    return now + min(_TUNING, (setting.deadline - now) / 3)


def _generator(setting: Setting) -> Any:
    return torch.Generator().manual_seed(setting.seed)


def _notes(stopwatch: Stopwatch) -> tuple[str, ...]:
    return tuple(getattr(stopwatch, "notes", ()))


def _times(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"
