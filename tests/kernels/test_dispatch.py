"""Which kernel is chosen, that it is made once, and that the package stands alone."""

from __future__ import annotations

import ast
from pathlib import Path

import padst_kernels.dispatch
import pytest
import torch
from padst_kernels.cpu import machine, native, transient
from padst_kernels.dispatch import (
    GATHER_MAX_DENSITY,
    DenseInPlace,
    NativeKernel,
    compact,
    kernel_name,
    recalibrate,
    select,
)
from padst_kernels.gpu import rules
from torch.nn import functional

from tests.costs import DENSE_WINS, costs

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda")
TRANSIENT = transient.NAME


def name(layout, tokens: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> str:
    return kernel_name(layout, device, tokens, dtype)


def test_names_with_compiled_kernels(make_case):
    for structure in ("diag", "nm", "block"):
        layout = make_case(structure, 64, 64, 0.2).layout
        assert {name(layout, tokens) for tokens in (1, 4096)} == {native.kernel_name(structure)}
        assert name(layout, 1, dtype=torch.float64) == ("torch-gather-bmm" if structure == "block" else "torch-dense")
    assert name(make_case("unstructured", 64, 64, 0.2).layout, 1) == "torch-dense"


def test_names_without_compiled_kernels(make_case):
    assert name(make_case("block", 64, 64, 0.2).layout, 1, META) == "torch-gather-bmm"
    assert name(make_case("block", 64, 64, GATHER_MAX_DENSITY + 0.05).layout, 512, META) == "torch-dense"
    for structure in ("diag", "nm", "unstructured"):
        assert name(make_case(structure, 64, 64, 0.2).layout, 1, META) == "torch-dense"


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_many_tokens_take_the_transient_product(make_case, machine_costs, structure):
    case = make_case(structure, 64, 48, 0.5, "io")
    # The kernel takes 1 ns an entry and token, the product 0.1 and unpacking 4: at half the entries it pays from 11 on.
    machine_costs(costs(kernel=1e-9, dense=1e-10, unpack=4e-9))
    kernel = compact(case.layout, torch.float32)
    assert isinstance(kernel, NativeKernel)
    for tokens, expected in ((1, native.kernel_name(structure)), (9, native.kernel_name(structure)), (12, TRANSIENT)):
        assert name(case.layout, tokens) == kernel.name_at(tokens, torch.float32) == expected
        x, bias = torch.randn(tokens, 48), torch.randn(64)
        before = transient.scratch_bytes()
        y = kernel(x, bias)
        assert transient.scratch_bytes() >= (64 * 48 * 4 if expected == TRANSIENT else before)
        expected_y = functional.linear(x.double(), case.weight.double(), bias.double())
        torch.testing.assert_close(y.double(), expected_y, rtol=1e-5, atol=1e-5)


def test_the_densest_layers_are_kept_dense_within_their_memory_bound(make_case, machine_costs):
    def decided(density: float, dtype: torch.dtype = torch.float32) -> type:
        case = make_case("diag", 256, 256, density, "i")
        layout = case.layout
        layout.support, layout.repack = lambda: case.weight != 0, lambda weight, _: {"values": weight}
        kernel = compact(layout, dtype)
        assert name(layout, 8, dtype=dtype) == kernel.name_at(8, dtype)
        return type(kernel)

    assert decided(0.95) is NativeKernel
    machine_costs(DENSE_WINS)
    assert decided(0.95) is NativeKernel  # unpacking costs nothing here, so a weight at hand gains nothing
    machine_costs(costs(kernel=1e-9, dense=1e-10, unpack=1e-9))
    assert decided(0.95) is DenseInPlace
    assert decided(0.95, torch.bfloat16) is NativeKernel
    assert decided(0.8) is NativeKernel  # over 1.15 of its share


def test_recalibrating_counts_for_the_layers_to_come(make_case, monkeypatch):
    layout = make_case("diag", 64, 48, 0.5).layout
    assert name(layout, 64) == native.kernel_name("diag")
    monkeypatch.setattr(machine, "recalibrate", lambda _: monkeypatch.setattr(machine, "costs", lambda _: DENSE_WINS))
    recalibrate(1)
    assert name(layout, 64) == TRANSIENT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_names_on_a_gpu(make_case, monkeypatch, dtype):
    monkeypatch.setattr(rules, "HAS_TRITON", True)
    for structure, options in (("diag", {}), ("diag", {"band": 64}), ("nm", {"nm": (1, 10)}), ("block", {})):
        layout = make_case(structure, 640, 640, 0.1, **options).layout
        triton = f"cuda-triton-{structure}"
        assert name(layout, 1, CUDA, dtype) == triton
        expected = triton if structure == "block" else "torch-dense"
        assert {name(layout, tokens, CUDA, dtype) for tokens in (2, 16, 17, 1 << 20)} == {expected}
    for structure in ("diag", "nm", "block"):
        assert name(make_case(structure, 640, 640, 0.5).layout, 1, CUDA, dtype) == "torch-dense"
    assert name(make_case("block", 640, 640, 0.2, block_size=16).layout, 17, CUDA, dtype) == "torch-dense"
    assert name(make_case("unstructured", 64, 64, 0.2).layout, 1, CUDA, dtype) == "torch-dense"


def test_training_pays_on_a_gpu_where_an_activation_is_used_often():
    for size in (16, 64):
        limit = size / rules.READ_COST
        assert rules.training_pays("block", {"block_size": size}, 0.99 * limit)
        assert not rules.training_pays("block", {"block_size": size}, 1.01 * limit)
    for structure, parameters in (("diag", {"band": 64}), ("nm", {"n": 1, "m": 10}), ("unstructured", {})):
        assert not rules.training_pays(structure, parameters, 0.01)


def test_names_on_a_gpu_that_triton_does_not_serve(make_case, monkeypatch):
    layout = make_case("diag", 64, 64, 0.2).layout
    monkeypatch.setattr(rules, "HAS_TRITON", True)
    assert name(layout, 1, CUDA, torch.float64) == "torch-dense"
    assert name(make_case("diag", 64, 64, 0.2, dtype=torch.float64).layout, 1, CUDA) == "torch-dense"
    monkeypatch.setattr(rules, "HAS_TRITON", False)
    assert name(layout, 1, CUDA) == "torch-dense"


def test_a_torch_path_is_made_once_for_a_layout(make_case):
    case = make_case("block", 64, 64, 0.2)
    first = select(case.layout, 1, torch.float32)
    assert first.name == "torch-gather-bmm"
    assert select(case.layout, 512, torch.float32) is first
    assert list(case.layout.prepared) == ["torch-gather-bmm"]


def test_what_takes_the_place_of_the_tensors(make_case):
    kernel = compact(make_case("diag", 64, 48, 0.2, "io").layout, torch.float32)
    assert kernel is not None
    assert kernel.name == native.kernel_name("diag")
    assert not kernel.image.is_inference()
    assert compact(make_case("unstructured", 64, 48, 0.2).layout, torch.float32) is None


def test_the_kernels_never_import_padst_cli():
    root = Path(padst_kernels.dispatch.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.startswith("padst_cli") for name in names), file
    assert not (root / "__init__.py").exists()
