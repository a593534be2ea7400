"""The table of what padst is to reach on a GPU, in one command: `make bench-gpu`.

Every group of rows runs in a process of its own, so that one that takes too long costs its own rows only, and a row
that kills its process or loses it the device costs itself only: another process goes on behind it. Such rows stand in
the table with the error, or as not measured. What comes out is a section of BENCHMARKS.md, goals beside
figures. Exit code 0 where every row was measured, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from padst_cli.bench.device import device_facts
from padst_cli.bench.gpu_rows import FULL, TINY, Group, Row, Setting, groups

BUDGET = 465.0
"""Seconds for the whole table; less than eight minutes with what starts and ends."""

LOST = 3
"""The exit code of a group's process that has lost its device."""

Found = Mapping[str, Mapping[str, Any]]
"""Row -> its figures, or its `error`."""

_METHOD = (
    "Random weights, random permutations, sparsity 0.9 (2:4: 0.5), against dense {dtype} in the same process. Layers: "
    "weights rotated through more than twice the L2 cache. Layers, prefill and decoding run in CUDA graphs, whole "
    "models compiled, on both sides; decoding has a static cache. Fine-tuning: without a teacher, weights in float32, "
    "products in {dtype}. Medians of alternating runs."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all rows, or one group of them for the process that asked; returns the exit code."""
    given = _parser().parse_args(arguments)
    sizes = TINY if given.tiny else FULL
    if given.group:
        setting = Setting(torch.device(given.device), getattr(torch, given.dtype), sizes, deadline=given.deadline)
        measure(next(group for group in groups(sizes) if group.name == given.group), setting, Path(given.results))
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here; --device cpu --tiny shows that everything runs", file=sys.stderr)
        return 2
    table = groups(sizes)
    # By default a signal would end this process alone, and leave a group's behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found: dict[str, Mapping[str, Any]] = {}
    text = ""
    try:
        for rows in collect(table, given):
            found.update(rows)
            text = page(table, found, given.device, given.dtype)
            if given.output:  # after every group: what ends this run costs no rows that are there
                Path(given.output).write_text(text, encoding="utf-8")
    finally:
        signal.signal(signal.SIGTERM, before)
        print(text)
    return 0 if all("speedup" in found.get(row.name, {}) for group in table for row in group.rows) else 1


def measure(group: Group, setting: Setting, results: Path) -> None:
    """Measure the rows of a group one after the other, each written as a line of JSON as soon as it is there.

    Rows that are there already are left out. Exits with `LOST` after a row that leaves no working device behind.
    """
    there = _rows_of(results.read_text(encoding="utf-8")) if results.exists() else {}
    for row in group.rows:
        if row.name in there:
            continue
        try:
            line: dict[str, Any] = asdict(row.measure(setting))
        except Exception as error:  # whatever it is, it belongs in the row's place
            traceback.print_exc()
            line = {"error": f"{type(error).__name__}: {_first_line(error)}"}
        _write(results, row.name, line)
        if "error" in line and is_lost(setting.device):
            sys.exit(LOST)


def is_lost(device: torch.device) -> bool:
    """Whether a GPU works no more for this process, as after an access that it refused."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _write(results: Path, name: str, line: Mapping[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"row": name, **line}) + "\n")


def collect(table: Sequence[Group], given: argparse.Namespace) -> Iterator[Found]:
    """Run every group in a process of its own, and give its rows; what one does not use of its budget those after it
    may.
    """
    end, scale = time.monotonic() + given.budget, given.budget / BUDGET
    for number, group in enumerate(table):
        reserved = scale * sum(later.budget for later in table[number + 1 :])
        allowed = end - reserved - time.monotonic()
        print(f"{group.name}: at most {max(0, round(allowed))} s", file=sys.stderr)
        yield _run_group(group, given, allowed) if allowed > 0 else {}


def _run_group(group: Group, given: argparse.Namespace, allowed: float) -> dict[str, dict[str, Any]]:
    end = time.monotonic() + allowed  # which all processes of a machine count alike
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "rows.jsonl"
        results.touch()
        command = [sys.executable, "-m", "padst_cli.bench.gpu_table", "--group", group.name, "--results", str(results)]
        command += ["--device", given.device, "--dtype", given.dtype, "--deadline", str(end)]
        for _ in group.rows:  # each process ends with one of them at least
            code = _run(command + ["--tiny"] * given.tiny, end)
            found = _rows_of(results.read_text(encoding="utf-8"))
            missing = [row.name for row in group.rows if row.name not in found]
            if not (code and missing):
                break
            if code == LOST:
                continue
            # It died, as of a signal: the row it was at is the one to blame.
            found[missing[0]] = {"error": f"its process ended with code {code}"}
            if code > 0 or len(missing) == 1:  # an end of its own, which others would come to
                break
            results.write_text("", encoding="utf-8")  # whose last line may be torn
            for name, line in found.items():
                _write(results, name, line)
    return found


def _run(command: Sequence[str], end: float) -> int:
    """The exit code of a process, 0 where it is not done by `end` (seconds of `time.monotonic`) and is ended."""
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        return process.wait(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return 0
    finally:
        _end(process)


def _rows_of(text: str) -> dict[str, dict[str, Any]]:
    whole = text[: text.rfind("\n") + 1]  # a process that is ended may be writing a line
    return {line.pop("row"): line for line in map(json.loads, whole.splitlines())}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started, compilers among them."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def page(table: Sequence[Group], found: Found, device: str, dtype: str) -> str:
    """The section of BENCHMARKS.md."""
    facts = device_facts(torch.device(device))
    where = "A CPU, with tiny sizes: what runs, not how fast." if facts is None else f"{facts.sentence}."
    lines = ["## GPU kernels", "", where, _METHOD.format(dtype=dtype), "", "```bash", "make bench-gpu", "```", ""]
    lines += [
        "| | goal | dense | sparse | speed-up | reached | kernels |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(row, found.get(row.name)) for group in table for row in group.rows]
    notes = dict.fromkeys(note for figures in found.values() for note in figures.get("notes", ()))
    return "\n".join([*lines, *(["", *(f"- {note}" for note in notes)] if notes else []), ""])


def _line(row: Row, figures: Mapping[str, Any] | None) -> str:
    goal = "-" if row.goal is None else f"{row.goal:g}x"
    if figures is None:
        return f"| {row.name} | {goal} | not measured: it did not fit the time | | | | |"
    if "error" in figures:
        return f"| {row.name} | {goal} | error: {figures['error'].replace('|', '/')} | | | | |"
    dense, sparse = (f"{figures[side]:,.1f} {figures['unit']}" for side in ("dense", "sparse"))
    reached = "-" if row.goal is None else "yes" if figures["speedup"] >= row.goal else "no"
    return (
        f"| {row.name} | {goal} | {dense} | {sparse} | {figures['speedup']:.2f}x | {reached} | {figures['kernels']} |"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["without a message"])[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m padst_cli.bench.gpu_table", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for the whole table")
    parser.add_argument("--output", help="write the section to this file, too")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
