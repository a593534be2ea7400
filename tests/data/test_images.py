"""Image corpora: labels from a table, from folders, by name and by number."""

from __future__ import annotations

from pathlib import Path

import pytest

from padst_cli.data.corpus import ImageCorpus, load_corpus
from padst_cli.errors import PadstError

from .conftest import draw

CLASSES = {"tench": 0, "church": 1, "truck": 2}


def load_images(spec: object, label2id: dict[str, int] | None = None) -> ImageCorpus:
    loaded = load_corpus(str(spec), split="heldout", modality="image", label2id=label2id)
    assert isinstance(loaded, ImageCorpus)
    return loaded


def table(folder: Path, rows: str, images: int = 3) -> Path:
    for index in range(images):
        draw(folder / "images" / f"{index}.png", index)
    (folder / "labels.csv").write_text(rows)
    return folder


def test_a_table_gives_numbers_and_names_in_its_own_order(tmp_path: Path) -> None:
    table(tmp_path, "file,label\nimages/2.png,truck\nimages/0.png,1\n")
    loaded = load_images(tmp_path, CLASSES)
    assert [file.relative_to(tmp_path).as_posix() for file in loaded.files] == ["images/2.png", "images/0.png"]
    assert loaded.labels == (2, 1)
    assert loaded.split == "heldout"


@pytest.mark.parametrize(
    ("rows", "label2id", "says"),
    [
        ("file,label\nimages/0.png,3\n", CLASSES, "line 2: label 3 is out of range; .* numbered 0 to 2"),
        ("file,label\nimages/0.png,-1\n", None, "label -1 is out of range"),
        ("file,label\nimages/0.png,truk\n", CLASSES, r"knows no class 'truk' \(did you mean 'truck'\?\)"),
        ("file,label\nimages/0.png,truck\n", None, "'truck' is not a class number"),
        ("file,label\nimages/9.png,0\n", CLASSES, "line 2: there is no file"),
        ("file,label\nimages/0.png\n", CLASSES, "line 2 has no file or no label"),
        ("name,label\nimages/0.png,0\n", CLASSES, "needs the columns 'file' and 'label'"),
        ("", CLASSES, "needs the columns"),
        ("file,label\n", CLASSES, "there is no image in"),
        ('file,label\nimages/0.png,0\n"' + "x" * 132_000, CLASSES, r"no table after line 2 .* quote left open"),
        ("file,label\nimages/caf\xe9.png,0\n", CLASSES, r"labels\.csv' is not UTF-8 text \(byte 21\)"),
    ],
)
def test_bad_tables_are_refused_by_line(tmp_path: Path, rows: str, label2id: dict[str, int] | None, says: str) -> None:
    table(tmp_path, rows)
    (tmp_path / "labels.csv").write_text(rows, encoding="latin-1")
    with pytest.raises(PadstError, match=says):
        load_images(tmp_path, label2id)


@pytest.mark.parametrize(
    ("folders", "label2id", "labels"),
    [
        (["truck", "tench"], CLASSES, (0, 2)),  # by name, though two of three
        (["2", "0"], CLASSES, (0, 2)),  # by number
        (["n01", "n02", "n03"], CLASSES, (0, 1, 2)),  # by position, because there are as many
        (["dog", "cat"], None, (0, 1)),
        (["7", "5"], None, (5, 7)),
    ],
)
def test_class_folders(
    tmp_path: Path, folders: list[str], label2id: dict[str, int] | None, labels: tuple[int, ...]
) -> None:
    for folder in folders:
        draw(tmp_path / folder / "deep" / "a.JPEG")
    assert load_images(tmp_path, label2id).labels == labels


def test_class_folders_that_could_mean_anything_are_refused(tmp_path: Path) -> None:
    for folder in ("n01", "n02"):
        draw(tmp_path / folder / "a.png")
    with pytest.raises(PadstError, match=r"its 3 classes are not the 2 of the data; give a labels\.csv"):
        load_images(tmp_path, CLASSES)


def test_a_class_folder_number_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    draw(tmp_path / "5" / "a.png")
    with pytest.raises(PadstError, match="label 5 is out of range"):
        load_images(tmp_path, CLASSES)


def test_images_without_classes_have_no_labels(tmp_path: Path) -> None:
    for index in range(3):
        draw(tmp_path / f"{index}.png", index)
    (tmp_path / ".hidden.png").write_bytes(b"no image")
    loaded = load_images(tmp_path, CLASSES)
    assert (len(loaded.files), loaded.labels) == (3, None)
    assert len(load_images(tmp_path / "[01].png").files) == 2
    assert len(load_images(tmp_path / "0.png").files) == 1


def test_folders_to_be_left_out_hold_no_class(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/out/b.png", "out/c.png"):
        draw(tmp_path / name)

    def found(spec: object) -> list[str]:
        loaded = load_corpus(str(spec), split="train", modality="image", leave_out=lambda path: path.name == "out")
        return [file.relative_to(tmp_path).as_posix() for file in loaded.files if isinstance(file, Path)]

    assert found(tmp_path) == found(tmp_path / "**") == ["cat/a.png"]
    assert found(tmp_path / "out") == ["out/c.png"]


@pytest.mark.parametrize("spec", ["", "nothing", "*.png", "notes.txt"])
def test_data_without_an_image_is_refused(tmp_path: Path, spec: str) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(PadstError, match=r"no image in|no folder"):
        load_images(tmp_path / spec)


def test_loose_images_beside_folders_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "cat" / "b.png")
    with pytest.raises(PadstError, match="both loose and in folders"):
        load_images(tmp_path)


def test_the_digest_sees_names_sizes_and_labels_but_not_where_the_folder_lies(tmp_path: Path) -> None:
    rows = "file,label\nimages/0.png,0\nimages/1.png,1\n"
    one, moved = table(tmp_path / "one", rows), table(tmp_path / "two", rows)
    assert load_images(one).digest == load_images(moved).digest
    relabelled = table(tmp_path / "three", rows.replace("1.png,1", "1.png,2"))
    assert load_images(relabelled).digest != load_images(one).digest
    draw(moved / "images" / "1.png", 5, size=(30, 30))
    assert load_images(moved).digest != load_images(one).digest
