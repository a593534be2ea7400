"""Files of measured figures: found again under their key, replaced as a whole, and missing when damaged."""

from __future__ import annotations

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from padst_kernels import cache

KEY = {"device": "one", "version": "2"}


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_what_is_written_is_read(tmp_path):
    assert cache.read("speeds", KEY, dict) is None
    cache.write("speeds", KEY, {"a": 1})
    cache.write("speeds", KEY, {"a": 2})
    assert cache.read("speeds", KEY, dict) == {"a": 2}
    assert [file.name for file in (tmp_path / "padst").iterdir()] == [cache.file_of("speeds", KEY).name]


def test_what_others_write_meanwhile_is_not_lost():
    def add(name):
        for number in range(25):
            with cache.changing("speeds", KEY):
                found = cache.read("speeds", KEY, dict) or {}
                cache.write("speeds", KEY, {**found, f"{name}{number}": number})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, "abcd"))
    assert len(cache.read("speeds", KEY, dict)) == 100


def test_a_write_that_fails_leaves_nothing_behind(monkeypatch, tmp_path, caplog):
    cache.write("speeds", KEY, {"a": 1})
    before = set((tmp_path / "padst").iterdir())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    cache.write("speeds", KEY, {"a": 2})
    assert "No space left" in caplog.text
    assert set((tmp_path / "padst").iterdir()) == before
    assert cache.read("speeds", KEY, dict) == {"a": 1}


def test_another_key_has_another_file():
    cache.write("speeds", KEY, {"a": 1})
    other = {**KEY, "device": "two"}
    assert cache.read("speeds", other, dict) is None
    # Even in the place where its own would be.
    cache.file_of("speeds", other).write_text(json.dumps({"key": KEY, "speeds": {}}))
    assert cache.read("speeds", other, dict) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"speeds": {}}', "\x00\x01", "[" * 100_000])
def test_a_damaged_file_counts_as_missing_and_is_said(damage, caplog):
    cache.write("speeds", KEY, {"a": 1})
    cache.file_of("speeds", KEY).write_text(damage)
    assert cache.read("speeds", KEY, dict) is None
    assert "cannot be used" in caplog.text


def test_a_figure_that_no_number_holds_counts_as_damage(caplog):
    cache.write("speeds", KEY, 10**400)
    assert cache.read("speeds", KEY, float) is None
    assert "cannot be used" in caplog.text


def test_without_a_home_folder_nothing_is_kept_and_the_log_says_it(monkeypatch, caplog):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    cache.write("speeds", KEY, {"a": 1})
    assert "the speeds could not be kept (the user has no home folder" in caplog.text
    assert cache.read("speeds", KEY, dict) is None


def test_without_a_folder_to_write_to_the_log_says_it(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with cache.changing("speeds", KEY):
        cache.write("speeds", KEY, {"a": 1})
    assert "the speeds could not be kept" in caplog.text
