"""Made-up figures of cells, and runs that are stood in for by a script that takes no time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from padst_cli.study.figures import CellFigures


@pytest.fixture
def figures() -> Callable[..., CellFigures]:
    """Figures of one cell, made up but for what is named."""

    def make(structure: str, method: str, seed: int, kl: float | None, final: float, **changes: Any) -> CellFigures:
        values: dict[str, Any] = {
            "model": "tiny",
            "structure": structure,
            "method": method,
            "sparsity": 0.9,
            "seed": seed,
            "sparsity_achieved": 0.9,
            "task": "causal-lm",
            "metric": "perplexity",
            "final": final,
            "initial": 90.0,
            "dense": 8.0,
            "kl_to_dense": kl,
            "dense_finetuned": None,
            "dense_finetuned_kl_to_dense": None,
            "steps": 10,
            "seconds": 5.0,
            "step_seconds": 0.1,
            "soft_step_seconds": None,
            "peak_bytes": 500_000_000,
            "learned": 0,
            "moved": 0,
            "eval_data": "heldout.txt",
            "eval_digest": "abc",
            "hardware": "some CPU",
        }
        return CellFigures(**{**values, **changes})

    return make
