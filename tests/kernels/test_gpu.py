"""The Triton kernels on a real device against float64 (`make test-gpu`)."""

from __future__ import annotations

import copy

import pytest
import torch
from padst_kernels.dispatch import select
from padst_kernels.gpu import rules
from torch.nn import functional

pytest.importorskip("triton")

from padst_kernels.gpu import permute
from padst_kernels.gpu.layer import OPERATORS, TritonKernel

from padst_cli.permutation.apply import random_permutation
from padst_cli.structures import StructureOptions, structure_class
from padst_cli.training.permutation import Permutation
from padst_cli.training.sparse_linear import SparseLinear
from tests.kernels.gpu_cases import (
    DTYPES,
    FAMILIES,
    TOKENS,
    check_forward,
    check_gradients,
    check_transforms,
    close,
    on,
)
from tests.runtime.test_packed_linear import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _triton_wherever_it_computes(monkeypatch):
    def serves(structure, device, _, dtype, values, *__):
        return device.type == "cuda" and rules.computes(structure, dtype, values)

    monkeypatch.setattr(rules, "serves", serves)
    monkeypatch.setattr(rules, "training_pays", lambda *_: True)


SHAPES = [(64, 64), (100, 70), (96, 129), (70, 300), (300, 70), (768, 768), (3072, 768), (768, 3072)]
ONE_EACH = ("diag", "band 16", "band 64", "3:15", "block 16", "block 32", "block 64")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_float64(make_case, family, shape):
    for turn in range(12):  # every dtype with every side
        check_forward(make_case, family, shape, CUDA, TOKENS[turn % 5 :][:1], turn)
    if family.startswith("block"):
        check_forward(make_case, family, shape, CUDA, (128, 1000, 515))


@pytest.mark.parametrize("shape", [(100, 70), (3072, 768), (768, 3072), (768, 768)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_permutations_in_passes_of_their_own(make_case, monkeypatch, family, shape):
    monkeypatch.setattr(permute, "WORTH", 0)
    for turn, tokens in enumerate((1, 2, 3, 5, 16, 17)):
        for dtype in range(3):
            check_forward(make_case, family, shape, CUDA, (tokens,), turn + dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_dense_ones(make_case, monkeypatch, family):
    for shape in ((100, 70), (70, 100), (96, 96), (256, 768)):
        for tokens, activation in (((2, 3), ""), ((5, 100), "gelu"), ((2100,), "silu")):
            check_gradients(make_case, family, shape, CUDA, tokens, activation)
    monkeypatch.setattr(permute, "WORTH", 0)
    check_gradients(make_case, family, (96, 129), CUDA, (200,), "gelu_tanh")


@pytest.mark.parametrize("family", ONE_EACH)
def test_transforms_and_tangents_pass_through(make_case, family):
    check_transforms(make_case, family, (100, 70), CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ONE_EACH)
def test_every_output_is_written(make_case, family, dtype):
    structure, options = FAMILIES[family]
    case = make_case(structure, 200, 136, 0.2, "io", dtype, **options)
    x = torch.randn(17, 136, device=CUDA).to(dtype)
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    try:
        y = select(on(case, CUDA), 17, dtype)(x, None)
    finally:
        torch.use_deterministic_algorithms(False)
    close(y, case.weight.to(CUDA), x, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("structure", ["block", "diag", "nm"])
def test_a_packed_layer_moved_to_the_device(structure, dtype):
    layer, _, _ = make(structure)
    layer = layer.to(CUDA, dtype).eval()
    assert layer.kernel_name(8) == f"cuda-triton-{structure}"
    for tokens in (1, 8, 64, 65):
        x = torch.randn(2, tokens, 80, device=CUDA, dtype=dtype)
        close(layer(x), layer.dense_weight(), x, layer.bias)
    layer.to("cpu")
    assert layer(torch.randn(2, 80, dtype=dtype)).device.type == "cpu"


@pytest.mark.parametrize("structure", ["block", "diag", "nm"])
def test_compiled_and_in_a_cuda_graph(structure):
    layer = make(structure)[0].to(CUDA).eval()
    x = torch.randn(5, 80, device=CUDA)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        expected = functional.linear(x, layer.dense_weight(), layer.bias)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = functional.linear(x, layer.dense_weight(), layer.bias)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"block_size": 32}, {"band": 32}], ids=str)
def test_a_step_of_training_takes_the_kernels(options, dtype):
    structure = structure_class("block" if "block_size" in options else "diag")
    structure = structure.for_density(256, 192, 0.1, StructureOptions(**options))
    dense = torch.randn(256, 192)
    mask = structure.project(dense.square())
    perm = Permutation(random_permutation(192, torch.Generator().manual_seed(0)), mixing=None)
    layer = SparseLinear(structure, torch.where(mask, dense, 0.0), mask, torch.randn(256), perm).to(CUDA)
    double = copy.deepcopy(layer).double()
    layer.dense_gradient = False
    x = torch.randn(4, 700, 192, device=CUDA)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = layer(x)
    expected = double(x.double())
    assert (found.dtype, layer.computed_by) == (dtype, f"cuda-triton-{structure.name}")
    dy = torch.randn_like(found)
    found.backward(dy)
    expected.backward(dy.double())
    wanted = torch.where(layer.mask, double.weight.grad, 0.0)
    for one, other in ((found, expected), (layer.weight.grad, wanted), (layer.bias.grad, double.bias.grad)):
        slack = (3e-2 if dtype is torch.bfloat16 else 1e-4) * float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=slack)


@pytest.mark.parametrize("family", ["block 64", "diag", "band 64", "2:4"])
def test_more_than_two_to_the_31_elements(make_case, family):
    if torch.cuda.get_device_properties(CUDA).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    structure, options = FAMILIES[family]
    case = make_case(structure, 256, 256, 0.1, "io", torch.bfloat16, **options)
    kernel = on(case, CUDA)
    x = torch.zeros((1 << 23) + 64, 256, device=CUDA, dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, 256, device=CUDA).to(torch.bfloat16)
    y = select(kernel, 1, torch.bfloat16)(x, None)
    close(y[-3:], case.weight.to(CUDA), x[-3:], None)
    assert not y[:64].any()
    gradient, (values, index, perm_in, store, _, parameters, *_) = OPERATORS[structure][1], TritonKernel(kernel)._packed
    dy = torch.zeros_like(y)
    dy[-3:] = torch.randn(3, 256, device=CUDA).to(torch.bfloat16)
    found = gradient(x, dy, values, index, perm_in, store, parameters)
    few = gradient(x[-3:], dy[-3:], values, index, perm_in, store, parameters)
    torch.testing.assert_close(found, few, rtol=1e-2, atol=1e-2)
