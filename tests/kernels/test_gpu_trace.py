"""The Triton kernels in graphs, and a padst without triton: what can be seen without running a kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from padst_kernels import dispatch
from padst_kernels.cpu import native
from padst_kernels.dispatch import prepare
from padst_kernels.gpu import rules
from torch import nn

from padst_cli.runtime import packed_linear
from tests.runtime.test_packed_linear import make

STRUCTURES = ("block", "diag", "nm")


@pytest.fixture
def on_triton(monkeypatch):
    """Layers on the CPU take the Triton kernels, as on a GPU; they can be traced there, not run."""
    triton = pytest.importorskip("triton")
    # Tracing reads a kernel's accesses off its intermediate code, for which triton wants to know the device.
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(native, "serves", lambda *_: False)
    monkeypatch.setattr(rules, "serves", lambda *_: True)
    torch._dynamo.reset()


def recorded(layer, graphs, dynamic=None):
    """The layer compiled into graphs that are added to a list, forward and backward; zeros are what they return."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def record(module, _):
        graphs.append(module.graph)
        results = [None if node is None else node.meta["val"] for node in module.graph.output_node().args[0]]
        return make_boxed_func(
            lambda *_: [
                None if each is None else torch.zeros([int(size) for size in each.shape], dtype=each.dtype)
                for each in results
            ]
        )

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    return torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)


def graphs_of(layer, x):
    """The graphs that a compiler is handed for the layer."""
    graphs = []
    y = recorded(layer, graphs)(x)
    if x.requires_grad:
        y.sum().backward()
    return graphs


def kernels_in(graph):
    return [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]


def operators_in(program):
    return [node for node in program.graph.nodes if node.op == "call_function" and "padst" in str(node.target)]


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_compiled_in_one_graph_down_to_the_kernel(structure):
    with torch.no_grad():
        (graph,) = graphs_of(make(structure)[0].eval(), torch.randn(3, 80))
    (kernel,) = kernels_in(graph)
    assert kernel.kwargs["tensors_to_clone"] == ["y"], "something other than the output counts as written"


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("sides", ["", "io"])
def test_a_pass_over_activations_is_part_of_the_graph(monkeypatch, structure, tokens, sides):
    from padst_kernels.gpu import permute

    monkeypatch.setattr(permute, "WORTH", 0)
    layer = make(structure, sides=sides)[0].eval()
    moved = structure == "diag" or (structure == "nm" and 1 < tokens <= 16)
    expected = 1 + ("i" in sides or moved) + ("o" in sides)
    with torch.no_grad():
        (graph,) = graphs_of(layer, torch.randn(tokens, 80))
    assert len(kernels_in(graph)) == expected


@pytest.mark.usefixtures("on_triton")
def test_an_activation_is_part_of_the_kernel():
    layer = make("block")[0].eval()
    layer.epilogue = ("gelu", nn.GELU())
    with torch.no_grad():
        (graph,) = graphs_of(layer, torch.randn(3, 80))
    assert not [node for node in graph.nodes if "gelu" in str(node.target)]
    layer.epilogue = ("tanh", nn.Tanh())
    torch._dynamo.reset()
    with torch.no_grad():
        (graph,) = graphs_of(layer, torch.randn(3, 80))
    assert [node for node in graph.nodes if "tanh" in str(node.target)]


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_are_compiled_with_it(structure):
    graphs = graphs_of(make(structure)[0].eval(), torch.randn(3, 80, requires_grad=True))
    assert [len(kernels_in(graph)) for graph in graphs] == [1, 1]


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("strict", [True, False])
def test_exported_as_one_operator_for_any_number_of_tokens(structure, strict):
    layer = nn.Sequential(make(structure)[0]).eval()
    prepare(layer[0].layout(), torch.float32)  # what a call does
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(layer, (torch.randn(5, 80),), dynamic_shapes=({0: tokens},), strict=strict)
    calls = operators_in(program)
    assert [str(node.target) for node in calls] == [f"padst.triton_{structure}.default"]
    shape = calls[0].meta["val"].shape
    assert isinstance(shape[0], torch.SymInt)
    assert shape[1] == 48


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_was_not_called_or_has_changed_is_exported_as_a_dense_product_and_this_is_said(structure, caplog):
    packed_linear._say_unpacked.cache_clear()
    layer, weight, bias = make(structure)
    x = torch.randn(5, 80)

    def exported():
        program = torch.export.export(layer, (x,), strict=False)
        assert not operators_in(program)
        return program.module()(x)

    torch.testing.assert_close(exported(), nn.functional.linear(x, weight, bias))
    assert "call the model once before torch.export" in caplog.text
    prepare(layer.layout(), torch.float32)
    layer.values.mul_(2)
    torch.testing.assert_close(exported(), nn.functional.linear(x, 2 * weight, bias))
    prepare(layer.layout(), torch.float32)
    layer.values = nn.Parameter(layer.values.detach() * 2, requires_grad=False)
    torch.testing.assert_close(exported(), nn.functional.linear(x, 4 * weight, bias))
    prepare(layer.layout(), torch.float32)
    assert operators_in(torch.export.export(layer, (x,), strict=False))


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("example", [5, 50])
def test_exported_for_any_number_of_tokens_by_the_kernel_of_the_example(monkeypatch, example):
    monkeypatch.setattr(rules, "serves", lambda _, __, tokens, *___: tokens > 16)
    monkeypatch.setattr(dispatch, "_can_be_dense", lambda *_: False)  # nothing is on a GPU
    layer = nn.Sequential(make("diag")[0]).eval()
    prepare(layer[0].layout(), torch.float32)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    x = torch.randn(example, 80)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},), strict=False)
    assert len(operators_in(program)) == (example > 16)
    if example <= 16:
        assert program.module()(torch.randn(3000, 80)).shape == (3000, 48)


