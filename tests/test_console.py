"""The output sink: what goes to stdout, what to stderr, and in what form."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import rich.console

from padst_cli import console as module
from padst_cli.console import Console, Figures, LiveProgress, PlainProgress, to_json
from padst_cli.errors import PadstError
from padst_cli.events import (
    CalibrationProgress,
    Evaluated,
    Hardened,
    Message,
    PhaseStarted,
    Saved,
    Step,
    SupportUpdated,
)


@dataclass(frozen=True)
class _Result:
    output: Path
    value: float
    layers: list[dict[str, float]]
    other: float | None = None


RESULT = _Result(Path("out"), float("nan"), [{"density": 0.1, "error": float("inf")}])


def test_what_was_hard_from_the_first_step_on_is_not_counted() -> None:
    figures = Figures()
    figures.take(replace(_step(1), hardened=16))
    assert figures.text == "loss 3.250"
    figures.take(_step(2))
    figures.take(replace(_step(3), hardened=16))
    assert figures.text == "loss 3.250  16/16 hardened", "but where some were not, the end is shown"


def _step(step: int, steps: int = 100, **more: Any) -> Step:
    return Step(step, steps, 3.25, 1e-3, hardened=5, layers=16, seconds=0.1, items_seen=step, **more)


def test_json_is_one_strict_object_and_all_else_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json=True)
    with console.progress() as on_event:
        on_event(PhaseStarted("train", 100))
        on_event(_step(1))
    console.message("a word")
    console.table("title", ("a",), [("1",)])
    console.result(RESULT, render=lambda: pytest.fail("JSON is not rendered"))
    out, err = capsys.readouterr()
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found == {"output": "out", "value": None, "layers": [{"density": 0.1, "error": None}], "other": None}
    for words in ("train", "a word", "title"):
        assert words in err


def test_of_several_processes_the_first_alone_prints_results(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        for as_json in (True, False):
            console = Console(json=as_json)
            console.result({"a": 1}, render=lambda console=console: console.table("", ("a",), [("1",)]))
            console.error(PadstError("wrong"))
            captured = capsys.readouterr()
            assert bool(captured.out) == bool(lines)
            assert "wrong" in captured.err
    monkeypatch.setenv("WORLD_SIZE", "1")
    Console(json=True).result({"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_streams_that_cannot_hold_every_character() -> None:
    code = """
from padst_cli.console import Console
from padst_cli.errors import PadstError
for as_json in (True, False):
    console = Console(json=as_json)
    console.result({"model": "m\u00f6 d\u00e9l"}, render=lambda: console.table("m\u00f6", ("n",), [("d\u00e9l",)]))
    console.message("m\u00f6")
    console.error(PadstError("m\u00f6"))
