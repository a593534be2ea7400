"""The dense weight out of an image, bit for bit, and the product through it against float64."""

from __future__ import annotations

import pytest
import torch
from padst_kernels.cpu import transient
from padst_kernels.cpu.library import TYPES, library
from padst_kernels.cpu.native import NativeKernel, sparse_linear
from torch.nn import functional

from tests.costs import DENSE_WINS
from tests.kernels.test_native import CASES, FAMILIES


def filled(kernel: NativeKernel, dtype: torch.dtype, threads: int) -> torch.Tensor:
    """W written between guard rows, which must stay as they are."""
    room = torch.full((kernel.out_features + 2, kernel.in_features), float("nan"), dtype=dtype)
    transient.fill_dense(kernel.image.data_ptr(), room[1:-1], threads)
    assert bool(room[[0, -1]].isnan().all()), "wrote outside the weight"
    return room[1:-1]


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_the_dense_weight_is_exact(make_case, family, shape):
    structure, options = FAMILIES[family]
    for value_dtype in TYPES:
        for number, sides in enumerate(("", "i", "o", "io")):
            case = make_case(structure, *shape, 0.4, sides, value_dtype, **options)
            kernel = NativeKernel(case.layout)
            for dtype in TYPES:
                assert torch.equal(filled(kernel, dtype, 1 + number % 2), case.weight.to(dtype)), (sides, dtype)


def test_a_dense_layer_comes_back_whole(make_case):
    for structure in ("diag", "nm", "block"):
        case = make_case(structure, 96, 64, 0.999, "io", **({"nm": (16, 16)} if structure == "nm" else {}))
        assert torch.equal(filled(NativeKernel(case.layout), torch.float32, 1), case.weight)


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_the_product_equals_float64(make_case, structure, dtype):
    case = make_case(structure, 100, 70, 0.3, "io", dtype)
    kernel = NativeKernel(case.layout)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for shape in ((1, 70), (2, 3, 70), (130, 70), (0, 70), (70,)):
        for bias in (None, torch.randn(100)):
            x = torch.randn(shape).to(dtype)
            y = transient.linear(kernel.image.data_ptr(), x, bias, 100, 1)
            expected = functional.linear(x.double(), case.weight.double(), None if bias is None else bias.double())
            assert y.shape == expected.shape
            assert y.dtype is dtype
            torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * 4)


def test_all_layers_share_one_scratch_weight(make_case):
    sizes = []
    for out_features in (64, 96, 32):
        kernel = NativeKernel(make_case("diag", out_features, 48, 0.3).layout)
        with torch.inference_mode(out_features == 64):
            transient.linear(kernel.image.data_ptr(), torch.randn(3, 48), None, out_features, 1)
        sizes.append(transient.scratch_bytes())
    assert sizes[0] >= 64 * 48 * 4
    assert sizes[1] == sizes[2] >= 96 * 48 * 4


@pytest.mark.parametrize("structure", ["diag", "nm", "block"])
def test_autocast_and_inference_mode_change_nothing(make_case, structure):
    case = make_case(structure, 64, 48, 0.3, "i")
    kernel, x = NativeKernel(case.layout), torch.randn(5, 48)
    expected = transient.linear(kernel.image.data_ptr(), x, None, 64, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transient.linear(kernel.image.data_ptr(), x, None, 64, 1), expected)
    with torch.inference_mode():
        assert torch.equal(transient.linear(kernel.image.data_ptr(), x, None, 64, 1), expected)


def test_the_operator_and_gradients_take_the_same_path(make_case, machine_costs):
    machine_costs(DENSE_WINS)
    case = make_case("nm", 64, 48, 0.3, "io")
    kernel = NativeKernel(case.layout)
    x, bias = torch.randn(12, 48, requires_grad=True), torch.randn(64)
    assert kernel.name_at(12, torch.float32) == transient.NAME
    y = kernel(x, bias)
    assert torch.equal(y, transient.linear(kernel.image.data_ptr(), x.detach(), bias, 64, torch.get_num_threads()))
    assert torch.equal(sparse_linear(x.detach(), kernel.image, bias, 64), y)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(12, 64) @ case.weight)


def test_what_an_image_is_to_the_cost_model(make_case):
    for structure in ("diag", "nm", "block"):
        layout = make_case(structure, 100, 70, 0.3, "io", torch.bfloat16).layout
        assert transient.work_of(NativeKernel(layout).image.data_ptr()) == layout.work


def test_an_image_of_something_else_is_refused():
    junk = torch.zeros(4096, dtype=torch.uint8)
    assert library().padst_dense(junk.data_ptr(), junk.data_ptr(), 0, 1) < 0
    with pytest.raises(MemoryError, match="could not unpack"):
        transient.fill_dense(junk.data_ptr(), torch.empty(2, 2), 1)
