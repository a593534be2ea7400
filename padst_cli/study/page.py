"""STUDY.md: what was run, what came of it, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from padst_cli.checkpoint.model_card import metric_name
from padst_cli.study.figures import CellFigures
from padst_cli.study.recipe import CONTROLS, ONE_SHOT, PERMUTATIONS, StudyRecipe, expanded
from padst_cli.study.statistics import CLEAR, Interval
from padst_cli.study.summary import Comparison, Contrast, ModelSummary, Row

_NAMES: Final = {
    "rigl": "RigL",
    "set": "SET",
    "none": "no permutation",
    "random": "random permutation",
    "assignment": "assignment",
    "learned": "learned",
    "soft": "soft",
    "frozen": "soft, frozen at its start",
    "start": "one shot: padst's own start",
    "magnitude": "one shot: magnitude",
    "wanda": "one shot: Wanda",
    "sparsegpt": "one shot: SparseGPT",
}
_NOTHING: Final = "–"
_FAILED_UNDER: Final = {"block": 0.5, "diag": 0.3}
"""Gap closed, by structure, under which a learned permutation is not worth its name."""


def study_page(
    study: StudyRecipe,
    cells: Sequence[CellFigures],
    summaries: Sequence[ModelSummary],
    failures: Mapping[str, str],
    open_cells: int,
    charts: Mapping[str, str],
    command: str,
) -> str:
    """The whole page; `failures` are sentences by cell, `charts` file names by model, `open_cells` of them wait."""
    parts = [_opening(study, cells, len(failures), open_cells, command)]
    written = {expanded(model.eval_data): model.eval_data for model in study.models}
    for summary in summaries:
        parts += [_model(summary, charts[summary.model], written)]
        for comparison in summary.comparisons:
            parts += [_comparison(summary, comparison)]
    if failures:
        parts += ["## Cells that failed", "\n".join(f"- `{name}`: {why}" for name, why in failures.items())]
    parts += [_READING]
    return "\n\n".join(parts) + "\n"


_READING: Final = f"""## How to read this

- *KL* is the mean divergence of the dense model's predictions from the sparse one's on held-out data, in nats: the
  first figure to look at. ± and brackets are 95 % intervals (Student's t) over seeds; a single seed has none.
- Differences are paired by seed: both runs of a pair saw the same data in the same order. Bold: the interval
  leaves out 0.
- *Gap closed* is (method − none) / (unstructured − none) in KL: 0 is as good as no permutation, 1 as good as the
  better unstructured control. It is not told where unstructured is not better than none by more than {CLEAR:g} standard
  errors.
- *Assignment* finds the order of each layer once, by saliency. *Learned* goes on from there; by the learner of the
  recipe, which is `refined` where it names none: on the calibration data, before training. *Soft* goes on from what is
  refined with the paper's matrices; *frozen at its start* are the same matrices never updated, so that what soft does
  better than that, training has taught it.
- *One shot* rows were never trained, and stand in no difference and no chart: padst's own start (saliency, assignment,
  refining, refit), and magnitude, Wanda and SparseGPT, layer by layer with the inputs of the already sparse model.
