"""Runs that are stopped: by Ctrl-C, by a kill at any moment; what resumes ends with the same weights."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors import SafetensorError

from padst_cli import quickstart
from padst_cli.checkpoint.run_folder import RunFolder
from padst_cli.pipeline import exporting, run
from tests.cli.conftest import Padst

STEPS = 30


def arguments(gpt2: Path, train_text: Path, heldout_text: Path, output: Path) -> list[str]:
    flags = {
        "structure": "diag",
        "sparsity": 0.5,
        "steps": STEPS,
        "batch-size": 4,
        "max-seq-length": 32,
        "save-every": 5,
        "data": train_text,
        "eval-data": heldout_text,
        "output": output,
    }
    return ["sparsify", str(gpt2), *(str(part) for key, value in flags.items() for part in (f"--{key}", value))]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "padst_cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_for_state(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until the first training state is whole on disk."""
    log = folder / "log.jsonl"
    for _ in range(1200):
        if log.is_file() and '"Saved"' in log.read_text():
            return
        if process.poll() is not None:
            pytest.fail(f"the run ended early: {process.communicate()}")
        time.sleep(0.05)
    pytest.fail("no state was saved")


@pytest.fixture(scope="module")
def uninterrupted(gpt2: Path, train_text: Path, heldout_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(arguments(gpt2, train_text, heldout_text, folder))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_resumed_run_ends_with_the_same_weights(
    gpt2: Path, train_text: Path, heldout_text: Path, uninterrupted: Path, tmp_path: Path, how: signal.Signals
) -> None:
    folder = tmp_path / "run"
    command = arguments(gpt2, train_text, heldout_text, folder)
    process = start(command)
    wait_for_state(folder, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert process.returncode == 130, errors
        assert "--resume" in errors
    assert not (folder / "config.json").exists(), "an unfinished folder must not look whole"

    resumed = start([*command, "--resume"])
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert (folder / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
    assert not (folder / "state").exists()


def test_a_second_run_is_kept_out_of_the_folder_where_one_is_at_work(
    padst: Padst, gpt2: Path, train_text: Path, heldout_text: Path, sparsified: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = arguments(gpt2, train_text, heldout_text, folder)
    process = start(command)
    wait_for_state(folder, process)
    process.send_signal(signal.SIGSTOP)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    export = ("export", sparsified("diag"), "--output", folder)
    for second in (command, [*command, "--resume"], [*command, "--overwrite"], export, [*export, "--overwrite"]):
        said = padst.error(*second)
        assert f"another process is at work in '{folder}'; wait for it or stop it, or name another folder" in said
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    process.kill()
    process.communicate(timeout=60)
    assert "exists; --resume goes on" in padst.error(*command), "who is gone keeps nobody out"


def test_a_run_that_came_and_went_meanwhile_is_not_overwritten(
    padst: Padst, gpt2: Path, train_text: Path, heldout_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    check_heldout = run._check_heldout

    def check(*given: Any) -> None:
        check_heldout(*given)
        RunFolder(folder).begin("structure: nm\n")

    monkeypatch.setattr(run, "_check_heldout", check)
    said = padst.error(*arguments(gpt2, train_text, heldout_text, folder))
    assert f"output '{folder}' exists; --resume goes on" in said
    assert (folder / "recipe.yaml").read_text() == "structure: nm\n"


def test_resume_refuses_another_recipe(
    padst: Padst, gpt2: Path, train_text: Path, heldout_text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = arguments(gpt2, train_text, heldout_text, folder)
    process = start(command)
    wait_for_state(folder, process)
    process.kill()
    process.communicate(timeout=60)
    other = [part if part != "0.5" else "0.6" for part in command]
    assert "sparsity = 0.5, not 0.6" in padst.error(*other, "--resume")


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_stop_before_training_can_be_resumed_as_it_says(
    padst: Padst, gpt2: Path, train_text: Path, heldout_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(run, "initialise", stop)
        result = padst(*arguments(gpt2, train_text, heldout_text, folder), "--quiet")
    assert result.exit_code == 130
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"event": "Pha')  # as a kill may leave it
    again = f"padst sparsify {gpt2} --output {folder} --resume"
    assert result.output.splitlines() == [f"error: interrupted, the state is saved; go on with: {again}"]
    assert padst.json(*again.split()[1:])["steps"] == STEPS
    phases = [json.loads(line).get("phase") for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"calibrate", "train", "final"} <= set(phases)


@pytest.mark.parametrize("changed", ["training", "held-out"])
def test_resume_refuses_data_that_changed(
    padst: Padst,
    gpt2: Path,
    train_text: Path,
    heldout_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    texts = {"training": tmp_path / "train.txt", "held-out": tmp_path / "heldout.txt"}
    for copy, text in zip(texts.values(), (train_text, heldout_text), strict=True):
        copy.write_text(text.read_text())
    folder = tmp_path / "run"
    command = arguments(gpt2, *texts.values(), folder)
    monkeypatch.setattr(run, "initialise", stop)
    assert padst(*command).exit_code == 130
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    whole = texts[changed].read_text()
    texts[changed].write_text(whole.replace("cat", "dog"))
    said = padst.error(*command, "--resume")
    assert f"the {changed} data '{texts[changed]}' changed since the run in '{folder}' began; put them back" in said
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    texts[changed].write_text(whole)
    assert padst(*command, "--resume").exit_code == 130, "it went on, as far as it goes here"


def test_a_run_of_a_version_without_digests_goes_on(
    padst: Padst, gpt2: Path, train_text: Path, heldout_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(gpt2, train_text, heldout_text, tmp_path / "run")
    monkeypatch.setattr(run, "initialise", stop)
    assert padst(*command).exit_code == 130
    progress = tmp_path / "run" / "state" / "progress.json"
    found = json.loads(progress.read_text())
    digests = found.pop("digests")
    progress.write_text(json.dumps(found))
    assert padst(*command, "--resume").exit_code == 130, "it went on, as far as it goes here"
    assert json.loads(progress.read_text())["digests"] == digests


@pytest.mark.parametrize("output", ["out", None])
def test_a_run_inside_the_folder_of_its_data_can_be_resumed(
    padst: Padst,
    gpt2: Path,
    train_text: Path,
    heldout_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str | None,
) -> None:
    (tmp_path / "train.txt").write_text(train_text.read_text())
    monkeypatch.chdir(tmp_path)
    command = arguments(gpt2, Path("."), heldout_text, Path("out"))
    if output is None:
        del command[command.index("--output") : command.index("--output") + 2]
    monkeypatch.setattr(run, "initialise", stop)
    said = padst(*command)
    assert said.exit_code == 130, said.output
    again = said.output.rpartition("go on with: padst ")[2].split()
    assert again[-3:] == ["--output", output or "tiny-gpt2-diag-0.5", "--resume"]
    assert padst(*again).exit_code == 130, "it went on, as far as it goes here"


@pytest.mark.parametrize("damage", [b"torn", None])
def test_a_damaged_start_is_said_and_can_be_removed(
    padst: Padst,
    gpt2: Path,
    train_text: Path,
    heldout_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: bytes | None,
) -> None:
    folder = tmp_path / "run"
    command = arguments(gpt2, train_text, heldout_text, folder)
    with monkeypatch.context() as patched:
        patched.setattr(run, "sparsify_modules", stop)
        assert padst(*command).exit_code == 130
    start = folder / "state" / "start.pt"
    if damage is None:
        torch.save({"another.layer": {}}, start)
    else:
        start.write_bytes(damage)
    said = padst.error(*command, "--resume")
    assert "start.pt' cannot be read" in said
    assert "remove it and resume" in said
    start.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(run, "sparsify_modules", stop)
        assert padst(*command, "--resume").exit_code == 130
    assert start.is_file(), "calibrated anew"


@pytest.mark.parametrize("late", ["rmtree", "wait"])
def test_a_stop_after_the_result_is_whole_says_so(
    padst: Padst,
    gpt2: Path,
    train_text: Path,
    heldout_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    late: str,
) -> None:
    folder = tmp_path / "run"

    def execute(*_: object) -> None:
        made = RunFolder(folder).state / "checkpoint"
        made.mkdir()
        (made / "config.json").write_text("{}")
        if late == "rmtree":
            monkeypatch.setattr(RunFolder, "drop_state", once(RunFolder.drop_state))
        RunFolder(folder).finish(made, {})
        stop()

    def once(then: Callable[[RunFolder], None]) -> Callable[[RunFolder], None]:
        def stopped(_: RunFolder) -> None:
            monkeypatch.setattr(RunFolder, "drop_state", then)
            stop()

        return stopped

    monkeypatch.setattr(run._Run, "execute", execute)
    command = [*arguments(gpt2, train_text, heldout_text, folder), "--quiet"]
    result = padst(*command)
    assert result.exit_code == 130
    said = f"error: interrupted when the run was finished: the result in '{folder}' is whole"
    assert result.output.splitlines() == [said]
    assert sorted(file.name for file in folder.iterdir() if file.is_dir()) == []
    assert "finished: nothing to resume" in padst.error(*command, "--resume")


def test_progress_of_a_wrong_type_is_said(
    padst: Padst, gpt2: Path, train_text: Path, heldout_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(gpt2, train_text, heldout_text, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(run, "initialise", stop)
        assert padst(*command).exit_code == 130
    progress = tmp_path / "run" / "state" / "progress.json"
    found = json.loads(progress.read_text())
    for wrong, words in (
        ({"seconds": "a minute"}, "seconds should be a valid number"),
        ({"metrics": []}, "metrics should be an object"),
        ({"metrics": {"dense": {**found["metrics"]["dense"], "value": "4"}}}, "metrics.dense.value should be a valid"),
        ({"metrics": {"dense": {"value": 4.0}}}, "it lacks metrics.dense.metric_name"),
        ({"densities": {"h.0": 1.5}}, "densities.h.0 should be less than or equal to 1"),
    ):
        progress.write_text(json.dumps(found | wrong))
        said = padst.error(*command, "--resume")
        assert f"'{progress}' is damaged ({words}" in said
        assert "start it anew with --overwrite" in said


def test_a_stop_before_the_folder_is_begun_leaves_nothing(
    padst: Padst, gpt2: Path, train_text: Path, heldout_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(run, "load_dense", stop)
    result = padst(*arguments(gpt2, train_text, heldout_text, folder))
    assert result.exit_code == 130
    assert result.output.splitlines() == ["error: interrupted; nothing is left half-written"]
    assert not folder.exists()


FULL = "no space left on device for"


def test_a_full_disk_says_how_to_go_on_and_leaves_nothing_half_written(
    padst: Padst, gpt2: Path, train_text: Path, heldout_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def full(_: object, file: IO[bytes]) -> None:
        file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:  # torch closes its zip file after that, and complains about it
            raise RuntimeError("enforce fail at inline_container.cc") from None

    monkeypatch.setattr(run, "initialise", lambda *_: {})
    monkeypatch.setattr(torch, "save", full)
    again = f"padst sparsify {gpt2} --output {folder} --resume"
    for command in (arguments(gpt2, train_text, heldout_text, folder), again.split()[1:]):
        said = padst(*command, "--quiet")
        assert said.exit_code == 2, said.exception
        assert said.output.splitlines() == [f"error: {FULL} '{folder}'; free some, then go on with: {again}"]
        assert [file.name for file in (folder / "state").iterdir()] == ["progress.json"]


def test_an_export_onto_a_full_disk_leaves_nothing(
    padst: Padst, sparsified: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sparsified("diag")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(exporting, "write_model", full)
    said = padst.error("export", folder, "--output", tmp_path / "packed", "--quiet")
    assert said == f"error: {FULL} '{tmp_path / 'packed'}'; free some, then start the export again"
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_export_leaves_nothing(
    padst: Padst, sparsified: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sparsified("diag")
    monkeypatch.setattr(exporting, "write_export_card", stop)
    result = padst("export", folder, "--output", tmp_path / "packed", "--quiet")
    assert result.exit_code == 130
    assert result.output.splitlines() == ["error: interrupted; nothing is left half-written"]
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_quickstart_says_how_to_start_again(
    padst: Padst, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "sparsify", stop)
    monkeypatch.setattr(sys, "argv", ["padst", "quickstart", "--output", str(tmp_path / "q"), "--quiet"])
    result = padst(*sys.argv[1:])
    assert result.exit_code == 130
    again = f"padst quickstart --output {tmp_path / 'q'} --quiet --overwrite"
    assert result.output.splitlines() == [f"error: interrupted; start it again with: {again}"]