"""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split(b"}")[:2]
    assert json.loads(first + b"}") == {"model": "m\u00f6 d\u00e9l"}
    assert b"error" in second
    assert b"m?" in done.stdout
    assert b"m?" in done.stderr


def test_human_result_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    Console().result(RESULT)
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines() if "value" in line] == [["value", "-"]]
    assert err == ""
    called = []
    Console().result(RESULT, render=lambda: called.append(True))
    assert called == [True]
    assert capsys.readouterr().out == ""


def test_quiet_says_nothing_but_results_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    with console.progress() as on_event:
        for event in (PhaseStarted("train", 2), _step(1), Message("hello")):
            on_event(event)
    console.message("hello")
    assert capsys.readouterr() == ("", "")
    console.table("", ("a",), [("1",)])
    console.error(PadstError("wrong"))
    out, err = capsys.readouterr()
    assert "1" in out
    assert err == "error: wrong\n"
    Console(json=True, quiet=True).table("", ("a",), [("1",)])
    assert capsys.readouterr() == ("", "")


def test_an_error_is_one_unbroken_line_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "unknown key [bold]x[/bold] " + "very " * 80 + "long :smile:"
    Console().error(PadstError(sentence))
    assert capsys.readouterr().err == f"error: {sentence}\n"
    Console().message(sentence)
    assert capsys.readouterr().err == f"{sentence}\n"


def test_table_keeps_long_names_whole_and_sets_numbers_right(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.language_model.layers.11.self_attn.very_long_name_of_a_projection.q_proj"
    Console().table("[layers]", ("layer", "us", "note"), [(name, "12.5", "a"), ("b", "3", "[x]")])
    out = capsys.readouterr().out
    assert name in out
    assert "[layers]" in out
    assert "[x]" in out
    first, second = (line for line in out.splitlines() if "12.5" in line or "[x]" in line)
    assert first.index("12.5") + 4 == second.index("3") + 1


@pytest.mark.parametrize("value", [object(), {"a": {1, 2}}, {"a": b"x"}])
def test_what_has_no_json_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        to_json(value)


def test_to_json_prefers_what_the_object_says() -> None:
    class Own:
        def to_json(self) -> dict[str, object]:
            return {"a": (1, 2.5, True, None), "b": float("-inf")}

    assert to_json(Own()) == {"a": [1, 2.5, True, None], "b": None}
    with pytest.raises(TypeError):
        to_json([1])


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_speaks_now_and_then() -> None:
    said: list[str] = []
    clock = _Clock()
    progress = PlainProgress(said.append, clock)
    progress(PhaseStarted("calibrate", 2))
    progress(CalibrationProgress("a", 1, 2, 0.5, 0.25))
    progress(CalibrationProgress("b", 2, 2, 0.4, 0.2))
    progress(PhaseStarted("train", 100))
    for step in range(1, 101):
        clock.now += 1.0
        progress(_step(step))
    assert said[:3] == ["calibrate", "calibrate 1/2  error 0.500 -> 0.250 after refit", said[2]]
    assert said[2].startswith("calibrate 2/2  error 0.400 -> 0.200")
    steps = [line for line in said if line.startswith("train ")]
    assert 9 <= len(steps) <= 12, "a line every ten seconds"
    assert steps[-1] == "train 100/100  loss 3.250  5/16 hardened"
    assert steps[5].endswith("0:50 left") or "left" in steps[5]


def test_plain_progress_shows_every_event() -> None:
    said: list[str] = []
    progress = PlainProgress(said.append, _Clock())
    progress(PhaseStarted("train", 100))
    for event in (
        Message("words"),
        SupportUpdated(3, 0.2, {"a": 4, "b": 6}, 0.1),
        Hardened(3, "a", 0.2, "penalty", 4),
        Saved(3, "out/state"),
        Evaluated(3, "perplexity", 21.345, "dense_finetuned"),
    ):
        progress(event)
    progress(_step(4))
    assert said == [
        "train",
        "words",
        "perplexity 21.34 (dense finetuned, step 3)",
        "train 4/100  10 weights moved  saved at 3  perplexity 21.34  loss 3.250  5/16 hardened",
    ]


def test_resumed_phase_is_told_though_nobody_started_it() -> None:
    said: list[str] = []
    progress = PlainProgress(said.append, _Clock())
    progress(_step(60))
    progress(_step(61, control=True))
    assert [line.split("  ")[0] for line in said] == ["train 60/100", "dense control 61/100"]


def test_live_progress_keeps_a_line_a_phase() -> None:
    screen = io.StringIO()
    with module._columns(rich.console.Console(file=screen, force_terminal=True, width=160)) as display:
        live = LiveProgress(display)
        live(PhaseStarted("calibrate", 2))
        live(CalibrationProgress("a", 1, 2, 0.5, 0.25))
        live(PhaseStarted("evaluate dense"))
        live(Evaluated(0, "perplexity", 17.0, "dense"))
        live(PhaseStarted("train", 100))
        live(Message("a word [with] brackets"))
        live(_step(40))
        live(Hardened(40, "a", 0.2, "deadline", 4))
        live.close()
        tasks = display.tasks
    assert [(task.description, task.completed, task.total) for task in tasks] == [
        ("calibrate", 2, 2),
        ("evaluate dense", 1, 1),
        ("train", 100, 100),
    ]
    assert [task.fields["figures"] for task in tasks] == [
        "error 0.500 -> 0.250 after refit",
        "perplexity 17",
        "loss 3.250  5/16 hardened",
    ]
    assert "a word [with] brackets" in screen.getvalue()


def test_a_terminal_gets_the_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(Console, "_stderr", lambda _: console)
    with Console().progress() as on_event:
        assert isinstance(on_event, LiveProgress)
        on_event(_step(3))
    assert "hardened" in screen.getvalue()


def test_importing_the_console_does_not_import_rich() -> None:
    import subprocess

    code = "import sys; import padst_cli.console; assert not any(m.split('.')[0] == 'rich' for m in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
@pytest.mark.parametrize("as_json", [True, False])
def test_a_full_disk_behind_stdout_is_one_sentence(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        console = Console(json=as_json)
        with pytest.raises(PadstError, match="cannot be printed: no space left on device; free some, or send stdout"):
            console.result({"layers": 3})
        console.error(PadstError("said on stderr, too"))
