"""The quickstart: the whole job, small, without a network."""

from __future__ import annotations

import functools
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from padst_cli import quickstart as quick
from padst_cli.bench import bench
from padst_cli.checkpoint.lock import at_work
from padst_cli.console import to_json
from padst_cli.data.corpus import text_corpus
from padst_cli.errors import PadstError
from padst_cli.events import Event, Message
from padst_cli.stopwatch import Timing

SMALL = {
    "training.steps": 2,
    "training.batch_size": 2,
    "training.max_seq_length": 32,
    "calibration.samples": 4,
    "eval_samples": 3,
    "support.every": 1,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[quick.QuickstartResult, list[Event], Path]:
    """One small quickstart, with sockets that refuse to open."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the quickstart opened a network connection")

    output = tmp_path_factory.mktemp("quickstart") / "out"
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(quick, "bench", functools.partial(bench, timing=Timing(1, 1e-3, 1, 1)))
        result = quick.quickstart(output, changes={**SMALL, "structure": "block"}, device="cpu", on_event=events.append)
    return result, events, output


def test_the_table_has_dense_control_and_sparse(done: tuple[Any, ...]) -> None:
    result = done[0]
    assert [row.name for row in result.rows] == ["dense", "dense, fine-tuned as long", "block, packed"]
    dense, control, sparse = result.rows
    assert dense.perplexity < sparse.perplexity
    assert sparse.disk_bytes < dense.disk_bytes == control.disk_bytes
    assert all(min(row.prefill_per_s, row.decode_per_s, row.resident_bytes, row.perplexity) > 0 for row in result.rows)
    assert (result.steps, result.structure) == (2, "block")
    assert result.sparsity == pytest.approx(0.8, abs=0.01)
    # Values rounded to 16 bits move the logits a little.
    assert result.max_abs_logit_error < 0.2


def test_what_it_names_is_there_and_loads(done: tuple[Any, ...]) -> None:
    result, _, output = done
    assert Path(result.report).read_text(encoding="utf-8").startswith("<!")
    assert Path(result.packed) == output / "packed"
    model = AutoModelForCausalLM.from_pretrained(result.packed, dtype=torch.float32)
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()
    assert isinstance(result.generated, str)
    assert result.generated
    assert result.kernels
    json.dumps(to_json(result), allow_nan=False)


def test_a_second_one_needs_overwrite(done: tuple[Any, ...]) -> None:
    with pytest.raises(PadstError, match="--overwrite"):
        quick.quickstart(done[2], changes=SMALL)


def test_a_second_one_is_kept_out_while_the_first_is_at_work(tmp_path: Path) -> None:
    with at_work(tmp_path / "out"), pytest.raises(PadstError, match="another process is at work in"):
        quick.quickstart(tmp_path / "out", changes=SMALL, overwrite=True)
    assert not (tmp_path / "out").exists()


def test_unstructured_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(PadstError, match="use diag, nm or block"):
        quick.quickstart(tmp_path / "out", changes={"structure": "unstructured"})
    assert not (tmp_path / "out").exists()


def test_another_python_is_told_that_files_may_have_been_seen() -> None:
    events: list[Event] = []
    other = text_corpus("python-source", ["another library"], "heldout")
    assert not quick._tell_where_split_differs(other, events.append)
    assert isinstance(events[0], Message)
    assert "may have been seen" in events[0].text
