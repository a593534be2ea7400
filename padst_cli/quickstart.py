"""`padst quickstart`: the whole job on the checkpoint that comes with padst, offline, in minutes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from padst_cli.assets import EMBEDDED_MODEL
from padst_cli.bench import BenchResult, bench
from padst_cli.checkpoint.lock import at_work
from padst_cli.checkpoint.output import check_output
from padst_cli.checkpoint.reader import load_dense, open_source
from padst_cli.checkpoint.run_folder import REPORT
from padst_cli.data.corpus import TextCorpus, python_source
from padst_cli.errors import PadstError
from padst_cli.evaluation import evaluate_model
from padst_cli.events import Evaluated, Message, OnEvent, PhaseStarted, ignore
from padst_cli.pipeline.exporting import ExportResult, export
from padst_cli.pipeline.run import SparsifyResult, sparsify
from padst_cli.recipe import Recipe, load_recipe
from padst_cli.runtime.generate import generate
from padst_cli.runtime.load import Loaded, load
from padst_cli.runtime.quantizer import kernels_of

PROMPT: Final = "def "
NEW_TOKENS: Final = 40
BENCH_TOKENS: Final = (1, 256)
PACKED_DTYPE: Final = "float16"
"""As the embedded checkpoint itself, so that the bytes on disk compare."""

RECIPE: Final = "quickstart"


@dataclass(frozen=True)
class QuickstartRow:
    """One model: perplexity on the same held-out windows, bytes of its weights on disk and in memory, tokens a second.

    Prefill is one pass over a full context, decode one token at a time with a key-value cache.
    """

    name: str
    perplexity: float
    disk_bytes: int
    resident_bytes: int
    prefill_per_s: float
    decode_per_s: float


@dataclass(frozen=True)
class QuickstartResult:
    """What `padst quickstart` reports; fields are its JSON keys.

    `rows` are the dense model, the dense model fine-tuned for as many steps, and the sparse one as loaded from its
    packed export. The fine-tuned dense model has the dense one's size and speed, which is measured once.
    `split_as_trained` is False where this Python's library differs from the one the checkpoint was trained on, so that
    held-out files may have been seen.
    """

    output: str
    packed: str
    report: str
    structure: str
    sparsity: float
    steps: int
    rows: tuple[QuickstartRow, ...]
    max_abs_logit_error: float
    prompt: str
    generated: str
    kernels: list[str]
    hardware: str
    split_as_trained: bool
    seconds: float


def quickstart(
    output: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    device: str = "auto",
    on_event: OnEvent = ignore,
) -> QuickstartResult:
    """Sparsify the embedded checkpoint, export it, load the export again, evaluate, generate and time it.

    Writes `output/sparse` (the trained folder with its report) and `output/packed` (the export). `changes` are
    dotted keys laid over the recipe `quickstart` that comes with padst. Nothing is downloaded. Raises `PadstError` for
    an output in the way or at work in another process, and for a structure without a packed form, before any work.
    """
    recipe = load_recipe(RECIPE).updated({**(changes or {}), "model": str(EMBEDDED_MODEL)})
    if recipe.structure == "unstructured":
        raise PadstError("quickstart ends in a packed export, which unstructured has none of; use diag, nm or block")
    with at_work(output):
        return _quickstart(output, recipe, overwrite, device, on_event)


def _quickstart(output: Path, recipe: Recipe, overwrite: bool, device: str, on_event: OnEvent) -> QuickstartResult:
    began = time.perf_counter()
    trained_folder, packed_folder = output / "sparse", output / "packed"
    check_output(packed_folder, overwrite=overwrite)
    heldout = python_source("heldout")
    as_trained = _tell_where_split_differs(heldout, on_event)
    trained = sparsify(
        str(EMBEDDED_MODEL),
        recipe,
        trained_folder,
        device=device,
        overwrite=overwrite,
        on_event=on_event,
        command="padst quickstart",
    )
    exported = export(
        trained_folder,
        packed_folder,
        value_dtype=PACKED_DTYPE,
        dtype=PACKED_DTYPE,
        overwrite=overwrite,
        device=device,
        on_event=on_event,
    )
    # From here on only what was exported is used.
    loaded = load(str(packed_folder), device=device, dtype=torch.float32)
    perplexity = _perplexity(loaded, heldout, recipe, on_event)
    on_event(PhaseStarted("generate"))
    line = generate(loaded, PROMPT, max_new_tokens=NEW_TOKENS)
    on_event(PhaseStarted("bench"))
    dense = load_dense(open_source(str(EMBEDDED_MODEL)), dtype=torch.float32, device=loaded.device)
    timed = bench(loaded.model, dense, task=loaded.source.task, tokens=BENCH_TOKENS)
    return QuickstartResult(
        output=str(output),
        packed=str(packed_folder),
        report=str(trained_folder / REPORT),
        structure=recipe.structure,
        sparsity=trained.sparsity_achieved,
        steps=trained.steps,
        rows=_rows(trained, exported, perplexity, timed),
        max_abs_logit_error=exported.max_abs_logit_error,
        prompt=PROMPT,
        generated=line.text,
        kernels=kernels_of(loaded.model, *BENCH_TOKENS),
        hardware=trained.environment["hardware"],
        split_as_trained=as_trained,
        seconds=time.perf_counter() - began,
    )


def _tell_where_split_differs(heldout: TextCorpus, on_event: OnEvent) -> bool:
    facts = json.loads((EMBEDDED_MODEL / "training.json").read_text(encoding="utf-8"))
    same: bool = heldout.digest == facts["digest"]["heldout"]
    if not same:
        on_event(
            Message(
                f"this Python's library is not that of Python {facts['python']}, which the embedded model was trained "
                "on: some held-out files may have been seen in training, so perplexities compare with each other only"
            )
        )
    return same


def _perplexity(loaded: Loaded, heldout: TextCorpus, recipe: Recipe, on_event: OnEvent) -> float:
    """Perplexity of the reloaded export on the windows that the run was measured on."""
    on_event(PhaseStarted("evaluate the export"))
    found = evaluate_model(
        loaded.model,
        loaded.processor,
        loaded.source.task,
        heldout,
        max_samples=recipe.eval_samples,
        device=loaded.device,
    )
    on_event(Evaluated(recipe.training.steps, found.metric_name, found.value, "final"))
    return found.value


def _rows(
    trained: SparsifyResult, exported: ExportResult, perplexity: float, timed: BenchResult
) -> tuple[QuickstartRow, ...]:
    assert timed.model is not None
    assert timed.model.decode is not None
    prefill, decode, resident = timed.model.prefill, timed.model.decode, timed.model.resident_bytes
    dense = (exported.dense_bytes, resident["dense"], prefill.dense_per_s, decode.dense_per_s)
    sparse = (exported.packed_bytes, resident["sparse"], prefill.sparse_per_s, decode.sparse_per_s)
    rows = [QuickstartRow("dense", trained.metric["dense"], *dense)]
    if trained.metric["dense_finetuned"] is not None:
        rows.append(QuickstartRow("dense, fine-tuned as long", trained.metric["dense_finetuned"], *dense))
    return (*rows, QuickstartRow(f"{trained.structure}, packed", perplexity, *sparse))
