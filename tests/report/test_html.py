"""The report page: self-contained, well-formed, the same for the same run, and readable where parts are missing."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from padst_cli.report import ReportData, write_report
from padst_cli.report.html import render, short_names
from tests.report.conftest import SampleRun

_VOID = {"meta", "img", "br", "hr", "link", "input"}


class _Page(HTMLParser):
    """Collects ids, addresses and the text, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.tags: Counter[str] = Counter()
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._take(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._take(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def _take(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for key, value in attrs:
            if key == "id" and value:
                self.ids[value] += 1
            if key in ("href", "src", "xlink:href", "srcset") and value:
                self.addresses.append(value)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def data(sample_run: SampleRun) -> ReportData:
    return sample_run("diag")


@pytest.fixture(scope="module")
def html(data: ReportData) -> str:
    return render(data)


@pytest.fixture(scope="module")
def page(html: str) -> _Page:
    return _Page(html)


def test_page_is_well_formed(page: _Page) -> None:
    assert page.open == []
    assert page.tags["svg"] == 6
    assert page.tags["img"] == 16


def test_page_needs_nothing_else(page: _Page, html: str) -> None:
    assert page.tags["script"] == page.tags["link"] == 0
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    outside = [
        found for found in re.findall(r"https?://[^\s\"'<>]+", html) if not found.startswith("http://www.w3.org/")
    ]
    assert outside == []
    assert "@import" not in html


def test_references_inside_charts_meet_their_own_ids(page: _Page, html: str) -> None:
    assert page.ids
    assert [name for name, count in page.ids.items() if count > 1] == []
    used = {address[1:] for address in page.addresses if address.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert used == set(page.ids)


def test_charts_follow_the_colours_of_the_page(html: str) -> None:
    assert "#0b0b0" not in html
    assert {"var(--sparse)", "var(--control)", "var(--ink)"} <= set(re.findall(r"var\(--[a-z]+\)", html))


def test_figures_are_on_the_page(page: _Page, data: ReportData) -> None:
    for words in ("21.37", "17.02", "16.41", "161.3", "0.9004", "14.7 MB", "3.21 MB", "2 min 14 s", data.command):
        assert words in page.text
    assert "30.2 % worse" in page.text
    assert "hardened under delta (4)" in page.text
    assert "hardened at the deadline (4)" in page.text
    for row in data.layers:
        assert row.name in page.text
    assert "delta: 0.22" in page.text  # the recipe


def test_same_run_gives_the_same_bytes(data: ReportData, html: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, data)
    assert path.read_text(encoding="utf-8") == html
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_one_shot_without_control_reads_well(sample_run: SampleRun) -> None:
    page = _Page(render(sample_run("nm", blocks=1, steps=0, control=False)))
    assert "No training steps were asked for" in page.text
    assert page.tags["svg"] == 1
    assert "9.5 times as high (worse)" in page.text
    assert "control's" not in page.text


def test_unstructured_without_anything_else(sample_run: SampleRun) -> None:
    data = replace(sample_run("unstructured", blocks=1, steps=20, control=False), supports={}, environment={})
    page = _Page(render(data))
    for words in ("no packed form", "no permutations", "No pictures of supports", "No dense control was run"):
        assert words in page.text


def test_missing_and_infinite_figures_do_not_break_the_page(data: ReportData) -> None:
    events = [
        {**event, "loss": float("nan")} if event["event"] == "Step" and event["step"] % 2 else event
        for event in data.events
    ]
    layers = [replace(row, error_mask=float("nan"), error=None, kept=None) for row in data.layers]
    metric = {**data.result["metric"], "final": None}
    page = _Page(render(replace(data, events=events, layers=layers, result={**data.result, "metric": metric})))
    assert "was not measured" in page.text
    assert "nan" not in page.text.lower().split()


def test_names_and_commands_are_escaped(sample_run: SampleRun) -> None:
    data = sample_run(blocks=1, steps=0)
    html = render(replace(data, model="<b>gpt2</b>", command="padst sparsify 'a<script>b'"))
    assert "<script>" not in html
    assert "&lt;b&gt;gpt2" in html


def test_a_large_model_stays_small(data: ReportData) -> None:
    # 48 layers: the charts and the pictures must not grow beyond what a mail can carry.
    rows = [replace(row, name=f"h.{index}.{row.name}") for index in range(6) for row in data.layers]
    names = [row.name for row in rows]
    pictures = list(data.supports.values())
    supports = {name: pictures[index % len(pictures)] for index, name in enumerate(names)}
    curves = [
        {**event, "penalties": dict.fromkeys(names, 0.4)} if "penalties" in event else event for event in data.events
    ]
    html = render(replace(data, layers=rows, supports=supports, events=curves * 10))
    assert len(html) < 1_500_000


def test_short_names_drop_what_all_share() -> None:
    assert short_names(["model.layers.0.mlp.up", "model.layers.1.mlp.up"]) == ["0.mlp.up", "1.mlp.up"]
    assert short_names(["fc"]) == ["fc"]
    assert short_names([]) == []
