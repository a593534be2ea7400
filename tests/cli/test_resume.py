"""Runs that are stopped: by Ctrl-C, by a kill at any moment; what resumes ends with the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
