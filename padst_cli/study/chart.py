"""One chart a model: the metric against sparsity, a panel a structure, a line a method with its band over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from padst_cli.checkpoint.model_card import metric_name
from padst_cli.report.charts import CONTROL, DASHED, DENSE, INK, MUTED, SPARSE, WIDE, chart, depths, standalone
from padst_cli.study.cells import UNSTRUCTURED
from padst_cli.study.statistics import Interval
from padst_cli.study.summary import ModelSummary, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Panel = Callable[[Axes], None]

_NAMES = {"rigl": "unstructured, RigL", "set": "unstructured, SET", "frozen": "soft, frozen at its start"}


def study_chart(summary: ModelSummary) -> str:
    """The chart of one model as an `<svg>` document; bands are 95 % intervals over seeds."""
    found = [(comparison.sparsity, row) for comparison in summary.comparisons for row in comparison.rows()]
    # What was never trained would stretch the axis until nothing else can be told apart.
    rows = [(at, row) for at, row in found if not row.one_shot] or found
    structures = [name for name in dict.fromkeys(row.structure for _, row in rows) if name != UNSTRUCTURED]
    panels = [_panel(summary, rows, structure) for structure in structures or [UNSTRUCTURED]]
    panels = [_labelled(panels[0], metric_name(summary.metric)), *panels[1:]]
    panels[-1] = _with_legend(panels[-1])
    title = f"{summary.model}: held-out {metric_name(summary.metric)} against sparsity"
    return standalone(chart("study", title, *panels, width=WIDE, height=4.4))


def _labelled(panel: Panel, metric: str) -> Panel:
    def draw(axes: Axes) -> None:
        panel(axes)
        axes.set_ylabel(metric)

    return draw


def _with_legend(panel: Panel) -> Panel:
    """The names of all lines over the whole chart: they are the same in every panel."""

    def draw(axes: Axes) -> None:
        panel(axes)
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4, borderpad=0.2)

    return draw


def _panel(summary: ModelSummary, rows: list[tuple[float, Row]], structure: str) -> Panel:
    own = list(dict.fromkeys(row.method for _, row in rows if row.structure == structure != UNSTRUCTURED))
    controls = list(dict.fromkeys(row.method for _, row in rows if row.structure == UNSTRUCTURED))
    styles = [(UNSTRUCTURED, name, style) for name, style in zip(controls, _control_styles(), strict=False)]
    styles += [(structure, name, style) for name, style in _method_styles(own).items()]
    sparsities = sorted({at for at, _ in rows})
    # One sparsity has no lines: there the methods stand side by side.
    apart = 0.0 if len(sparsities) > 1 else 0.03 / len(styles)

    def draw(axes: Axes) -> None:
        axes.axhline(_shown(summary, summary.dense), color=DENSE, **DASHED, label="dense, as it came")
        if summary.finetuned is not None:
            axes.axhline(_shown(summary, summary.finetuned.mean), color=CONTROL, **DASHED, label="dense, fine-tuned")
            _band(axes, summary, [0.0, 1.0], [summary.finetuned] * 2, CONTROL)
        for number, (kind, method, style) in enumerate(styles):
            shift = apart * (number - (len(styles) - 1) / 2)
            found = [(at + shift, row.score) for at, row in rows if (row.structure, row.method) == (kind, method)]
            _line(axes, summary, found, _NAMES.get(method, method), style)
        axes.set_xticks(sparsities, [f"{at:g}" for at in sparsities])
        margin = 0.1 * (sparsities[-1] - sparsities[0]) or 0.02
        axes.set_xlim(sparsities[0] - margin, sparsities[-1] + margin)
        axes.set(xlabel=f"sparsity ({structure})")

    return draw


def _control_styles() -> list[dict[str, Any]]:
    return [{"color": MUTED, "marker": marker, "linestyle": ":"} for marker in "^v"]


def _method_styles(methods: list[str]) -> dict[str, dict[str, Any]]:
    """The learned permutation stands out, none is in ink; the others' colours go through the rest."""
    others = [name for name in methods if name not in ("learned", "none")]
    colours: dict[str, Any] = dict(zip(others, depths(len(others) + 1)[1:], strict=True))
    colours |= {"learned": SPARSE, "none": INK}
    return {
        name: {"color": colours[name], "marker": "o", "linestyle": "--" if name == "frozen" else "-"}
        for name in methods
    }


def _line(
    axes: Axes, summary: ModelSummary, found: list[tuple[float, Interval]], label: str, style: dict[str, Any]
) -> None:
    places = [at for at, _ in found]
    scores = [score for _, score in found]
    axes.plot(
        places,
        [_shown(summary, score.mean) for score in scores],
        markersize=4.5,
        linewidth=1.4,
        label=label,
        **style,
    )
    _band(axes, summary, places, scores, style["color"])
    for at, score in found:  # a single sparsity has no band
        if score.low is not None and score.high is not None:
            axes.vlines(at, _shown(summary, score.low), _shown(summary, score.high), color=style["color"], linewidth=1)


def _band(axes: Axes, summary: ModelSummary, places: list[float], scores: list[Interval], colour: Any) -> None:
    edges = [(at, one.low, one.high) for at, one in zip(places, scores, strict=True)]
    known = [(at, low, high) for at, low, high in edges if low is not None and high is not None]
    if known:
        at, low, high = zip(*known, strict=True)
        axes.fill_between(
            at,
            [_shown(summary, value) for value in low],
            [_shown(summary, value) for value in high],
            color=colour,
            alpha=0.14,
            linewidth=0,
        )


def _shown(summary: ModelSummary, score: float) -> float:
    """A score as the metric itself: the mean of logarithms is drawn as a perplexity (their geometric mean)."""
    return math.exp(score) if summary.metric.endswith("perplexity") else score
