"""The flags that every command takes, and how decorators add them."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import signal
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from padst_cli.app import app
from padst_cli.commands.common import Common, Device, common_flags
from padst_cli.errors import PadstError


@pytest.mark.parametrize("command", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_every_command_takes_them(command: str) -> None:
    group = typer.main.get_command(app)
    options = {option for each in group.commands[command].params for option in each.opts}
    assert {"--device", "--dtype", "--seed", "--json", "--quiet"} <= options


def test_a_command_receives_them_beside_its_own() -> None:
    seen = []

    @common_flags("seed")
    def command(name: str, seed: int = 7, *, common: Common) -> None:
        seen.append((name, seed, common))

    own = typer.Typer()
    own.command()(command)
    assert CliRunner().invoke(own, ["x", "--device", "cpu", "--dtype", "bfloat16", "--quiet"]).exit_code == 0
    assert seen == [("x", 7, Common(Device.cpu, "bfloat16", quiet=True))]
    assert list(inspect.signature(command).parameters) == ["name", "seed", "device", "dtype", "json", "quiet"]


def test_a_users_error_becomes_one_sentence_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left, Common().running():
        raise PadstError("the cat sat on the model")
    assert left.value.exit_code == 2
    assert "the cat sat on the model" in capsys.readouterr().err


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_holds_back_what_the_kernels_log(caplog: pytest.LogCaptureFixture, quiet: bool) -> None:
    log = logging.getLogger("padst_kernels")
    with Common(quiet=quiet).running():
        log.warning("measuring")
    assert ("measuring" in caplog.text) is not quiet
    log.warning("afterwards")
    assert "afterwards" in caplog.text


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_one_sentence_and_130(capsys: pytest.CaptureFixture[str], stop: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as left, Common().running():
        signal.raise_signal(stop)
    assert left.value.exit_code == 130
    assert capsys.readouterr().err.splitlines() == ["error: interrupted; nothing is left half-written"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_path_that_the_system_refuses_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(typer.Exit) as left, Common().running():
        (tmp_path / "file" / "out").mkdir()
    assert left.value.exit_code == 2
    assert f"'{tmp_path / 'file' / 'out'}' cannot be used: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_though_no_file_is_named(capsys: pytest.CaptureFixture[str], code: int) -> None:
    with pytest.raises(typer.Exit) as left, Common().running():
        raise OSError(code, os.strerror(code))
    assert left.value.exit_code == 2
    said = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "disk quota exceeded"}[code]
    assert capsys.readouterr().err.splitlines() == [f"error: {said}; free some, then start the command again"]


def test_a_missing_file_of_its_own_is_no_users_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Common().running():
        (tmp_path / "gone").read_text()
