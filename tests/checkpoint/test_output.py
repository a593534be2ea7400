"""What may be overwritten: what padst wrote, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from padst_cli.checkpoint.output import check_apart, check_output, is_no_data, is_own
from padst_cli.checkpoint.run_folder import RunFolder
from padst_cli.errors import PadstError


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


PACKED = json.dumps({"quantization_config": {"quant_method": "padst"}})


@pytest.mark.parametrize(
    "files",
    [
        {"thesis__txt": "years of work"},
        {"config__json": '{"port": 8080}', "thesis__txt": "years of work"},
        {"config__json": '{"model_type": "gpt2"}', "model__safetensors": "dense"},
        {"config__json": json.dumps({"quantization_config": {"quant_method": "gptq"}}), "recipe__yaml": "of another"},
        {"config__json": "no JSON"},
        {"config__json": "[]"},
        {"log__jsonl": "of another"},
    ],
)
def test_what_padst_did_not_write_is_never_overwritten(files, tmp_path):
    path = folder_of(tmp_path / "out", **files)
    assert not is_own(path)
    with pytest.raises(PadstError, match="not written by padst"):
        check_output(path, overwrite=True)


@pytest.mark.parametrize(
    "files",
    [
        {"config__json": PACKED},
        {"config__json": '{"model_type": "gpt2"}', "recipe__yaml": "", "results__json": "{}"},
        {"recipe__yaml": "", "log__jsonl": ""},
    ],
)
def test_what_padst_wrote_is_overwritten_where_that_is_asked(files, tmp_path):
    path = folder_of(tmp_path / "out", **files)
    check_output(path, overwrite=True)
    with pytest.raises(PadstError, match="exists; --overwrite replaces it"):
        check_output(path, overwrite=False)


def test_an_unfinished_run_may_be_resumed_or_overwritten(tmp_path):
    folder = RunFolder(tmp_path / "out")
    folder.begin("structure: diag\n")
    check_output(folder.path, overwrite=True)
    with pytest.raises(PadstError, match="--resume goes on"):
        check_output(folder.path, overwrite=False)


def test_what_padst_wrote_is_no_data(tmp_path):
    RunFolder(tmp_path / "run").begin("structure: diag\n")
    folder_of(tmp_path / "study", study__yaml="")
    assert is_no_data(tmp_path / "run")
    assert is_no_data(folder_of(tmp_path / "packed", config__json=PACKED))
    assert not is_no_data(tmp_path / "study"), "a recipe of the user's, perhaps"
    (tmp_path / "study" / "cells").mkdir()
    assert is_no_data(tmp_path / "study")
    assert not is_no_data(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_in_nobodys_way(overwrite, tmp_path):
    check_output(tmp_path / "new", overwrite=overwrite)
    check_output(tmp_path, overwrite=overwrite)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(PadstError, match="is a file"):
        check_output(tmp_path / "file", overwrite=overwrite)


def test_a_name_that_cannot_be_written_down_is_refused(tmp_path):
    with pytest.raises(PadstError, match=r"caf\\udce9' is not UTF-8"):
        check_output(tmp_path / b"caf\xe9".decode("utf-8", "surrogateescape"), overwrite=False)


def test_inputs_must_not_lie_in_what_is_emptied(tmp_path):
    out = folder_of(tmp_path / "out", data__txt="text")
    (tmp_path / "link").symlink_to(out)
    for output, path in ((out, out), (out, out / "data.txt"), (tmp_path, out), (tmp_path / "link", out)):
        with pytest.raises(PadstError, match="holds the text"):
            check_apart(output, {"model": Path("/"), "text": path})
    check_apart(out, {"model": tmp_path, "text": tmp_path / "output.txt"})
    check_apart(tmp_path / "new", {"model": tmp_path})
