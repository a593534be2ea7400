"""Downstream tasks through lm-eval, with the model object itself: what is scored is what was loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from padst_cli.errors import PadstError, nearest

TaskScores = dict[str, dict[str, Any]]


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
) -> TaskScores:
    """Score a causal language model on lm-eval tasks (names, or files of task definitions).

    Returns for each task its metrics as lm-eval names them (`acc`, `acc_stderr`, ...; a filter other than `none` is
    appended after a comma), `samples`, `num_fewshot` and `version`. `include_path` is a folder of further task
    definitions, `limit` the most examples of a task. Raises `PadstError` as `check_tasks` does, and where lm-eval is
    missing, a task is unknown or its data cannot be had.
    """
    check_tasks(tasks, limit, include_path)
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise PadstError(f"--tasks needs lm-eval ({error}): run `pip install padst[eval]`") from None
    if not model.can_generate():
        raise PadstError(f"--tasks scores causal language models, and {type(model).__name__} is none")
    manager = _manager(TaskManager, tasks, include_path)
    # lm-eval gives the tokenizer a padding token; the caller's stays as it was.
    wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    try:
        scores = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise PadstError(f"the data of lm-eval task {', '.join(tasks)} cannot be read: {first}") from error
    return {name: _task(name, scores) for name in scores["results"]}


def check_tasks(tasks: Sequence[str], limit: int | None = None, include_path: str | Path | None = None) -> None:
    """Raise `PadstError` for what can be told without a model: no task named, no example of it, no such folder."""
    if not tasks:
        raise PadstError("--tasks names no task; give lm-eval task names, comma separated")
    if limit is not None and limit < 1:
        raise PadstError(f"--limit {limit} leaves no example of a task; give 1 or more")
    if include_path is not None and not Path(include_path).is_dir():
        raise PadstError(f"--include-path '{include_path}' is no folder of lm-eval task definitions")


def _manager(make: Callable[..., Any], tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """lm-eval's index of tasks; its own thousands, slow to read, only where the folder does not suffice."""
    if include_path is not None:
        own = make(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    manager = make(include_path=None if include_path is None else str(include_path))
    _check_names(tasks, manager.all_tasks)
    return manager


def _check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    for name in tasks:
        if name not in known and not Path(name).is_file():
            raise PadstError(
                f"lm-eval knows no task '{name}'{nearest(name, tuple(known))}; `lm-eval ls tasks` lists them, "
                "and --include-path adds a folder of definitions"
            )


def _task(name: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in scores["results"][name].items():
        metric, _, chosen = key.partition(",")
        # A group without a mean of its own, and a standard error that was not estimated, come as text; `sample_len` is
        # `samples` under another name.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and metric != "sample_len":
            found[metric if chosen in ("", "none") else key] = value
    found["samples"] = scores.get("n-samples", {}).get(name, {}).get("effective")
    found["num_fewshot"] = scores.get("n-shot", {}).get(name)
    found["version"] = scores.get("versions", {}).get(name)
    return found
