"""How fast sparse layers and the sparse model run against dense ones: the same process, threads, inputs and moment.

The method: runs of dense and sparse alternate, so that a machine that slows down slows both; figures are medians of
the runs with their interquartile range; the weights of a layer are rotated through copies that together exceed the
caches, as the layers of a model do; dense layers are `torch.nn.functional.linear` on contiguous weights. What is
called resident is counted from the tensors that are alive after the runs, kernels' prepared copies included.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padst_cli.checkpoint.reader import Source, plain_config
from padst_cli.errors import PadstError
from padst_cli.evaluation.forward import accepted, evaluating
from padst_cli.evaluation.text import max_positions
from padst_cli.permutation.apply import identity, random_permutation
from padst_cli.plan import LayerPlan, make_plan
from padst_cli.recipe import Recipe
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.packing import densify, install, resident_bytes
from padst_cli.runtime.quantizer import packed_layers
from padst_cli.stopwatch import OnProgress, Pair, Progress, Rate, Stopwatch, Timing, crossing
from padst_cli.structures import DoesNotFit, Structure, StructureOptions
from padst_cli.tying import untie

DEFAULT_TOKENS = (1, 32, 512)
BREAK_EVEN_DENSITIES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
_DECODE_STEPS = 32
_PROMPT = 16
_IMAGES = 8


@dataclass(frozen=True)
class LayerRow:
    """One layer shape with one structure at one token count; times in microseconds a call, bias and permutation
    included.

    `count` layers of the model are like it, `name` is the first. `dense_spread` and `sparse_spread` are interquartile
    ranges over medians. `density` is the achieved one.
    """

    name: str
    count: int
    out_features: int
    in_features: int
    structure: str
    parameters: Mapping[str, Any]
    density: float
    tokens: int
    dense_us: float
    sparse_us: float
    speedup: float
    kernel: str
    dense_spread: float
    sparse_spread: float


@dataclass(frozen=True)
class ModelRates:
    """Whole-model figures; `decode` is None for models that generate nothing. `resident_bytes` has the keys dense and
    sparse.
    """

    prefill: Rate
    decode: Rate | None
    resident_bytes: Mapping[str, int]


@dataclass(frozen=True)
class BenchResult:
    """What `padst bench` reports; the fields are its JSON keys. `model` is None where only layers were measured.

    `break_even_density`: token count -> density at which sparse layers take as long as dense ones, None where they do
    at every density tried; the whole field is None where it was not asked for.
    """

    device: str
    threads: int
    dtype: str
    value_dtype: str
    layers: tuple[LayerRow, ...]
    model: ModelRates | None
    break_even_density: Mapping[int, float | None] | None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values (token counts as text keys)."""
        raw = asdict(self)
        raw["layers"] = list(raw["layers"])
        if self.break_even_density is not None:
            raw["break_even_density"] = {str(tokens): value for tokens, value in self.break_even_density.items()}
        return raw


def bench(
    sparse: Any,
    dense: Any = None,
    *,
    task: str,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    threads: int | None = None,
    layers_only: bool = False,
    break_even: bool = False,
    seed: int = 0,
    timing: Timing = Timing(),
    on_progress: OnProgress | None = None,
) -> BenchResult:
    """Time a packed model against `dense` (default: itself made dense), layer by layer and as a whole, where it now
    lives.

    `task` is the source's; `threads` None keeps torch's. Raises `PadstError` for a model without sparse layers.
    """
    packed = packed_layers(sparse)
    if not packed:
        raise PadstError(
            "this model has no sparse layers to measure; give a folder that padst wrote, or --random-weights"
        )
    if not tokens or min(tokens) < 1:
        raise PadstError("token counts must be 1 or more")
    device, dtype = sparse.device, sparse.dtype
    groups = _groups(packed)
    before = torch.get_num_threads()
    threads = threads or before
    progress = Progress(on_progress, len(groups) * len(tokens) * (1 + len(BREAK_EVEN_DENSITIES) * break_even) + 2)
    torch.set_num_threads(threads)
    try:
        with evaluating(sparse, dense):
            stopwatch = Stopwatch(timing, threads, device)
            bencher = _LayerBench(stopwatch, device, dtype, seed)
            rows = [bencher.row(names, packed, count, progress) for names in groups for count in tokens]
            limits = _break_even(groups, packed, tokens, bencher, progress) if break_even else None
            rates = None
            if not layers_only:
                dense = densify(sparse) if dense is None else dense
                with evaluating(dense):
                    rates = _model_rates(sparse, dense, task, max(tokens), stopwatch, seed, progress)
    finally:
        torch.set_num_threads(before)
    value_dtype = next(iter(packed.values())).value_dtype
    return BenchResult(str(device.type), threads, _name(dtype), _name(value_dtype), tuple(rows), rates, limits)


