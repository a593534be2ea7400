"""`padst bench` on a config: its flags, its JSON, its chart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from padst_cli import bench as bench_package
from padst_cli.app import app
from padst_cli.stopwatch import Timing
from tests import models

QUICK = Timing(repeats=1, run_seconds=1e-4, rotate_bytes=2**16, max_copies=2)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of a tiny GPT-2's config."""
    defaults = bench_package.bench.__kwdefaults__
    monkeypatch.setitem(defaults, "timing", QUICK)
    models.config("gpt2", hidden_size=64, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(*arguments: str) -> dict[str, object]:
    done = CliRunner().invoke(app, ["bench", *arguments, "--random-weights", "--json", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_targets_and_ignore_choose_the_layers(config: str) -> None:
    few = ("--layers-only", "--tokens", "1")
    names = {layer["name"] for layer in run(config, *few)["layers"]}
    attention = {layer["name"] for layer in run(config, *few, "--targets", "attn")["layers"]}
    rest = {layer["name"] for layer in run(config, *few, "--ignore", "attn")["layers"]}
    assert attention == {name for name in names if ".attn." in name} != set()
    assert rest == names - attention


def test_a_chart_is_written(config: str, tmp_path: Path) -> None:
    chart = tmp_path / "speed.svg"
    run(config, "--layers-only", "--tokens", "1,4", "--chart", str(chart))
    assert chart.read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')


def test_charts_elsewhere_are_refused_before_anything_is_measured(config: str, tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    for name in ("speed.png", "no-folder/speed.svg", "folder.svg"):
        done = CliRunner().invoke(app, ["bench", config, "--random-weights", "--chart", str(tmp_path / name)])
        assert done.exit_code == 2
        assert "--chart" in done.output


def test_the_tables_on_screen(config: str) -> None:
    done = CliRunner().invoke(
        app,
        ["bench", config, "--random-weights", "--tokens", "1", "--break-even", "--device", "cpu"],
        env={"COLUMNS": "200"},
    )
    assert done.exit_code == 0, done.output
    for words in ("of the limit", "resident", "speed-up", "density at which dense is as fast", "decode"):
        assert words in done.output
