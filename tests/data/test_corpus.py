"""Text corpora: files, folders, globs, JSON lines and the standard library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from padst_cli.data import corpus as corpus_module
from padst_cli.data.corpus import TextCorpus, default_spec, load_corpus, python_source, text_digest
from padst_cli.errors import PadstError


def load_text(spec: object, split: str = "train") -> TextCorpus:
    loaded = load_corpus(str(spec), split=split, modality="text")
    assert isinstance(loaded, TextCorpus)
    return loaded


def test_a_file_is_one_document_kept_to_the_character(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo  \n\n three \u2028 four\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    loaded = load_text(tmp_path / "a.txt")
    assert loaded.documents == (text.removeprefix("\ufeff"),)
    assert (loaded.characters, loaded.words) == (len(text) - 1, 4)


def test_a_folder_is_read_in_path_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    for name, raw in {
        "b.txt": b"second",
        "a/z.md": b"first",
        ".git/config": b"hidden",
        "c.bin": b"\xff\xfe\x00binary",
        "d.txt": b"  \n",
        "e.jsonl": b'{"text": "third"}\n\n{"text": "fourth", "more": 1}\n',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    assert load_text(tmp_path).documents == ("first", "second", "third", "fourth")
    assert load_text(tmp_path / "*.txt").documents == ("second",)
    assert load_text(tmp_path / "**" / "*.md").documents == ("first",)


def test_folders_to_be_left_out_are_those_below_the_data(tmp_path: Path) -> None:
    for name in ("a.txt", "out/log.txt", "out/deep/log.txt", "other/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def documents(spec: object) -> tuple[str, ...]:
        loaded = load_corpus(str(spec), split="train", modality="text", leave_out=lambda path: path.name == "out")
        assert isinstance(loaded, TextCorpus)
        return loaded.documents

    assert documents(tmp_path) == documents(tmp_path / "**") == ("a.txt", "other/b.txt")
    assert documents(tmp_path / "*" / "*.txt") == ("other/b.txt",)
    assert documents(tmp_path / "out") == documents(tmp_path / "out" / "**") == ("out/deep/log.txt", "out/log.txt")


def test_an_existing_name_with_glob_characters_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("kept")
    assert load_text(tmp_path / "a[1].txt").documents == ("kept",)


def test_json_lines_may_hold_unescaped_line_separators(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\u0085d"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    assert load_text(tmp_path / "a.jsonl").documents == tuple(texts)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83d b \ud83d\ude00"}')
    assert load_text(tmp_path / "a.jsonl").documents == ("a\ufffd b \U0001f600",)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "no text in"),
        ("a.txt", b" \n\t\n", "no text in"),
        ("a.txt", b"fine \xff", r"not UTF-8 text \(byte 5\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"words": "y"}', "line 3 has no 'text' field"),
        ("a.jsonl", b'{"text": 3}', "line 1 has no 'text' field"),
        ("a.jsonl", b'["text"]', "line 1 has no 'text' field"),
    ],
)
def test_bad_files_are_refused_by_name_and_place(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PadstError, match=says) as caught:
        load_text(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", "missing/", "*.txt"])
def test_missing_data_names_the_choices(tmp_path: Path, name: str) -> None:
    with pytest.raises(PadstError, match="python-source"):
        load_text(tmp_path / name)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PadstError, match="no file matches"):
        load_text(tmp_path)


def test_the_digest_depends_on_every_character_and_boundary() -> None:
    assert text_digest(["ab", "c"]) != text_digest(["a", "bc"])
    assert text_digest(["ab"]) != text_digest(["ab", ""])
    assert text_digest(["ab", "c"]) == text_digest(iter(["ab", "c"]))
    assert len(text_digest([])) == 64


def test_a_plain_file_is_the_same_for_both_splits(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the same")
    train, heldout = load_text(tmp_path / "a.txt", "train"), load_text(tmp_path / "a.txt", "heldout")
    assert (train.documents, train.digest) == (heldout.documents, heldout.digest)
    assert (train.split, heldout.split) == ("train", "heldout")


def test_python_source_divides_the_standard_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = {f"module_{index}.py": f"value = {index}\n" for index in range(200)}
    left_out = ["test/a.py", "json/tests/a.py", "idlelib/idle_test/a.py", "site-packages/a.py", "encodings/cp437.py",
                "config-3.11-x/a.py", "_sysconfigdata__linux.py", "__pycache__/a.py", "notes.txt"]  # fmt: skip
    for name in left_out:
        library[name] = "left = 'out'\n"
    for name, text in library.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])

    train, heldout = python_source("train"), python_source("heldout")
    expected = {text for name, text in library.items() if name not in left_out}
    assert set(train.documents) | set(heldout.documents) == expected
    assert not set(train.documents) & set(heldout.documents)
    assert all(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 10 == 0 for text in heldout.documents)
    assert 5 <= len(heldout.documents) <= 40
    assert train.digest != heldout.digest == load_text("python-source", "heldout").digest


def test_the_real_standard_library_is_megabytes() -> None:
    heldout = load_text("python-source", "heldout")
    assert heldout.characters > 100_000
    assert heldout.name == "python-source"


def test_a_python_without_source_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(PadstError, match="without the source of its standard library"):
        python_source("train")


def test_python_source_is_no_image_data() -> None:
    with pytest.raises(PadstError, match="is text, and this model takes images"):
        load_corpus("python-source", split="train", modality="image")


def test_only_causal_models_have_data_by_default() -> None:
    assert default_spec("causal-lm") == "hf:Salesforce/wikitext@wikitext-103-raw-v1"
    assert [default_spec(task) for task in ("masked-lm", "image-classification", "encoder")] == [None] * 3