def random_sparse(
    source: Source,
    recipe: Recipe,
    *,
    value_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Any:
    """A model of the source's config with random weights, its planned layers packed with random supports and
    permutations.

    Needs no weights, for speed depends on shapes and supports alone. The recipe's permutation kind must be `random`
    or `none`; a random permutation is never the identity. Raises `PadstError` as the plan does.
    """
    if recipe.permutation.kind not in ("random", "none"):
        raise PadstError(
            f"random weights have no {recipe.permutation.kind} permutation; use --permutation random or none"
        )
    torch.manual_seed(recipe.seed)
    model = source.model_class(plain_config(source)).to(device=device, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(recipe.seed)
    plan = make_plan(model, recipe)
    if plan.unties:
        untie(model)
    layers = {layer.name: _random_layer(layer, value_dtype, dtype, generator).to(device) for layer in plan.layers}
    return install(model, layers, "packed" if all(layer.structure.exportable for layer in plan.layers) else "training")


def _random_layer(
    plan: LayerPlan, value_dtype: torch.dtype, dtype: torch.dtype, generator: torch.Generator
) -> PackedLinear:
    bias = torch.zeros(plan.out_features, dtype=dtype) if plan.bias else None
    perms = (
        _moving_permutation(plan.in_features, generator) if "input" in plan.sides else None,
        _moving_permutation(plan.out_features, generator) if "output" in plan.sides else None,
    )
    return _random_packed(plan.structure, bias, perms, value_dtype, dtype, plan.transposed, generator)


def _random_packed(
    structure: Structure,
    bias: Tensor | None,
    perms: tuple[Tensor | None, Tensor | None],
    value_dtype: torch.dtype,
    dtype: torch.dtype,
    transposed: bool,
    generator: torch.Generator,
) -> PackedLinear:
    shape = (structure.out_features, structure.in_features)
    mask = structure.project(torch.rand(shape, generator=generator))
    weight = torch.randn(shape, generator=generator) / math.sqrt(structure.in_features) * mask
    layer = PackedLinear.from_sparse(
        structure, weight.to(dtype), mask, bias, *perms, value_dtype, transposed=transposed
    )
    return layer.eval()


def _moving_permutation(size: int, generator: torch.Generator) -> Tensor:
    while True:
        perm = random_permutation(size, generator)
        if size == 1 or not torch.equal(perm, identity(size)):
            return perm


class _LayerBench:
    """Times one layer at a time on random inputs `[tokens, in]`."""

    def __init__(self, stopwatch: Stopwatch, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.stopwatch, self.device, self.dtype = stopwatch, device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def row(self, names: list[str], packed: Mapping[str, PackedLinear], tokens: int, progress: Progress) -> LayerRow:
        """The row of the report for layers that are alike."""
        layer = packed[names[0]]
        structure = layer.format.structure
        progress.next(f"{names[0]}, {tokens} tokens")
        pair = self.compare(layer, tokens)
        return LayerRow(
            name=names[0],
            count=len(names),
            out_features=layer.out_features,
            in_features=layer.in_features,
            structure=structure.name,
            parameters=structure.parameters(),
            density=structure.density,
            tokens=tokens,
            dense_us=pair.dense * 1e6,
            sparse_us=pair.sparse * 1e6,
            speedup=pair.dense / pair.sparse,
            kernel=layer.kernel_name(tokens),
            dense_spread=pair.dense_spread,
            sparse_spread=pair.sparse_spread,
        )

    def compare(self, layer: PackedLinear, tokens: int) -> Pair:
        """Dense and sparse seconds a call at this token count."""
        x = torch.randn(tokens, layer.in_features, generator=self.generator).to(self.device, self.dtype)
        return self.stopwatch.calls(self._dense_step(layer, x), self._sparse_step(layer, x))

    def _dense_step(self, layer: PackedLinear, x: Tensor) -> Callable[[], Tensor]:
        shape = (layer.out_features, layer.in_features)
        first = (torch.randn(shape, generator=self.generator) / math.sqrt(shape[1])).to(self.device, self.dtype)
        bias = None if layer.bias is None else layer.bias.detach()
        copies = self.stopwatch.timing.copies(first.numel() * first.element_size())
        weights = cycle([first, *(first.clone() for _ in range(copies - 1))])
        return lambda: F.linear(x, next(weights), bias)

    def _sparse_step(self, layer: PackedLinear, x: Tensor) -> Callable[[], Tensor]:
        # A copy, so that what kernels prepare for these runs does not count as resident in the model.
        first = copy.deepcopy(layer)
        first(x)
        copies = self.stopwatch.timing.copies(resident_bytes(first))
        layers = [first, *(copy.deepcopy(layer) for _ in range(copies - 1))]
        for one in layers:
            one(x)
        turns: Iterator[nn.Module] = cycle(layers)

        def step() -> Tensor:
            # Without the hooks of `nn.Module.__call__`, as the dense side is called without them.
            result: Tensor = next(turns).forward(x)
            return result

        return step


def _groups(packed: Mapping[str, PackedLinear]) -> list[list[str]]:
    """Names of layers that take equally long: the same format (shape, structure, sides, bias) in the model's order."""
    groups: dict[Any, list[str]] = {}
    for name, layer in packed.items():
        groups.setdefault(layer.format, []).append(name)
    return list(groups.values())


def _break_even(
    groups: list[list[str]],
    packed: Mapping[str, PackedLinear],
    tokens: Sequence[int],
    bencher: _LayerBench,
    progress: Progress,
) -> dict[int, float | None]:
    """For each token count the density at which all sparse layers together take as long as dense ones."""
    found: dict[int, float | None] = {}
    for count in tokens:
        curve: list[tuple[float, float]] = []
        for density in BREAK_EVEN_DENSITIES:
            dense = sparse = achieved = entries = 0.0
            for names in groups:
                progress.next(f"break-even: density {density}, {count} tokens")
                layer = _at_density(packed[names[0]], density, bencher)
                if layer is None:
                    continue
                pair = bencher.compare(layer, count)
                size = len(names) * layer.out_features * layer.in_features
                dense, sparse = dense + pair.dense * len(names), sparse + pair.sparse * len(names)
                achieved, entries = achieved + layer.format.structure.density * size, entries + size
            if entries:
                curve.append((achieved / entries, sparse / dense))
        found[count] = crossing(curve)
    return found


def _at_density(layer: PackedLinear, density: float, bencher: _LayerBench) -> PackedLinear | None:
    """A random layer of the same shape and family at another density, None where the family has none that dense."""
    old = layer.format.structure
    parameters = old.parameters()
    options = StructureOptions(
        block_size=parameters.get("block_size", StructureOptions.block_size),
        band=parameters.get("band", StructureOptions.band),
    )
    try:
        structure = type(old).for_density(old.out_features, old.in_features, density, options)
    except DoesNotFit:
        return None
    bias = None if layer.bias is None else layer.bias.detach().cpu()
    perms = tuple(None if perm is None else perm.cpu() for perm in layer.permutations())
    transposed, values = layer.format.transposed, layer.value_dtype
    made = _random_packed(structure, bias, (perms[0], perms[1]), values, bencher.dtype, transposed, bencher.generator)
    return made.to(bencher.device)


def _model_rates(
    sparse: Any, dense: Any, task: str, tokens: int, stopwatch: Stopwatch, seed: int, progress: Progress
) -> ModelRates:
    generator = torch.Generator().manual_seed(seed)
    decode = None
    progress.next("whole model")
    if sparse.main_input_name == "pixel_values":
        size = sparse.config.image_size
        shape = (_IMAGES, sparse.config.num_channels, *((size, size) if isinstance(size, int) else size))
        inputs = {"pixel_values": torch.randn(shape, generator=generator)}
        prefill = _forward_rate(sparse, dense, inputs, {}, stopwatch, ("images", _IMAGES, _IMAGES))
    else:
        config = sparse.config.get_text_config()
        tokens = min(tokens, max_positions(sparse) or tokens)
        ids = torch.randint(config.vocab_size, (1, tokens), generator=generator)
        causal = task == "causal-lm"
        options = accepted(sparse, use_cache=True, logits_to_keep=1) if causal else {}
        unit = ("tokens", tokens, tokens) if causal else ("sequences", tokens, 1)
        prefill = _forward_rate(sparse, dense, {"input_ids": ids}, options, stopwatch, unit)
        if causal:
            progress.next("decoding")
            decode = _decode_rate(sparse, dense, stopwatch, generator)
    return ModelRates(prefill, decode, {"dense": resident_bytes(dense), "sparse": resident_bytes(sparse)})


def _forward_rate(
    sparse: Any,
    dense: Any,
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    stopwatch: Stopwatch,
    unit: tuple[str, int, int],
) -> Rate:
    def step(model: Any) -> Callable[[], Any]:
        moved = {
            key: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for key, x in inputs.items()
        }
        return lambda: model(**moved, **options)

    name, tokens, done = unit
    return Rate.of(name, tokens, done, stopwatch.calls(step(dense), step(sparse)))


def _decode_rate(sparse: Any, dense: Any, stopwatch: Stopwatch, generator: torch.Generator) -> Rate:
    """Greedy decoding with a key-value cache, one sequence; the prompt's pass is not timed."""
    limit = max_positions(sparse) or _PROMPT + _DECODE_STEPS
    prompt = min(_PROMPT, max(1, limit // 2))
    steps = max(1, min(_DECODE_STEPS, limit - prompt))
    ids = torch.randint(sparse.config.get_text_config().vocab_size, (1, prompt), generator=generator)

    def decode(model: Any) -> Callable[[], float]:
        return lambda: _decode_seconds(model, ids.to(model.device), steps, stopwatch)

    for model in (dense, sparse):
        decode(model)()
    return Rate.of("tokens", steps, steps, stopwatch.alternate(decode(dense), decode(sparse)))


def _decode_seconds(model: Any, ids: Tensor, steps: int, stopwatch: Stopwatch) -> float:
    options = accepted(model, logits_to_keep=1)
    state = model(input_ids=ids, use_cache=True, **options)

    def generate() -> None:
        nonlocal state
        for _ in range(steps):
            token = state.logits[:, -1:].argmax(dim=-1)
            state = model(input_ids=token, past_key_values=state.past_key_values, use_cache=True, **options)

    return stopwatch.once(generate)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
