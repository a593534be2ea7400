"""The Triton kernels in graphs, and a padst without triton: what can be seen without running a kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from padst_kernels.cpu import native
from padst_kernels.gpu import rules
from torch import nn

from tests.runtime.test_packed_linear import make

STRUCTURES = ("block", "diag", "nm")


@pytest.fixture
def on_triton(monkeypatch):
    """Layers on the CPU take the Triton kernels, as on a GPU; they can be traced there, not run."""
    pytest.importorskip("triton")
    monkeypatch.setattr(native, "serves", lambda *_: False)
    monkeypatch.setattr(rules, "serves", lambda *_: True)
    torch._dynamo.reset()


class Recorded(Exception):
    """Stops a compilation where its graph is complete."""


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_compiled_in_one_graph_down_to_the_kernel(structure):
    from torch._dynamo.backends.common import aot_autograd

    layer, graphs = make(structure)[0].eval(), []

    def record(module, _):
        graphs.append(module.print_readable(print_output=False))
        raise Recorded

    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    with torch.no_grad(), pytest.raises(Exception, match="Recorded"):
        compiled(torch.randn(3, 80))
    assert graphs[0].count("triton_kernel_wrapper_functional") == 1


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_exported_as_one_operator_for_any_number_of_tokens(structure):
    layer = nn.Sequential(make(structure)[0]).eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(layer, (torch.randn(5, 80),), dynamic_shapes=({0: tokens},), strict=True)
    calls = [node for node in program.graph.nodes if node.op == "call_function" and "padst" in str(node.target)]
    assert [str(node.target) for node in calls] == [f"padst.triton_{structure}.default"]
    shape = calls[0].meta["val"].shape
    assert isinstance(shape[0], torch.SymInt)
    assert shape[1] == 48


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
assert not any(name.startswith("padst_kernels.gpu.") and name != "padst_kernels.gpu.rules" for name in sys.modules)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
