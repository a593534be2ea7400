"""train -> pack -> checkpoint: what a finished run leaves in its folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator

from padst_cli.checkpoint.run_folder import REPORT, RunFolder
from padst_cli.checkpoint.writer import atomic_folder, copy_processor_files, write_model
from padst_cli.initialise import LayerStart
from padst_cli.permutation.apply import from_structure
from padst_cli.pipeline.cards import write_run_card
from padst_cli.pipeline.job import Job
from padst_cli.report import LayerRow, ReportData, Support, write_report
from padst_cli.runtime.packed_linear import PackedLinear
from padst_cli.runtime.packing import install
from padst_cli.training.swap import SparseState, finished_layers


def environment(accelerator: Accelerator) -> dict[str, str]:
    """Hardware and versions that a figure depends on."""
    on_gpu = accelerator.device.type == "cuda"
    hardware = torch.cuda.get_device_name(accelerator.device) if on_gpu else _processor_name()
    return {
        "hardware": f"{hardware}, {os.cpu_count()} CPU cores",
        "processes": str(accelerator.num_processes),
        "threads": str(torch.get_num_threads()),
        "mixed_precision": str(accelerator.mixed_precision),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def finish_run(
    job: Job,
    folder: RunFolder,
    accelerator: Accelerator,
    student: Any,
    starts: Mapping[str, LayerStart],
    results: dict[str, Any],
    command: str,
) -> None:
    """Pack the student (its modules are replaced) and write checkpoint, card, report and figures into the folder."""
    if accelerator.is_main_process:
        states = finished_layers(student)
        student.to("cpu")
        install(student, {name: _packed(states[name], job, name) for name in states}, "training")
        checkpoint = folder.state / "checkpoint"
        whole = results | {"command": command}
        recipe_yaml = job.recipe.to_yaml()
        with atomic_folder(checkpoint, overwrite=True) as temporary:
            write_model(student, temporary)
            copy_processor_files(job.source.folder, temporary)
            write_run_card(job.source, temporary, whole, recipe_yaml)
            write_report(temporary / REPORT, _report(job, folder, states, starts, whole, recipe_yaml))
        folder.finish(checkpoint, whole)
    accelerator.wait_for_everyone()


def _report(
    job: Job,
    folder: RunFolder,
    states: Mapping[str, SparseState],
    starts: Mapping[str, LayerStart],
    results: dict[str, Any],
    recipe_yaml: str,
) -> ReportData:
    supports = {}
    for name, state in states.items():
        mask = state.mask.cpu()
        perms = [None if perm is None else perm.cpu() for perm in (state.perm_in, state.perm_out)]
        supports[name] = Support.from_masks(mask, from_structure(mask, *perms))
    rows = [
        LayerRow(
            name=layer.name,
            structure=layer.structure,
            sides=layer.sides,
            shared_with=None if layer.leads else layer.shared[0],
            error_mask=starts[layer.name].error_mask,
            error=starts[layer.name].error,
            kept=starts[layer.name].kept,
        )
        for layer in job.plan.layers
    ]
    return ReportData(
        model=job.source.name,
        result=results,
        events=folder.events(),
        layers=rows,
        recipe_yaml=recipe_yaml,
        command=results["command"],
        supports=supports,
        environment=results["environment"],
    )


def _packed(state: SparseState, job: Job, name: str) -> PackedLinear:
    transposed = next(layer.transposed for layer in job.plan.layers if layer.name == name)
    parts = (state.weight, state.mask, state.bias, state.perm_in, state.perm_out)
    weight, mask, bias, perm_in, perm_out = (None if part is None else part.detach().cpu() for part in parts)
    assert weight is not None
    assert mask is not None
    return PackedLinear.from_sparse(state.structure, weight, mask, bias, perm_in, perm_out, transposed=transposed)


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
