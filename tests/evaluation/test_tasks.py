"""lm-eval on a local task: the model object is scored, without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from padst_cli.errors import PadstError
from padst_cli.evaluation.tasks import run_tasks

DEFINITION = """
task: padst_local
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [{"question": f"w{n} w{n + 1}", "choices": ["w1", f"w{n + 2}"], "answer": n % 2} for n in range(12)]
    data = folder / "items.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    (folder / "padst_local.yaml").write_text(DEFINITION.format(file=data), encoding="utf-8")
    return folder


def expected_accuracy(model, tokenizer, count: int) -> float:
    """Which choice the model finds likelier, counted by hand."""
    import torch

    hits = 0
    for n in range(count):
        context = tokenizer(f"w{n} w{n + 1}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = model(input_ids=context).logits[0, -1]
        ids = [tokenizer(word)["input_ids"][0] for word in ("w1", f"w{n + 2}")]
        hits += int(last[ids].argmax()) == n % 2
    return hits / count


def test_scores_a_local_task(tiny, tasks: Path) -> None:
    model, tokenizer = tiny.gpt2(), tiny.tokenizer()
    scores = run_tasks(model, tokenizer, ["padst_local"], include_path=tasks, limit=10, batch_size=4)
    assert set(scores) == {"padst_local"}
    found = scores["padst_local"]
    assert found["acc"] == pytest.approx(expected_accuracy(model, tokenizer, 10))
    assert found["acc_stderr"] > 0
    assert set(found) == {"acc", "acc_stderr", "samples", "num_fewshot", "version"}
    assert (found["samples"], found["num_fewshot"], found["version"]) == (10, 0, 2.0)
    assert tokenizer.pad_token is None
    json.dumps(scores, allow_nan=False)


def test_unknown_task_is_refused(tiny, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    class LocalOnly(TaskManager):
        """Leaves lm-eval's own tasks out, which take long to read."""

        def __init__(self, include_path: str | None = None, **_: bool) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", LocalOnly)
    with pytest.raises(PadstError, match="did you mean 'padst_local'"):
        run_tasks(tiny.gpt2(), tiny.tokenizer(), ["padst_locl"], include_path=tasks)
    with pytest.raises(PadstError, match="names no task"):
        run_tasks(tiny.gpt2(), tiny.tokenizer(), [])
    with pytest.raises(PadstError, match="no folder of lm-eval"):
        run_tasks(tiny.gpt2(), tiny.tokenizer(), ["padst_local"], include_path=tasks / "absent")


@pytest.mark.slow
def test_all_of_lm_eval_is_searched(tiny, tasks: Path) -> None:
    with pytest.raises(PadstError, match="did you mean 'hellaswag'"):
        run_tasks(tiny.gpt2(), tiny.tokenizer(), ["padst_local", "helaswag"], include_path=tasks)


def test_missing_data_is_refused(tiny, tasks: Path) -> None:
    (tasks / "items.jsonl").unlink()
    with pytest.raises(PadstError, match="padst_local cannot be read"):
        run_tasks(tiny.gpt2(), tiny.tokenizer(), ["padst_local"], include_path=tasks)


def test_missing_lm_eval_names_the_extra(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PadstError, match=r"pip install padst\[eval\]"):
        run_tasks(tiny.gpt2(), tiny.tokenizer(), ["padst_local"])


def test_only_models_that_generate(tiny) -> None:
    with pytest.raises(PadstError, match="BertModel is none"):
        run_tasks(tiny.bert(head=False), tiny.tokenizer(), ["padst_local"])
