"""A trained padst folder -> an export: packed for fast inference or dense for everyone, checked against DIR."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padst_cli.checkpoint.format import VALUE_DTYPES
from padst_cli.checkpoint.lock import at_work, check_idle
from padst_cli.checkpoint.output import check_apart, check_output, is_no_data
from padst_cli.checkpoint.reader import Source, open_source
from padst_cli.checkpoint.run_folder import RECIPE
from padst_cli.checkpoint.writer import atomic_folder, check_shard_size, copy_processor_files, write_model
from padst_cli.data.corpus import TextCorpus, load_corpus
from padst_cli.data.items import ImageItems, TokenWindows, collate, vocabulary_size
from padst_cli.errors import CheckFailed, PadstError, full_disk_told, nearest
from padst_cli.events import OnEvent, PhaseStarted, ignore
from padst_cli.pipeline.cards import run_results, write_export_card
from padst_cli.pipeline.planning import checkpoint_dtype
from padst_cli.recipe import load_recipe
from padst_cli.runtime.load import load
from padst_cli.runtime.packing import densify, repack
from padst_cli.runtime.quantizer import kernels_of, packed_layers

CHECK_ITEMS = 4
CHECK_TOKENS = 128
FORMATS = ("packed", "dense")
# The packed form adds the same products in another order. Values rounded to 16 bits are another model: reported, not
# judged.
FLOAT32_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ExportResult:
    """What `padst export` reports; fields are its JSON keys.

    `dense_bytes` is the whole dense model that the run began with (tied weights once) in the dtype of what is not
    packed, `packed_bytes` what the files of weights hold. `max_abs_logit_error` compares the written folder, opened
    anew, with DIR computed densely, on real input (`checked_on`).
    """

    output: str
    format: str
    value_dtype: str
    files: list[str]
    dense_bytes: int
    packed_bytes: int
    max_abs_logit_error: float
    checked_on: str
    kernels: list[str]


def export(
    folder: Path | str,
    output: Path | str,
    *,
    form: str = "packed",
    value_dtype: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    data: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
    on_event: OnEvent = ignore,
) -> ExportResult:
    """Write the model in `folder` to `output` for others to load, open it again and compare.

    `value_dtype` is that of packed values (default: float32), `dtype` that of everything else (default: as stored).
    Raises `PadstError` for a folder that is not padst's, an unstructured model in packed form, values' dtype for a
    dense one, and an output in the way or at work in another process; `CheckFailed` where the copy computes something
    else.
    """
    output = Path(output)
    _check_arguments(form, value_dtype, dtype, max_shard_size)
    value_dtype = value_dtype or "float32"
    check_idle(output)
    check_output(output, overwrite=overwrite)
    source = open_source(str(folder))
    check_apart(output, {"model": source.folder})
    if source.padst is None:
        raise PadstError(f"'{folder}' is not a folder that `padst sparsify` wrote; export starts from one")
    # Of the model that the run began with: one whose head was untied has an embedding more by now.
    dense_parameters = run_results(source).dense_bytes // torch.float32.itemsize
    on_event(PhaseStarted("read the trained model"))
    trained = load(str(folder), device=device)
    batch, checked_on = _real_input(source, trained.processor, data, trained.device)
    reference = densify(trained.model)
    on_event(PhaseStarted("write and check"))
    model = _converted(trained.model, form, value_dtype, dtype)
    told = full_disk_told(output, "start the export again")
    with told, at_work(output), atomic_folder(output, overwrite=overwrite) as temporary:
        write_model(model, temporary, max_shard_size=max_shard_size)
        copy_processor_files(source.folder, temporary)
        result = _verify(temporary, output, reference, batch, checked_on, form, value_dtype, device, dense_parameters)
        write_export_card(source, temporary, asdict(result), form)
        files = sorted(file.name for file in temporary.iterdir())
    return replace(result, files=files)


def _check_arguments(form: str, value_dtype: str | None, dtype: str | None, max_shard_size: str) -> None:
    if form not in FORMATS:
        raise PadstError(f"--format '{form}' is unknown{nearest(form, FORMATS)}; choose {' or '.join(FORMATS)}")
    for flag, name in (("--value-dtype", value_dtype), ("--dtype", dtype)):
        if name is not None and name not in VALUE_DTYPES:
            raise PadstError(f"{flag} '{name}' is unknown; choose one of {', '.join(VALUE_DTYPES)}")
    if form == "dense" and value_dtype is not None:
        raise PadstError("--value-dtype is that of packed values: a dense checkpoint has none; give --dtype")
    check_shard_size(max_shard_size)


def _converted(model: Any, form: str, value_dtype: str, dtype: str | None) -> Any:
    others = None if dtype is None else VALUE_DTYPES[dtype]
    if form == "dense":
        dense = densify(model)
        return dense if others is None else dense.to(others)
    packed = repack(model, "packed", VALUE_DTYPES[value_dtype])
    if others is not None:
        values = {id(layer.values) for layer in packed_layers(packed).values()}
        for tensor in (*packed.parameters(), *packed.buffers()):
            if tensor.is_floating_point() and id(tensor) not in values:
                tensor.data = tensor.data.to(others)
    return packed


def _real_input(
    source: Source, processor: Any, data: str | None, device: torch.device
) -> tuple[dict[str, Tensor], str]:
    """A batch of held-out data: `--data`, or what the run was judged on."""
    recipe = source.folder / RECIPE
    spec = data or (load_recipe(str(recipe)).eval_data if recipe.is_file() else None)
    if spec is None:
        raise PadstError(f"'{source.name}' names no data to check the export on; give some with --data")
    labels = getattr(source.config, "label2id", None)
    corpus = load_corpus(spec, split="heldout", modality=source.modality, label2id=labels, leave_out=is_no_data)
    items: TokenWindows | ImageItems
    if isinstance(corpus, TextCorpus):
        positions = getattr(source.config, "max_position_embeddings", CHECK_TOKENS)
        items = TokenWindows.from_corpus(corpus, processor, min(CHECK_TOKENS, positions), vocabulary_size(source))
    else:
        items = ImageItems(corpus, processor)
    batch = collate([items[index] for index in range(min(CHECK_ITEMS, len(items)))])
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    return inputs, f"{next(iter(inputs.values())).shape[0]} samples of {corpus.name}"


def _verify(
    written: Path,
    output: Path,
    reference: nn.Module,
    batch: dict[str, Tensor],
    checked_on: str,
    form: str,
    value_dtype: str,
    device: str,
    dense_parameters: int,
) -> ExportResult:
    opened = load(str(written), device=device)
    error = float((_outputs(opened.model, batch) - _outputs(reference, batch)).abs().max())
    # On the CPU everything is opened as float32: what is on disk says what was rounded.
    dtype = checkpoint_dtype(opened.source)
    exact = dtype == torch.float32 and (form == "dense" or value_dtype == "float32")
    if not error <= FLOAT32_TOLERANCE and exact:
        raise CheckFailed(
            f"the exported model differs from the trained one by {error:.2e} on {checked_on}; nothing was written"
        )
    weights = [file for file in written.iterdir() if file.suffix == ".safetensors"]
    return ExportResult(
        output=str(output),
        format=form,
        value_dtype=value_dtype if form == "packed" else str(dtype).removeprefix("torch."),
        files=sorted(file.name for file in written.iterdir()),
        dense_bytes=dense_parameters * dtype.itemsize,
        packed_bytes=sum(file.stat().st_size for file in weights),
        max_abs_logit_error=error,
        checked_on=checked_on,
        kernels=kernels_of(opened.model, 1, CHECK_TOKENS),
    )


@torch.no_grad()
def _outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state of a model without a head, float32."""
    inputs = {
        key: value.to(next(model.parameters()).dtype) if value.is_floating_point() else value
        for key, value in batch.items()
    }
    found = model(**inputs)
    logits = getattr(found, "logits", None)
    result: Tensor = found.last_hidden_state if logits is None else logits
    return result.float()
