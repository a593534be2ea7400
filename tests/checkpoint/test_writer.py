"""Folders and files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
from fnmatch import fnmatch
from pathlib import Path

import pytest

from padst_cli.checkpoint.reader import SMALL_FILES, TOKENIZER_FILES
from padst_cli.checkpoint.writer import (
    atomic_folder,
    check_shard_size,
    copy_processor_files,
    empty_folder,
    write_atomically,
)
from padst_cli.errors import PadstError
from padst_cli.hub import UPLOADED


def a_model(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "old.txt").write_text("old")
    return folder


def test_a_new_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert [entry.name for entry in target.parent.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target) as temporary:
        (temporary / "file").write_text("x")
    assert (target / "file").is_file()


def test_an_existing_model_needs_overwrite(tmp_path):
    target = a_model(tmp_path / "out")
    with pytest.raises(PadstError, match="--overwrite"), atomic_folder(target):
        pass
    with atomic_folder(target, overwrite=True) as temporary:
        (temporary / "new.txt").write_text("new")
        assert (target / "old.txt").read_text() == "old"
    assert sorted(entry.name for entry in target.iterdir()) == ["new.txt"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_another_process_wrote_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(PadstError, match="exists; --overwrite replaces it"), atomic_folder(target):
        a_model(target)
    assert sorted(entry.name for entry in target.iterdir()) == ["config.json", "old.txt"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_a_link_leads_to_is_replaced(tmp_path):
    target = a_model(tmp_path / "disk" / "out")
    (tmp_path / "link").symlink_to(target)
    with atomic_folder(tmp_path / "link", overwrite=True) as temporary:
        (temporary / "new.txt").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert [entry.name for entry in target.iterdir()] == ["new.txt"]
    assert [entry.name for entry in target.parent.iterdir()] == ["out"]


def test_what_cannot_be_set_aside_is_left_as_it_was(tmp_path, monkeypatch):
    target = a_model(tmp_path / "mounted")

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(PadstError, match="cannot be replaced"), atomic_folder(target, overwrite=True):
        pass
    assert (target / "old.txt").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mounted"]


def test_a_folder_is_emptied_through_a_link_and_in_order(tmp_path, monkeypatch):
    target = a_model(tmp_path / "out")
    (target / "deep" / "er").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    (target / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "way").symlink_to(target)
    gone = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: (gone.append(path.name), unlink(path)))
    empty_folder(tmp_path / "way", last=("old.txt", "config.json"))
    assert gone[-2:] == ["old.txt", "config.json"]
    assert not list(target.iterdir())
    assert (tmp_path / "kept").is_dir()


def test_an_error_leaves_everything_as_it_was(tmp_path):
    target = a_model(tmp_path / "out")

    class Stop(BaseException):
        pass

    def write():
        with atomic_folder(target, overwrite=True) as temporary:
            (temporary / "half").write_text("half")
            raise Stop

    with pytest.raises(Stop):
        write()
    assert (target / "old.txt").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_kill_leaves_nothing_under_the_name_and_is_cleaned_up(tmp_path):
    target = tmp_path / "out"
    child = os.fork()
    if child == 0:
        with atomic_folder(target) as temporary:
            (temporary / "config.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_folder(target) as temporary:
        (temporary / "file").write_text("x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    old = a_model(tmp_path / f".out.replaced-{gone}")
    target = tmp_path / "out"
    with atomic_folder(target, overwrite=True) as temporary:
        assert (target / "old.txt").read_text() == "old"
        (temporary / "new.txt").write_text("new")
    assert (target / "new.txt").is_file()
    assert not old.exists()


def test_write_atomically(tmp_path):
    path = tmp_path / "report.html"
    write_atomically(path, "one")
    write_atomically(path, "zwei \u00fc")
    assert path.read_text(encoding="utf-8") == "zwei \u00fc"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("size", ["5", "GB", "5XB", "-5GB", "0MB", "5.5GB", "\u00b2GB", ""])
def test_bad_shard_sizes(size):
    with pytest.raises(PadstError, match="5GB or 200MB"):
        check_shard_size(size)


def test_processor_files_are_copied_byte_for_byte(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    (source / "blob").write_bytes(b'{"x": 1}')
    (source / "tokenizer.json").symlink_to(source / "blob")
    (source / "merges.txt").write_text("a b")
    (source / "model.safetensors").write_text("no")
    (source / "config.json").write_text("no")
    assert copy_processor_files(source, target) == ["merges.txt", "tokenizer.json"]
    assert (target / "tokenizer.json").read_bytes() == b'{"x": 1}'
    assert not (target / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("name", ["spm.model", "sentencepiece.model", "bpe.codes", *TOKENIZER_FILES])
def test_every_file_that_tells_of_a_tokenizer_goes_all_the_way(tmp_path, name):
    assert name in TOKENIZER_FILES
    assert any(fnmatch(name, pattern) for pattern in SMALL_FILES), "fetched"
    assert any(fnmatch(name, pattern) for pattern in UPLOADED), "pushed"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / name).write_text("x")
    assert copy_processor_files(tmp_path / "a", tmp_path / "b") == [name]
