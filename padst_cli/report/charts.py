"""The charts of the report as inline SVG, drawn by matplotlib.

Colours are placeholders while matplotlib draws and CSS variables in the result: one chart serves light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from padst_cli.checkpoint.model_card import metric_name
from padst_cli.report.history import History, Points, layer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEP: Final = "step"
INK: Final = "#0b0b01"
MUTED: Final = "#0b0b02"
GRID: Final = "#0b0b03"
SPARSE: Final = "#0b0b04"
DENSE: Final = "#0b0b05"
CONTROL: Final = "#0b0b06"
PAPER: Final = "#0b0b07"
WIDE: Final = 10.4
"""Inches of a chart that spans the page; beside a chart of the usual width its letters come out alike."""
DASHED: Final[dict[str, Any]] = {"linewidth": 1.2, "linestyle": (0, (4, 2))}
_CAUSES: Final = (("penalty", "o", "hardened under delta"), ("deadline", "s", "hardened at the deadline"))
_VARIABLES: Final = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SPARSE: "var(--sparse)",
    DENSE: "var(--dense)",
    CONTROL: "var(--control)",
    PAPER: "var(--paper)",
}
_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "padst",
    "svg.id": None,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": "cycler('color', ['#0b0b04'])",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
}
_COLOUR_NAMES: Final = ("ink", "muted", "grid", "sparse", "dense", "control", "paper")
_LIGHT: Final = ("#1b2330", "#586273", "#dde1e8", "#1764c0", "#66707f", "#b4570a", "#ffffff")
_DARK: Final = ("#e8ebf0", "#a3adbb", "#343d4a", "#6bb0ff", "#97a2b2", "#f0a35e", "#1a2029")
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def loss_chart(curves: History) -> str | None:
    """Training loss of the sparse model and of the dense control over the steps; None without training."""
    if not curves.loss:
        return None

    def draw(axes: Axes) -> None:
        # Where the loss is a mix, only its task part can be held against the control's.
        axes.plot(*_xy(curves.loss), color=SPARSE, label="sparse, whole loss")
        if curves.task_loss:
            axes.plot(*_xy(curves.task_loss), color=SPARSE, **DASHED, label="sparse, task part")
        if curves.control_loss:
            axes.plot(*_xy(curves.control_loss), color=CONTROL, label="dense control")
        _log_if_wide(axes, curves.loss + curves.task_loss + curves.control_loss)
        axes.set(xlabel=STEP, ylabel="loss")
        legend(axes)

    return chart("loss", "Training loss over the steps", draw)


def metric_chart(curves: History, metric: str) -> str | None:
    """The held-out metric of the sparse model between the dense model and the dense control; None if never measured."""
    if not curves.metric:
        return None

    def draw(axes: Axes) -> None:
        if curves.dense_metric is not None:
            axes.axhline(curves.dense_metric, color=DENSE, **DASHED, label="dense, as it came")
        if len(curves.control_metric) > 1:
            axes.plot(*_xy(curves.control_metric), color=CONTROL, marker="o", markersize=4.5, label="dense control")
        axes.plot(*_xy(curves.metric), color=SPARSE, marker="o", markersize=4.5, label="sparse")
        _log_if_wide(axes, curves.metric + curves.control_metric)
        for index in {0, len(curves.metric) - 1}:
            step, value = curves.metric[index]
            axes.annotate(f"{value:.3g}", (step, value), (0, 6), textcoords="offset points", ha="center", fontsize=8.5)
        axes.margins(x=0.06, y=0.14)
        axes.set(xlabel=STEP, ylabel=metric_name(metric))
        legend(axes)

    return chart("metric", f"Held-out {metric_name(metric)} over the steps", draw)


def learning_rate_chart(curves: History) -> str | None:
    """The learning rate over the steps; None without training."""
    if not curves.learning_rate:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*_xy(curves.learning_rate), color=SPARSE)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel=STEP, ylabel="learning rate")

    return chart("rate", "Learning rate over the steps", draw, height=2.1)


def movement_chart(curves: History, nonzeros: int) -> str | None:
    """Share of all kept entries that each support update moved; None where the support never moved."""
    if not curves.moved or nonzeros <= 0:
        return None

    def draw(axes: Axes) -> None:
        steps, moved = _xy(curves.moved)
        shares = [100 * count / nonzeros for count in moved]
        axes.vlines(steps, 0, shares, color=SPARSE, linewidth=1.2, alpha=0.55)
        axes.plot(steps, shares, color=SPARSE, marker="o", markersize=4, linestyle="none", label="moved")
        asked = [(step, 100 * fraction) for step, fraction in curves.fraction]
        axes.plot(*_xy(tuple(asked)), color=MUTED, marker=".", markersize=3, **DASHED, label="asked for")
        axes.set_ylim(bottom=0)
        axes.set(xlabel=STEP, ylabel="% of kept entries")
        legend(axes)

    return chart("movement", "Share of the kept entries that moved at each support update", draw, height=2.1)


def penalty_chart(curves: History, delta: float | None, names: Sequence[str]) -> str | None:
    """Normalised penalty of each soft permutation over the steps, marked where it hardened; None if there were none.

    Colours go through the layers in the order of `names`.
    """
    if not curves.penalties:
        return None

    def draw(axes: Axes) -> None:
        place = {name: index for index, name in enumerate(names)}
        labels = sorted(curves.penalties, key=lambda label: place.get(layer_of(label), len(place)))
        colours = dict(zip(labels, depths(len(labels)), strict=True))
        for label in labels:
            axes.plot(*_xy(curves.penalties[label]), color=colours[label], linewidth=1.1)
        for cause, marker, words in _CAUSES:
            marked = [done for done in curves.hardenings if done.cause == cause]
            axes.scatter(
                [done.step for done in marked],
                [done.penalty for done in marked],
                c=[colours[done.label] for done in marked],
                marker=marker,
                s=26,
                edgecolors=PAPER,
                linewidths=0.8,
                zorder=3,
            )
            if marked:
                axes.scatter([], [], c=MUTED, marker=marker, s=26, label=f"{words} ({len(marked)})")
        if delta is not None:
            axes.axhline(delta, color=MUTED, **DASHED, label=f"delta = {delta:g}")
        axes.set_ylim(bottom=0)
        axes.set(xlabel=STEP, ylabel="normalised penalty")
        legend(axes)

    return chart("penalty", "Normalised penalty of each soft permutation over the steps", draw, width=WIDE, height=3.3)


def layers_chart(
    names: Sequence[str],
    densities: Sequence[float],
    errors: Sequence[tuple[float | None, float | None]],
    requested: float,
) -> str | None:
    """Density of each layer beside its relative output error before and after the refit; None without layers."""
    if not names:
        return None
    rows = list(range(len(names)))

    def draw_density(axes: Axes) -> None:
        axes.barh(rows, densities, color=SPARSE, height=0.62)
        axes.axvline(requested, color=INK, **DASHED, label=f"requested: {requested:.3g}")
        axes.set(xlabel="density")
        axes.set_yticks(rows, names, fontsize=8)
        axes.grid(False, axis="y")
        axes.set_ylim(len(names) - 0.4, -0.6)
        legend(axes)

    def draw_error(axes: Axes) -> None:
        both = [(row, *pair) for row, pair in enumerate(errors) if None not in pair]
        if not both:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=MUTED)
            return
        at, before, after = zip(*both, strict=True)
        axes.hlines(at, after, before, color=GRID, linewidth=2.2)
        axes.scatter(before, at, c=DENSE, s=20, zorder=3, label="old weights on the support")
        axes.scatter(after, at, c=SPARSE, s=20, zorder=3, label="after the refit")
        axes.set_xlim(left=0)
        axes.set(xlabel="relative output error at the start")
        axes.grid(False, axis="y")
        legend(axes)

    height = 1.0 + 0.175 * len(names)
    title = "Density and relative output error of each layer"
    return chart("layers", title, draw_density, draw_error, width=WIDE, height=height)


def chart(name: str, title: str, *panels: Callable[[Axes], None], width: float = 4.9, height: float = 2.6) -> str:
    """Draw panels side by side (they share the vertical axis) and give one `<svg>` element, free of outside references.

    `name` goes before every id in it, so that charts do not meet in one page.
    """
    # Imported here: it takes a second, and a page without charts needs none of it.
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, draw in zip(all_axes, panels, strict=True):
            draw(axes)
            if axes.get_xlabel() == STEP:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return _embeddable(figure, name, title)


def standalone(svg: str) -> str:
    """The `<svg>` element as a document of its own, with the colours that a page would give it."""
    light, dark = (
        " ".join(f"--{name}: {value};" for name, value in zip(_COLOUR_NAMES, values, strict=True))
        for values in (_LIGHT, _DARK)
    )
    style = (
        f"<style>svg {{ {light} --font: sans-serif; background: var(--paper); }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    )
    opening, rest = svg.split(">", 1)
    opening = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{opening}>{style}{rest}\n"


def _embeddable(figure: Figure, name: str, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in (f"{_SVG}metadata", f"{_SVG}title")]:
            parent.remove(child)
    used = _references(root)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if _LINK in element.attrib:
            element.set("href", f"#{name}-{element.attrib.pop(_LINK).removeprefix('#')}")
        identity = element.attrib.pop("id", None)
        if identity in used:
            element.set("id", f"{name}-{identity}")
        for key, value in element.attrib.items():
            element.set(key, _localised(value, name))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


def _references(root: ElementTree.Element) -> set[str]:
    found = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == _LINK:
                found.add(value.removeprefix("#"))
            found.update(re.findall(r"url\(#([^)]+)\)", value))
    return found


def _localised(value: str, name: str) -> str:
    value = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", value)
    # The page's own font; matplotlib only needed one to measure with.
    value = value.replace("'DejaVu Sans', sans-serif", "var(--font)").replace("'DejaVu Sans'", "var(--font)")
    for placeholder, variable in _VARIABLES.items():
        value = value.replace(placeholder, variable)
    return value


def _xy(points: Points) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _log_if_wide(axes: Axes, points: Points) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    values = [value for _, value in points]
    if min(values) <= 0 or max(values) < 8 * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend(axes: Axes) -> None:
    """The lines' names over the chart."""
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderpad": 0.2}
    axes.legend(**place, ncols=3, handlelength=1.6, columnspacing=1.4)


def depths(count: int) -> list[tuple[float, float, float]]:
    """Colours from the first layer to the last that are told apart on white and on black."""
    first, middle, last = (0.16, 0.50, 0.82), (0.55, 0.45, 0.72), (0.88, 0.46, 0.18)
    colours = []
    for index in range(count):
        place = 2 * index / max(1, count - 1)
        low, high, share = (first, middle, place) if place <= 1 else (middle, last, place - 1)
        colours.append(tuple(round(a + (b - a) * share, 3) for a, b in zip(low, high, strict=True)))
    return colours  # type: ignore[return-value]