- Perplexities are averaged as logarithms."""


def _opening(study: StudyRecipe, cells: Sequence[CellFigures], failed: int, open_cells: int, command: str) -> str:
    seeds = ", ".join(map(str, study.seeds))
    lines = [
        "# Study",
        f"Made by `{command}`: {len(cells)} of {len(cells) + failed + open_cells} cells done, {failed} failed, "
        f"{open_cells} still to run. {study.steps} steps a run; seeds {seeds}; every cell is one `padst sparsify`, its "
        "recipe and report lie in `cells/`.",
    ]
    present = (*study.permutations, *study.controls, *study.one_shot)
    left_out = [_NAMES[name] for name in (*PERMUTATIONS, *CONTROLS, *ONE_SHOT) if name not in present]
    if left_out:
        lines.append(f"Not in this study: {', '.join(left_out)}.")
    if cells:
        hardware = ", ".join(sorted({cell.hardware for cell in cells}))
        lines.append(f"Hardware: {hardware}; {study.jobs} run(s) at once, so that times are those of shared cores.")
    return "\n\n".join(lines)


def _model(summary: ModelSummary, chart: str, written: Mapping[str | None, str | None]) -> str:
    """The section of a model; `written` is how the study's recipe spells the data that judges."""
    name = metric_name(summary.metric)
    rows = [("dense, as it came", "0", *_score_cells(summary, Interval(summary.dense, None, None, None, 1), False))]
    if summary.finetuned is not None:
        scores = _score_cells(summary, summary.finetuned)
        rows.append(("dense, fine-tuned as long", _value(summary.finetuned_kl), *scores))
    judges = {cell.eval_data for comparison in summary.comparisons for cell in comparison.cells}
    data = sorted(written.get(data) or data for data in judges)
    return "\n\n".join(
        [
            f"## {summary.model}",
            f"Judged on {', '.join(data)}.",
            f"![Held-out {name} against sparsity]({chart})",
            _table(("", "KL to dense", *_score_columns(summary)), rows),
        ]
    )


def _comparison(summary: ModelSummary, comparison: Comparison) -> str:
    rows = comparison.rows()
    contrasts = comparison.contrasts()
    parts = [
        f"### {summary.model} at sparsity {comparison.sparsity:g}",
        _headline(comparison, contrasts),
        _results_table(summary, rows),
        _contrast_table(summary, comparison, contrasts),
        _learning_table(rows, contrasts),
        _cost_table([row for row in rows if not row.one_shot]),
    ]
    return "\n\n".join(part for part in parts if part)


def _headline(comparison: Comparison, contrasts: Sequence[Contrast]) -> str:
    """One sentence a structure: learned against none and against the better control, and whether it kept its word."""
    lines = []
    fixed = {each.structure: each for each in contrasts if each.method == "assignment"}
    for each in contrasts:
        if each.method != "learned":
            continue
        verdict = _verdict(each, fixed.get(each.structure))
        control = f"unstructured ({_NAMES.get(comparison.control or '', comparison.control)})"
        lines.append(
            f"- **{each.structure}, learned**: KL {_difference(each.none_kl)} against no permutation, "
            f"{_difference(each.control_kl)} against {control}; gap closed {_share(each.gap)}.{verdict}"
        )
    return "\n".join(lines)


def _verdict(learned: Contrast, assignment: Contrast | None) -> str:
    """Whether learned, assignment and none stand in that order in the mean, and whether the gap stayed open."""
    said = ""
    if learned.assignment_kl is not None and assignment is not None and assignment.none_kl is not None:
        steps = {"learned": learned.assignment_kl.mean, "assignment": assignment.none_kl.mean}
        wrong = [name for name, difference in steps.items() if difference > 0.0]
        beaten = {"learned": "assignment", "assignment": "no permutation"}
        said += "".join(f" In the mean {name} is worse than {beaten[name]}." for name in wrong)
        said += "" if wrong else " In the mean learned is no worse than assignment, and that no worse than none."
    bound = _FAILED_UNDER.get(learned.structure)
    if learned.gap is not None and bound is not None and learned.gap < bound:
        said += f" Under {bound:g} of the gap: the method has failed here."
    return said


def _results_table(summary: ModelSummary, rows: Sequence[Row]) -> str:
    columns = ("structure", "method", "seeds", "KL to dense", *_score_columns(summary), "before training")
    cells = [
        (
            row.structure,
            _NAMES.get(row.method, row.method),
            str(row.score.count),
            _value(row.kl),
            *_score_cells(summary, row.score),
            _figure(_as_metric(summary, row.start.mean)),
        )
        for row in rows
    ]
    return _table(columns, cells)


