"""The density at which sparse layers take as long as dense ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from padst_cli.bench.layers import LayerBench
from padst_cli.bench.random_model import random_packed, with_density
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.stopwatch import Progress, crossing
from padst_cli.structures import DoesNotFit

DENSITIES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)


def break_even_densities(
    groups: list[list[str]],
    packed: Mapping[str, PackedLinear],
    tokens: Sequence[int],
    bencher: LayerBench,
    progress: Progress,
) -> dict[int, float | None]:
    """For each token count the density at which all sparse layers together take as long as dense ones."""
    found: dict[int, float | None] = {}
    for count in tokens:
        curve: list[tuple[float, float]] = []
        for density in DENSITIES:
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


def _at_density(layer: PackedLinear, density: float, bencher: LayerBench) -> PackedLinear | None:
    """A random layer of the same shape and family at another density, None where the family has none that dense."""
    try:
        structure = with_density(layer.format.structure, density)
    except DoesNotFit:
        return None
    bias = None if layer.bias is None else layer.bias.detach().cpu()
    perms = tuple(None if perm is None else perm.cpu() for perm in layer.permutations())
    transposed, values = layer.format.transposed, layer.value_dtype
    made = random_packed(structure, bias, (perms[0], perms[1]), values, bencher.dtype, transposed, bencher.generator)
    return made.to(bencher.device)
