"""The torch paths against the dense product in float64, on odd shapes, with poisoned neighbours and gradients."""

from __future__ import annotations

import pytest
import torch
from padst_kernels.cpu import torch_paths
from padst_kernels.cpu.torch_paths import DenseInPlace, DenseMatmul, GatherBmm
from torch.nn import functional

SHAPES = [(64, 48), (48, 160), (100, 70), (33, 129), (16, 16)]


@pytest.mark.parametrize("sides", ["", "i", "o", "io"])
@pytest.mark.parametrize("block_rows", ["even", "free"])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_gather_bmm_equals_the_dense_product(make_case, out_features, in_features, block_rows, sides):
    case = make_case("block", out_features, in_features, 0.3, sides, block_rows=block_rows)
    kernel = GatherBmm(case.layout)
    bias = torch.randn(out_features, dtype=torch.float64)
    for leading in ((), (1,), (3, 5), (2, 1, 4)):
        x = torch.randn(*leading, in_features, dtype=torch.float64)
        expected = functional.linear(x, case.weight.double(), bias)
        torch.testing.assert_close(kernel(x, bias), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel(x, None), expected - bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("structure", ["diag", "nm", "block", "unstructured"])
def test_dense_matmul_equals_the_dense_product(make_case, structure):
    case = make_case(structure, 40, 96, 0.25, "io")
    x = torch.randn(2, 3, 96)
    assert torch.equal(DenseMatmul(case.layout)(x, None), functional.linear(x, case.weight))


def test_long_inputs_are_taken_in_pieces(make_case, monkeypatch):
    case = make_case("block", 96, 64, 0.4, "i")
    x = torch.randn(50, 64, dtype=torch.float64)
    whole = GatherBmm(case.layout)(x, None)
    monkeypatch.setattr(torch_paths, "GATHERED_ENTRIES", 64 * 7)
    torch.testing.assert_close(GatherBmm(case.layout)(x, None), whole, rtol=1e-12, atol=1e-12)


def test_no_tokens_give_no_outputs(make_case):
    case = make_case("block", 96, 64, 0.2, "io")
    for kernel in (GatherBmm(case.layout), DenseMatmul(case.layout)):
        assert kernel(torch.randn(2, 0, 64), torch.zeros(96)).shape == (2, 0, 96)


@pytest.mark.parametrize("kernel", [GatherBmm, DenseMatmul])
def test_gradients_reach_the_input(make_case, kernel):
    case = make_case("block", 70, 50, 0.4, "io")
    x = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 70, dtype=torch.float64)
    (kernel(case.layout)(x, None) * y).sum().backward()
    torch.testing.assert_close(x.grad, y @ case.weight.double())


@pytest.mark.parametrize("kernel", [GatherBmm, DenseMatmul])
def test_what_inference_mode_prepared_serves_gradients_later(make_case, kernel):
    case = make_case("block", 64, 48, 0.4, "i")
    bound = kernel(case.layout)
    with torch.inference_mode():
        bound(torch.randn(2, 48), None)
    x = torch.randn(2, 48, requires_grad=True)
    bound(x, None).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kernel", [GatherBmm, DenseMatmul])
def test_the_product_is_computed_in_the_dtype_of_the_input(make_case, kernel):
    case = make_case("block", 64, 48, 0.4, "o", dtype=torch.bfloat16)
    bound = kernel(case.layout)
    x = torch.randn(2, 48)
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)):
        y = bound(x.to(dtype), None)
        assert y.dtype is dtype
        expected = functional.linear(x.to(dtype).double(), case.weight.double())
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kernel", [GatherBmm, DenseMatmul, DenseInPlace])
def test_neither_the_bias_nor_autocast_changes_the_dtype(make_case, kernel, autocast):
    case = make_case("block", 64, 48, 0.4, "o")
    case.layout.support, case.layout.repack = lambda: case.weight != 0, lambda *_: {}
    x, bias = torch.randn(3, 48), torch.randn(64)
    bound = kernel(case.layout)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = bound(x.to(dtype), bias)
        assert y.dtype is dtype
        expected = functional.linear(x.to(dtype).double(), case.weight.to(dtype).double(), bias.to(dtype).double())
        tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_resident_bytes_count_what_is_kept(make_case):
    case = make_case("block", 64, 64, 0.25, "i")
    dense, gather = DenseMatmul(case.layout), GatherBmm(case.layout)
    assert dense.resident_bytes() == gather.resident_bytes() == 0
    x = torch.randn(1, 64)
    dense(x, None)
    gather(x, None)
    assert dense.resident_bytes() == 64 * 64 * 4
    blocks = case.layout.parameters["count"]
    rows = int((case.layout.tensors["row_offsets"].diff() > 0).sum())
    assert gather.resident_bytes() == blocks * 16 * 16 * 4 + 8 * (blocks * 16 + rows)
