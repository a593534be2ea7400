"""Logged events into curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from padst_cli.errors import PadstError
from padst_cli.events import Evaluated, Hardened, Step, SupportUpdated
from padst_cli.report import read_log
from padst_cli.report.history import MOST_POINTS, history, layer_of, thin


def _step(step: int, control: bool = False, **more: object) -> dict[str, object]:
    event = Step(
        step, 10, 2.0 / step, 1e-3, 0, 1, 0.1, step, terms={"task": 3.0 / step, "distill": 1.0}, control=control
    )
    return {**event.to_json(), **more}


def test_curves_come_from_the_events_that_padst_logs() -> None:
    curves = history(
        [
            Evaluated(0, "perplexity", 9.0, "dense").to_json(),
            Evaluated(0, "perplexity", 90.0, "initial").to_json(),
            _step(1, penalties={"a": 0.5, "b:input": 0.6}),
            _step(2, penalties={"a": 0.4, "b:input": 0.5}),
            Hardened(3, "a", 0.2, "penalty", 7).to_json(),
            SupportUpdated(4, 0.2, {"a": 3, "b": 4}, 0.1).to_json(),
            Evaluated(5, "perplexity", 20.0, "during").to_json(),
            _step(4, penalties={"b:input": 0.4}),
            Evaluated(10, "perplexity", 12.0, "final").to_json(),
            _step(10, control=True, terms={"task": 0.2}),
            Evaluated(10, "perplexity", 8.0, "dense_finetuned").to_json(),
        ]
    )
    assert curves.loss == ((1, 2.0), (2, 1.0), (4, 0.5))
    assert curves.task_loss == ((1, 3.0), (2, 1.5), (4, 0.75))
    assert curves.control_loss == ((10, 0.2),)
    assert curves.metric == ((0, 90.0), (5, 20.0), (10, 12.0))
    assert curves.control_metric == ((0, 9.0), (10, 8.0))
    assert curves.dense_metric == 9.0
    assert curves.penalties == {"a": ((1, 0.5), (2, 0.4), (3, 0.2)), "b:input": ((1, 0.6), (2, 0.5), (4, 0.4))}
    assert curves.moved == ((4, 7),)
    assert [(done.step, done.cause, done.moved) for done in curves.hardenings] == [(3, "penalty", 7)]


def test_what_was_an_index_all_along_has_no_penalty() -> None:
    curves = history([_step(1), Hardened(9, "a", 0.0, "deadline", 7).to_json(), _step(10)])
    assert curves.penalties == {}
    assert [(done.step, done.moved) for done in curves.hardenings] == [(9, 7)]


def test_a_loss_of_one_part_has_no_second_curve() -> None:
    assert history([_step(1, terms={"task": 1.0})]).task_loss == ()


def test_thinning_keeps_the_ends_and_drops_what_is_not_finite() -> None:
    points = [(step, float(step)) for step in range(10 * MOST_POINTS + 3)]
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 1
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert thin([(0, 1.0), (1, float("nan")), (2, float("inf")), (3, None)]) == ((0, 1.0),)
    assert thin([]) == ()


def test_layer_of_a_label() -> None:
    assert layer_of("h.0.mlp") == "h.0.mlp"
    assert layer_of("h.0.mlp:output") == "h.0.mlp"


def test_read_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(_step(1)) + "\n" + json.dumps(_step(2)) + "\n", encoding="utf-8")
    assert [event["step"] for event in read_log(path)] == [1, 2]
    path.write_text(json.dumps(_step(1)) + "\n{", encoding="utf-8")
    with pytest.raises(PadstError, match="line 2"):
        read_log(path)
