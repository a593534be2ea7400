"""Which kernel is chosen, that it is made once, and that the package stands alone."""

from __future__ import annotations

import ast
from pathlib import Path

import padst_kernels.dispatch
import torch
from padst_kernels.dispatch import GATHER_MAX_DENSITY, kernel_name, select

CPU = torch.device("cpu")


def test_names():
    assert kernel_name("block", 0.1, CPU, 1) == "torch-gather-bmm"
    assert kernel_name("block", GATHER_MAX_DENSITY + 0.01, CPU, 512) == "torch-dense"
    for structure in ("diag", "nm", "unstructured"):
        assert kernel_name(structure, 0.1, CPU, 1) == "torch-dense"


def test_a_kernel_is_made_once_for_a_layout(make_case):
    case = make_case("block", 64, 64, 0.2)
    first = select(case.layout, CPU, 1)
    assert first.name == "torch-gather-bmm"
    assert select(case.layout, CPU, 512) is first
    assert list(case.layout.prepared) == ["torch-gather-bmm"]


def test_the_kernels_never_import_padst_cli():
    root = Path(padst_kernels.dispatch.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.startswith("padst_cli") for name in names), file
    assert not (root / "__init__.py").exists()
