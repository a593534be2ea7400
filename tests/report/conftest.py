"""A made-up run with everything a report can show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from padst_cli.permutation.apply import from_structure, random_permutation
from padst_cli.recipe import Recipe
from padst_cli.report import LayerRow, ReportData, Support
from padst_cli.structures import StructureOptions, structure_class

SampleRun = Callable[..., ReportData]


def sample_result(structure: str, layers: int, steps: int, control: bool) -> dict[str, Any]:
    """Figures as `padst sparsify --json` prints them."""
    soft = layers if steps and structure != "unstructured" else 0
    return {
        "output": "out",
        "task": "causal-lm",
        "structure": structure,
        "sparsity_requested": 0.9,
        "sparsity_achieved": 0.9004,
        "whole_model_density": 0.38,
        "layers": layers,
        "steps": steps,
        "seconds": 134.2,
        "tokens_or_images_seen": steps * 2048,
        "metric": {
            "name": "perplexity",
            "dense": 17.02,
            "dense_finetuned": 16.41 if control else None,
            "initial": 161.3,
            "final": 21.37 if steps else 161.3,
        },
        "kl_to_dense": 0.312,
        "permutations": {
            "learned": soft,
            "hardened_by_penalty": soft // 2,
            "hardened_at_deadline": soft - soft // 2,
            "moved_from_start": 37 * (soft // 2),
        },
        "dense_bytes": 14_720_512,
        "packed_bytes": 3_214_080,
        "environment": {},
    }


def sample_events(names: list[str], steps: int, control: bool, soft: bool) -> list[dict[str, Any]]:
    """Lines of a log.jsonl in the order in which a run writes them."""
    events: list[dict[str, Any]] = [
        {"event": "PhaseStarted", "phase": "evaluate dense", "total": None},
        {"event": "Evaluated", "step": 0, "metric": "perplexity", "value": 17.02, "phase": "dense"},
        {"event": "Evaluated", "step": 0, "metric": "perplexity", "value": 161.3, "phase": "initial"},
    ]
    if not steps:
        return [*events, {**events[-1], "phase": "final"}]
    for step in range(1, steps + 1):
        share = step / steps
        for index, name in enumerate(names if soft else []):
            by_penalty = index % 2 == 0
            hard_at = hardens_at(index, len(names), steps)
            if step == hard_at:
                cause = "penalty" if by_penalty else "deadline"
                events.append(
                    {
                        "event": "Hardened",
                        "step": step,
                        "layer": name,
                        "penalty": 0.219,
                        "cause": cause,
                        "moved": 37 if by_penalty else 0,
                    }
                )
        if step % 25 == 0 and share <= 0.75:
            fraction = 0.1 * (1 + math.cos(math.pi * share / 0.75))
            moved = {name: int(fraction * 5000) for name in names}
            events.append({"event": "SupportUpdated", "step": step, "fraction": fraction, "moved": moved})
        if step % 50 == 0 and step < steps:
            value = 17 + 140 * math.exp(-6 * share)
            events.append(
                {"event": "Evaluated", "step": step, "metric": "perplexity", "value": value, "phase": "during"}
            )
        if step % 5 == 0 or step == steps:
            events.append(_step(step, steps, names if soft else [], False))
    events.append({"event": "Evaluated", "step": steps, "metric": "perplexity", "value": 21.37, "phase": "final"})
    if control:
        events.append({"event": "PhaseStarted", "phase": "dense control", "total": steps})
        events += [_step(step, steps, names, True) for step in range(5, steps + 1, 5)]
        last = {"event": "Evaluated", "step": steps, "metric": "perplexity", "value": 16.41, "phase": "dense_finetuned"}
        events.append(last)
    return events


def hardens_at(index: int, count: int, steps: int) -> int:
    """Every other layer hardens by itself, the rest at the deadline."""
    return int((0.12 + 0.16 * index / count) * steps) if index % 2 == 0 else int(0.3 * steps)


def _step(step: int, steps: int, names: list[str], control: bool) -> dict[str, Any]:
    share = step / steps
    noise = 0.05 * math.sin(step * 1.7)
    task = 2.75 + noise if control else 2.9 + 2.1 * math.exp(-7 * share) + noise
    distill = 0.3 + 2.4 * math.exp(-6 * share) + noise / 2
    soft = {} if control else {name: index for index, name in enumerate(names)}
    hard_at = {name: hardens_at(index, len(names), steps) for name, index in soft.items()}
    return {
        "event": "Step",
        "step": step,
        "steps": steps,
        "loss": task if control else 0.5 * task + 0.5 * distill,
        "learning_rate": 1e-3 * min(1, share / 0.05) * 0.5 * (1 + math.cos(math.pi * share)),
        "hardened": 0,
        "layers": len(names),
        "seconds": 0.4,
        "items_seen": step * 2048,
        "terms": {"task": task} if control else {"task": task, "distill": distill},
        "penalties": {name: 0.62 - 0.4 * step / at for name, at in hard_at.items() if step < at},
        "control": control,
    }


@pytest.fixture(scope="session")
def sample_run() -> SampleRun:
    """Make the `ReportData` of a made-up run: `blocks` x 4 layers of a GPT-2 of `width`."""

    def make(
        structure: str = "diag", blocks: int = 2, width: int = 64, steps: int = 200, control: bool = True
    ) -> ReportData:
        shapes = {
            "attn.c_attn": (3 * width, width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }
        generator = torch.Generator().manual_seed(0)
        rows, supports = [], {}
        for block in range(blocks):
            for part, (out_features, in_features) in shapes.items():
                name = f"transformer.h.{block}.{part}"
                spec = structure_class(structure).for_density(out_features, in_features, 0.1, StructureOptions())
                side = "input" if out_features >= in_features else "output"
                sides = () if structure == "unstructured" else (side,)
                error = 0.25 + 0.3 * torch.rand((), generator=generator).item()
                rows.append(LayerRow(name, spec, sides, min(0.95, 1.6 * error), error, 0.31))
                mask = spec.project(torch.rand(out_features, in_features, generator=generator))
                perm_in = random_permutation(in_features, generator) if sides == ("input",) else None
                perm_out = random_permutation(out_features, generator) if sides == ("output",) else None
                supports[name] = Support.from_masks(mask, from_structure(mask, perm_in, perm_out))
        names = [row.name for row in rows]
        return ReportData(
            model="gpt2",
            result=sample_result(structure, len(rows), steps, control),
            events=sample_events(names, steps, control, structure != "unstructured"),
            layers=rows,
            recipe_yaml=Recipe(structure=structure).to_yaml(),  # type: ignore[arg-type]
            command="padst sparsify gpt2 --structure diag --sparsity 0.9 --dense-control",
            supports=supports,
            environment={"hardware": "a processor, 2 CPU cores", "torch": "2.13.0", "mixed_precision": "no"},
        )

    return make
