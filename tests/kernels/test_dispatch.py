"""Which kernel is chosen, that it is made once, and that the package stands alone."""

from __future__ import annotations

import ast
from pathlib import Path

import padst_kernels.dispatch
import torch
from padst_kernels.cpu import native
from padst_kernels.dispatch import GATHER_MAX_DENSITY, compact, kernel_name, select

CPU = torch.device("cpu")


def test_names_with_compiled_kernels():
    for structure in ("diag", "nm", "block"):
        assert kernel_name(structure, 0.1, 768, CPU, 1) == native.kernel_name(structure)
    assert kernel_name("unstructured", 0.1, 768, CPU, 1) == "torch-dense"


def test_names_without_compiled_kernels():
    meta = torch.device("meta")
    assert kernel_name("block", 0.1, 768, meta, 1) == "torch-gather-bmm"
    assert kernel_name("block", GATHER_MAX_DENSITY + 0.01, 768, meta, 512) == "torch-dense"
    for structure in ("diag", "nm", "unstructured"):
        assert kernel_name(structure, 0.1, 768, meta, 1) == "torch-dense"


def test_a_torch_path_is_made_once_for_a_layout(make_case):
    case = make_case("block", 64, 64, 0.2)
    first = select(case.layout, 1)
    assert first.name == "torch-gather-bmm"
    assert select(case.layout, 512) is first
    assert list(case.layout.prepared) == ["torch-gather-bmm"]


def test_what_takes_the_place_of_the_tensors(make_case):
    kernel = compact(make_case("diag", 64, 48, 0.2, "io").layout)
    assert kernel is not None
    assert kernel.name == native.kernel_name("diag")
    assert not kernel.image.is_inference()
    assert compact(make_case("unstructured", 64, 48, 0.2).layout) is None


def test_the_kernels_never_import_padst_cli():
    root = Path(padst_kernels.dispatch.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.startswith("padst_cli") for name in names), file
    assert not (root / "__init__.py").exists()
