"""`report.html`: one page with everything a run measured, readable on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from padst_cli.checkpoint.model_card import (
    ITEMS,
    STRUCTURE_NAMES,
    duration,
    figure,
    metric_name,
    short_name,
    size,
    verdict,
)
from padst_cli.checkpoint.writer import write_atomically
from padst_cli.report import charts
from padst_cli.report.history import Hardening, History, history, layer_of
from padst_cli.report.supports import Support, data_url
from padst_cli.structures.base import Structure

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class LayerRow:
    """One sparse layer of the run: its structure, the sides that are permuted, and the errors of its start.

    `error_mask` and `error` are relative output errors before and after the refit (NaN or None where not measured),
    `kept` the share of the saliency on the support. `shared_with` is the layer whose input permutation it has.
    """

    name: str
    structure: Structure
    sides: tuple[str, ...] = ()
    error_mask: float | None = None
    error: float | None = None
    kept: float | None = None
    shared_with: str | None = None


@dataclass(frozen=True)
class ReportData:
    """What the report is made of.

    `result` is the JSON of `padst sparsify`, `events` the lines of `log.jsonl`, `supports` pictures by layer name (any
    subset), `environment` hardware and versions.
    """

    model: str
    result: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    layers: Sequence[LayerRow]
    recipe_yaml: str
    command: str
    supports: Mapping[str, Support] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def write_report(path: Path, data: ReportData) -> None:
    """Write the page to `path`, whole or not at all; the same data gives the same bytes."""
    write_atomically(path, render(data))


def render(data: ReportData) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("padst_cli.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    curves = history(data.events)
    sparsity = _percent(data.result["sparsity_requested"])
    return environment.get_template(TEMPLATE).render(
        title=f"{short_name(data.model)}: {data.result['structure']}, {sparsity} sparse",
        verdict=verdict(data.result),
        structure=STRUCTURE_NAMES[data.result["structure"]],
        steps=data.result["steps"],
        control=bool(curves.control_loss or len(curves.control_metric) > 1),
        cards=_cards(data),
        quality=_quality(data),
        cost=_cost(data),
        charts=_charts(data, curves),
        hardenings=curves.hardenings,
        permutations=_permutations(data, curves),
        layers=_layers(data, curves),
        pictures=_pictures(data),
        recipe=data.recipe_yaml.strip(),
        command=data.command,
        environment={key.replace("_", " "): value for key, value in data.environment.items()},
    )


def _cards(data: ReportData) -> list[tuple[str, str, str]]:
    result, metric = data.result, data.result["metric"]
    smaller = f"of {size(result['dense_bytes'])} dense"
    if result["structure"] != "unstructured":
        smaller += f", {result['dense_bytes'] / result['packed_bytes']:.1f} times smaller"
    packed = "none" if result["structure"] == "unstructured" else size(result["packed_bytes"])
    return [
        (metric_name(metric["name"]), figure(metric["final"]), f"dense: {figure(metric['dense'])}"),
        (
            "sparsity",
            _percent(result["sparsity_achieved"]),
            f"{result['layers']} layers; {_percent(result['whole_model_density'])} of the whole model left",
        ),
        ("packed size", packed, smaller),
        ("run", duration(result["seconds"]), f"{result['steps']:,} steps"),
    ]


def _quality(data: ReportData) -> list[tuple[str, str]]:
    result, metric = data.result, data.result["metric"]
    name = metric_name(metric["name"])
    tuned = metric.get("dense_finetuned")
    rows = [
        (f"{name}, dense as it came", figure(metric["dense"])),
        (f"{name}, dense fine-tuned as long (control)", "not run" if tuned is None else figure(tuned)),
        (f"{name}, sparse before training", figure(metric["initial"])),
        (f"{name}, sparse final", figure(metric["final"])),
    ]
    if result.get("kl_to_dense") is not None:
        rows.append(("KL divergence from the dense model, nats", figure(result["kl_to_dense"])))
    return rows


def _cost(data: ReportData) -> list[tuple[str, str]]:
    result = data.result
    unstructured = result["structure"] == "unstructured"
    return [
        ("sparsity of the sparse layers, requested", f"{result['sparsity_requested']:.4f}"),
        ("sparsity of the sparse layers, achieved", f"{result['sparsity_achieved']:.4f}"),
        ("density of the whole model", f"{result['whole_model_density']:.4f}"),
        ("whole model, dense", size(result["dense_bytes"])),
        ("whole model, packed", "no packed form" if unstructured else size(result["packed_bytes"])),
        ("optimizer steps", f"{result['steps']:,}"),
        (
            f"{ITEMS.get(result['task'], 'tokens or images')} seen in training",
            f"{result['tokens_or_images_seen']:,}",
        ),
        ("time of the run", duration(result["seconds"])),
    ]


def _charts(data: ReportData, curves: History) -> dict[str, str | None]:
    nonzeros = sum(row.structure.nonzeros for row in data.layers)
    delta = (yaml.safe_load(data.recipe_yaml) or {}).get("permutation", {}).get("delta")
    return {
        "loss": charts.loss_chart(curves),
        "metric": charts.metric_chart(curves, data.result["metric"]["name"]),
        "rate": charts.learning_rate_chart(curves),
        "movement": charts.movement_chart(curves, nonzeros),
        "penalty": charts.penalty_chart(curves, delta, [row.name for row in data.layers]),
        "layers": charts.layers_chart(
            short_names([row.name for row in data.layers]),
            [row.structure.density for row in data.layers],
            [(_finite(row.error_mask), _finite(row.error)) for row in data.layers],
            1.0 - data.result["sparsity_requested"],
        ),
    }


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without the leading parts that all of them share (`transformer.h.`)."""
    split = [name.split(".") for name in names]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [".".join(parts[shared:]) for parts in split]


