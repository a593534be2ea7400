"""The arrows between the parts: checkpoint -> plan -> initialise -> train -> pack -> checkpoint -> runtime.

One function an arrow, dataclasses in and out, nothing printed: progress goes to an event callback.
"""

from padst_cli.pipeline.exporting import ExportResult, export
from padst_cli.pipeline.job import is_main_process
from padst_cli.pipeline.measure import EvaluateResult, evaluate
from padst_cli.pipeline.planning import PlanResult, default_output, plan
from padst_cli.pipeline.run import SparsifyResult, sparsify
from padst_cli.pipeline.serve import bench, generate, inspect

__all__ = [
    "EvaluateResult",
    "ExportResult",
    "PlanResult",
    "SparsifyResult",
    "bench",
    "default_output",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "is_main_process",
    "plan",
    "sparsify",
]
