"""padst: make a pretrained Hugging Face model structurally sparse, so that it runs faster, at the least loss of
accuracy.

Importing this package makes padst folders known to transformers (`from_pretrained`, `save_pretrained`); neither torch
nor transformers is imported by it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from padst_cli.pipeline import evaluate, export, sparsify
    from padst_cli.runtime.load import load

__all__ = ["__version__", "evaluate", "export", "load", "sparsify"]

_LAZY = {
    "sparsify": "padst_cli.pipeline",
    "evaluate": "padst_cli.pipeline",
    "export": "padst_cli.pipeline",
    "load": "padst_cli.runtime.load",
}
_REGISTRY = "transformers.quantizers.auto"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("padst")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'padst_cli' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register() -> None:
    # The module registers at its end: it may itself be what imports transformers, and then has not got there yet.
    importlib.import_module("padst_cli.runtime.quantizer")


class _RegisterAfterImport:
    """A meta path finder that waits for transformers' quantizer registry and registers padst's format after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            _call_after_execution(spec.loader)
        return spec


def _call_after_execution(loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _register()

    loader.exec_module = exec_module


if _REGISTRY in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterImport())