def _contrast_table(summary: ModelSummary, comparison: Comparison, contrasts: Sequence[Contrast]) -> str:
    control = _NAMES.get(comparison.control or "", comparison.control)
    score = _score_columns(summary)[0]
    columns = (
        *("structure", "method", "KL − none", f"KL − unstructured ({control})"),
        *(f"{score} − none", f"{score} − unstructured", "gap closed"),
    )
    rows = [
        (
            each.structure,
            _NAMES.get(each.method, each.method),
            *map(_difference, (each.none_kl, each.control_kl, each.none_score, each.control_score)),
            _NOTHING if each.method == "none" else _share(each.gap),
        )
        for each in contrasts
    ]
    return _table(columns, rows) if rows else ""


def _learning_table(rows: Sequence[Row], contrasts: Sequence[Contrast]) -> str:
    """What learning moved, and what that was worth; empty where nothing was learned."""
    by_method = {(row.structure, row.method): row for row in rows}
    cells = [
        (
            each.structure,
            _NAMES.get(each.method, each.method),
            *(", ".join(map(str, counts)) for counts in (row.moved, row.moved_in_training)),
            _difference(each.assignment_kl),
            _difference(each.frozen_kl),
        )
        for each in contrasts
        if (row := by_method[each.structure, each.method]).moved
    ]
    columns = (
        "structure",
        "method",
        "entries moved (by seed)",
        "of these in training",
        "KL − assignment",
        "KL − frozen",
    )
    return _table(columns, cells) if cells else ""


def _cost_table(rows: Sequence[Row]) -> str:
    """Step time and memory of every trained method, beside the assignment of its structure: the cost of learning."""
    base = {row.structure: row for row in rows if row.method == "assignment"}
    cells = []
    for row in rows:
        beside = base.get(row.structure)
        cells.append(
            (
                row.structure,
                _NAMES.get(row.method, row.method),
                _cost(row.step_seconds, beside.step_seconds if beside else None, 1e3, "ms"),
                _cost(row.soft_step_seconds, beside.step_seconds if beside else None, 1e3, "ms"),
                _cost(row.peak_bytes, beside.peak_bytes if beside else None, 1e-6, "MB"),
            )
        )
    columns = ("structure", "method", "a step (× assignment)", "a step while soft", "peak memory")
    return _table(columns, cells) if cells else ""


def _cost(own: Interval | None, base: Interval | None, scale: float, unit: str) -> str:
    if own is None:
        return _NOTHING
    ratio = f" (× {own.mean / base.mean:.2f})" if base is not None and base.mean else ""
    return f"{scale * own.mean:.0f} {unit}{ratio}"


def _score_columns(summary: ModelSummary) -> tuple[str, ...]:
    name = metric_name(summary.metric)
    return (f"log {name}", name) if summary.metric.endswith("perplexity") else (name,)


def _score_cells(summary: ModelSummary, score: Interval, spread: bool = True) -> tuple[str, ...]:
    shown = _value(score) if spread else _figure(score.mean)
    return (shown, _figure(math.exp(score.mean))) if summary.metric.endswith("perplexity") else (shown,)


def _as_metric(summary: ModelSummary, score: float) -> float:
    return math.exp(score) if summary.metric.endswith("perplexity") else score


def _value(found: Interval | None) -> str:
    if found is None:
        return _NOTHING
    return _figure(found.mean) + (f" ± {_figure(found.half)}" if found.half is not None else "")


def _difference(found: Interval | None) -> str:
    if found is None:
        return _NOTHING
    if found.low is None or found.high is None:
        return f"{found.mean:+.4g} (one seed)"
    text = f"{found.mean:+.4g} [{found.low:+.3g}, {found.high:+.3g}]"
    return text if found.low <= 0.0 <= found.high else f"**{text}**"


def _share(gap: float | None) -> str:
    return "not told" if gap is None else f"{gap:.2f}"


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