@pytest.mark.usefixtures("on_triton")
def test_a_dense_copy_of_another_dtype_is_not_made_while_a_graph_is_traced(monkeypatch):
    monkeypatch.setattr(rules, "serves", lambda *_: False)
    layer, weight, _ = make("diag", bias=False)
    x = torch.randn(5, 80, dtype=torch.float64)
    layer(x)
    single = torch.export.export(layer, (x.float(),), strict=False).module()
    torch.testing.assert_close(single(x.float()), nn.functional.linear(x.float(), weight))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight.double()))
    assert layer.layout().prepared["torch-dense"].ready(torch.float64)


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_number_of_tokens_takes_a_few_graphs(monkeypatch, structure):
    from padst_kernels.gpu import permute

    monkeypatch.setattr(permute, "WORTH", 0)
    layer = make(structure)[0].eval()
    graphs = []
    with torch.no_grad():
        compiled = recorded(layer, graphs, dynamic=True)
        for tokens in range(20, 240, 20):
            compiled(torch.randn(tokens, 80))
    assert len(graphs) <= 4


def test_the_operator_is_gone_through_where_somebody_looks():
    """Else a kernel works on memory that is not what the tensor stands for, or goes unrecorded."""
    pytest.importorskip("triton")
    from padst_kernels.gpu.common import direct
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            del types
            return function(*arguments, **(keywords or {}))

    x = torch.randn(3)
    assert direct(x)
    assert not direct(nn.Parameter(x))
    assert not direct(torch._neg_view(x))
    with Mode():
        assert not direct(x)
    with forward_ad.dual_level():
        assert not direct(forward_ad.make_dual(x, x))
        assert direct(x)
    assert direct(x)


def test_float32_is_multiplied_as_either_of_torch_s_switches_says():
    pytest.importorskip("triton")
    code = """
import torch
from padst_kernels.gpu.common import precision
found = [precision(torch.float32)]
for setting in ("high", "highest"):
    torch.set_float32_matmul_precision(setting)
    found.append(precision(torch.float32))
torch.backends.cuda.matmul.fp32_precision = "tf32"
print(*found, precision(torch.float32), precision(torch.bfloat16))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout.split() == ["ieee", "tf32", "ieee", "tf32", "ieee"], done.stderr


def test_without_triton_the_cpu_works_and_a_gpu_takes_torch_s_product():
    code = """
import sys
sys.modules["triton"] = None
import torch
from padst_kernels.gpu import rules
from tests.runtime.test_packed_linear import make
assert not rules.HAS_TRITON
for structure in ("block", "diag", "nm"):
    layer, weight, bias = make(structure)
    x = torch.randn(3, 80)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, bias))
    assert layer.kernel_name(1, torch.device("cuda")).startswith("torch-")
with_triton = {f"padst_kernels.gpu.{name}" for name in ("block", "common", "diag", "layer", "nm")}
assert not with_triton & set(sys.modules)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
