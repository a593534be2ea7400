"""Speed-up over the number of tokens, as an SVG file of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from padst_cli.bench.result import BenchResult
from padst_cli.report.charts import DASHED, DENSE, SPARSE, chart, depths, legend, standalone

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def speedup_chart(result: BenchResult) -> str:
    """A line for each kind of layer and one for all layers together; dense is 1. One `<svg>` document."""
    names = list(dict.fromkeys(row.name for row in result.layers))
    colours = depths(len(names))

    def draw(axes: Axes) -> None:
        axes.axhline(1.0, color=DENSE, **DASHED, label="dense")
        for name, colour in zip(names, colours, strict=True):
            rows = [row for row in result.layers if row.name == name]
            label = f"{name} ({rows[0].out_features} x {rows[0].in_features})"
            points = [(row.tokens, row.speedup) for row in rows]
            axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=".", linewidth=1.0, label=label)
        axes.plot(*zip(*_together(result), strict=True), color=SPARSE, marker="o", markersize=4.5, label="all layers")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=0)
        axes.set(xlabel="tokens", ylabel="dense time / sparse time")
        legend(axes)

    first = result.layers[0]
    title = f"Speed-up of {first.structure} layers at density {first.density:.2g}, {result.threads} thread(s)"
    return standalone(chart("speedup", title, draw, width=8.0, height=4.2))


def _together(result: BenchResult) -> list[tuple[int, float]]:
    """(tokens, speed-up) of all layers of the model together, however often each kind occurs."""
    counts = sorted({row.tokens for row in result.layers})
    sums = []
    for tokens in counts:
        rows = [row for row in result.layers if row.tokens == tokens]
        dense = sum(row.count * row.dense_us for row in rows)
        sums.append((tokens, dense / sum(row.count * row.sparse_us for row in rows)))
    return sums