def _permutations(data: ReportData, curves: History) -> list[tuple[str, str]]:
    if not any(row.sides for row in data.layers):
        return []
    counts = data.result["permutations"]
    rows = [("layers with a permutation", str(sum(bool(row.sides) for row in data.layers)))]
    before = counts.get("learned_before_training", 0)
    shown = {**counts, "hardened_at_deadline": counts["hardened_at_deadline"] - before}
    if before == counts["learned"]:
        shown = {key: value for key, value in shown.items() if not key.startswith("hardened")}
    rows += [(key.replace("_", " "), f"{value:,}") for key, value in shown.items()]
    if curves.hardenings:
        entries = sum(_length(data, done) for done in curves.hardenings)
        moved = sum(done.moved for done in curves.hardenings)
        share = f"{moved:,} of {entries:,} ({100 * moved / entries:.1f} %)" if entries else f"{moved:,}"
        unmoved = sum(done.moved == 0 for done in curves.hardenings)
        rows = [row for row in rows if row[0] != "moved from start"]
        rows.append(("entries that moved from the assignment", share))
        rows.append(("permutations in which no entry moved", str(unmoved)))
    return rows


def _length(data: ReportData, done: Hardening) -> int:
    row = next((row for row in data.layers if row.name == layer_of(done.label)), None)
    if row is None:
        return 0
    side = done.label.rpartition(":")[2] if done.label != row.name else row.sides[0]
    return row.structure.in_features if side == "input" else row.structure.out_features


def _layers(data: ReportData, curves: History) -> list[dict[str, str]]:
    shown = []
    for row in data.layers:
        done = [hardening for hardening in curves.hardenings if layer_of(hardening.label) == row.name]
        shown.append(
            {
                "name": row.name,
                "shape": f"{row.structure.out_features} × {row.structure.in_features}",
                "parameters": ", ".join(
                    f"{key.replace('_', ' ')} {value}" for key, value in row.structure.parameters().items()
                ),
                "density": f"{row.structure.density:.4f}",
                "kept": _cell(row.kept),
                "error_mask": _cell(row.error_mask),
                "error": _cell(row.error),
                "sides": (" and ".join(row.sides) or "–") + (f", as {row.shared_with}" if row.shared_with else ""),
                "moved": f"{sum(hardening.moved for hardening in done):,}" if done else "–",
                "hardened": ", ".join(f"{hardening.step} ({hardening.cause})" for hardening in done) or "–",
            }
        )
    return shown


def _parameters(structure: Structure) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in structure.parameters().items())


def _pictures(data: ReportData) -> list[dict[str, Any]]:
    names = [row.name for row in data.layers if row.name in data.supports]
    return [
        {
            "name": short,
            "before": data_url(data.supports[name].before),
            "after": data_url(data.supports[name].after),
            "permuted": data.supports[name].before != data.supports[name].after,
            "width": data.supports[name].width,
            "height": data.supports[name].height,
        }
        for name, short in zip(names, short_names(names), strict=True)
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _cell(value: float | None) -> str:
    return f"{value:.3f}" if value is not None and math.isfinite(value) else "–"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
