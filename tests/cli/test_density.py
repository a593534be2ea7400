"""A run that begins dense: the plan says it, the log records it, and what comes out packs like any other."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Padst

FLAGS = ("--structure", "diag", "--sparsity", 0.75, "--start-density", 1.0, "--density-until", 0.6, "--steps", 5)


def test_the_plan_says_how_the_density_falls(padst: Padst, gpt2: Path) -> None:
    found = padst.json("plan", gpt2, *FLAGS)
    assert (found["start_density"], found["narrowed_after"], found["sparsity_achieved"]) == (1.0, 3, 0.75)
    plain = padst.json("plan", gpt2)
    assert (plain["start_density"], plain["narrowed_after"]) == (None, None)
    assert "not above the target density" in padst.error("plan", gpt2, "--sparsity", 0.5, "--start-density", 0.4)


def test_end_to_end(padst: Padst, gpt2: Path, train_text: Path, heldout_text: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "packed"
    data = ("--data", train_text, "--eval-data", heldout_text, "--batch-size", 4, "--max-seq-length", 32)
    found = padst.json("sparsify", gpt2, *FLAGS, *data, "--permutation", "assignment", "--output", folder)
    assert found["sparsity_achieved"] == 0.75
    assert abs(found["metric"]["initial"] / found["metric"]["dense"] - 1.0) < 0.02, "it begins as the dense model"
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(event["step"], event["density"]) for event in events if event["event"] == "SupportUpdated"] == [(4, 0.25)]
    assert padst.json("export", folder, "--output", out)["max_abs_logit_error"] <= 1e-4
