"""What only a real device shows beside right figures: tuning, paths, graphs, memory errors (`make test-gpu`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from padst_kernels.dispatch import calibrate_gpu, select
from padst_kernels.gpu import measured, semi, timing, tuning
from padst_kernels.gpu.calibrate import calibrate_training
from padst_kernels.gpu.paths import fastest
from padst_kernels.gpu.semi import SemiStructured, Unavailable
from torch import nn
from torch.nn import functional

pytest.importorskip("triton")

from padst_kernels.gpu import permute
from padst_kernels.gpu.layer import TritonKernel

from padst_cli.bench import gpu_table
from padst_cli.bench.calibrate import _steps
from padst_cli.bench.gpu_rows import TINY, Setting, groups
from padst_cli.bench.train import as_trained, layer_step, random_pair
from padst_cli.training.sparse_linear import DENSE_PRODUCT
from tests.kernels.gpu_cases import FAMILIES, close, on
from tests.runtime.test_packed_linear import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_figures(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.forget()
    yield
    measured.forget()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("worth", [0, permute.WORTH])
def test_every_config_of_every_space_computes_the_same(make_case, monkeypatch, family, dtype, worth):
    monkeypatch.setattr(permute, "WORTH", worth)
    structure, options = FAMILIES[family]
    case = make_case(structure, 320, 256, 0.2, "io", dtype, **options)
    kernel = TritonKernel(on(case, CUDA))
    for tokens in (1, 3, 16, 65, 300):
        x = torch.randn(tokens, 256, device=CUDA).to(dtype)
        with tuning._trying() as trial:
            kernel(x, None)
            for place, space in list(trial.spaces.items()):
                for cut in space:
                    trial.forced = {place: cut}
                    try:
                        y = kernel(x, None)
                    except Exception as error:
                        if not tuning.refused(error):
                            raise
                    else:
                        close(y, case.weight.to(CUDA), x, None)


@pytest.mark.parametrize("family", ["diag", "3:15", "block 32"])
def test_calibrating_keeps_figures_that_choose_the_path(make_case, family):
    structure, options = FAMILIES[family]
    case = make_case(structure, 1024, 1024, 0.1, "i", torch.bfloat16, **options)
    layout = on(case, CUDA)
    assert calibrate_gpu([layout], torch.bfloat16, tokens=(1, 512)) == 0
    known = measured.of(CUDA)
    (by_tokens,) = known.paths.values()
    assert set(by_tokens) == {1, 512}
    assert {"torch-dense", f"cuda-triton-{structure}"} <= set(by_tokens[1])
    assert all(0 < seconds < 1 for times in by_tokens.values() for seconds in times.values())
    measured.forget()
    assert measured.of(CUDA) == known
    for tokens in (1, 512):
        x = torch.randn(tokens, 1024, device=CUDA, dtype=torch.bfloat16)
        close(select(layout, tokens, torch.bfloat16)(x, None), case.weight.to(CUDA), x, None)


def test_seconds_are_those_of_the_device():
    small, large = (torch.empty(size, dtype=torch.uint8, device=CUDA) for size in (1 << 20, 1 << 30))
    few, many = (timing.seconds(tensor.zero_) for tensor in (small, large))
    assert 20 * few < many < 1


@pytest.mark.parametrize("dtype", sorted(semi.DTYPES, key=str), ids=str)
@pytest.mark.parametrize("sides", ["", "io"])
def test_two_of_four_equals_float64(make_case, dtype, sides):
    case = make_case("nm", 256, 192, 0.5, sides, dtype, nm=(2, 4))
    kernel = SemiStructured(on(case, CUDA))
    try:
        kernel.prepare(dtype)
    except Unavailable as error:
        pytest.skip(f"torch has no 2:4 product here: {error}")
    bias = torch.randn(256, device=CUDA)
    for tokens in (1, 17, 128, 1000):
        x = torch.randn(tokens, 192, device=CUDA).to(dtype)
        close(kernel(x, bias), case.weight.to(CUDA), x, bias)
    graph, y = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        y = kernel(x, bias)
    x.copy_(torch.randn_like(x))
    graph.replay()
    close(y, case.weight.to(CUDA), x, bias)


@pytest.mark.parametrize("structure", ["block", "diag", "nm"])
def test_exported_and_run(structure):
    layer = nn.Sequential(make(structure)[0].to(CUDA)).eval()
    x = torch.randn(5, 80, device=CUDA)
    program = torch.export.export(layer, (x,), strict=True)
    expected = functional.linear(x, layer[0].dense_weight(), layer[0].bias)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("structure", ["block", "diag", "nm"])
def test_compiled_after_calibrating_and_nothing_is_tuned_in_a_graph(structure, monkeypatch):
    layer = make(structure)[0].to(CUDA).eval()
    calibrate_gpu([layer.layout()], torch.float32, tokens=(1, 8))
    monkeypatch.setattr(tuning, "tune", lambda *_: pytest.fail("tuned"))
    compiled = torch.compile(layer, fullgraph=True)
    graph = torch.cuda.CUDAGraph()
    x = torch.randn(5, 80, device=CUDA)
    with torch.no_grad():
        expected = functional.linear(x, layer.dense_weight(), layer.bias)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        layer(x)
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("structure", ["block", "diag", "nm"])
def test_a_layer_in_training_takes_what_was_the_fastest(structure):
    packed = make(structure)[0].to(CUDA, torch.bfloat16)
    name = as_trained(packed).gpu_signature(torch.bfloat16)
    assert calibrate_training({name: partial(_steps, packed)}, CUDA, tokens=(64,)) == 0
    times = measured.of(CUDA).paths[name][64]
    assert set(times) == {"torch-dense", f"cuda-triton-{structure}"}
    assert all(0 < seconds < 1 for seconds in times.values())
    assert {cut.split()[0] for cut in measured.of(CUDA).cuts} == {structure}
    trained = as_trained(packed)
    x, dy = random_pair(packed, 64, torch.Generator().manual_seed(0))
    layer_step(trained, trained, x, dy)()
    assert trained.computed_by == {"torch-dense": DENSE_PRODUCT}.get(fastest(times), f"cuda-triton-{structure}")
    assert trained.weight.dtype is trained.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("name", [group.name for group in groups(TINY)])
def test_the_rows_of_the_table_run(name, tmp_path):
    group = next(group for group in groups(TINY) if group.name == name)
    gpu_table.measure(group, Setting(CUDA, torch.bfloat16, TINY), tmp_path / "rows")
    lines = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [line["row"] for line in lines] == [row.name for row in group.rows]
    assert not [line for line in lines if "error" in line]


_SMALL_CASES = """
import torch
from tests.runtime.test_packed_linear import make
for structure in ("block", "diag", "nm"):
    layer = make(structure)[0].to("cuda").eval()
    for tokens in (1, 17):
        layer(torch.randn(tokens, 80, device="cuda", requires_grad=True)).sum().backward()
torch.cuda.synchronize()
"""


def test_no_memory_errors():
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on the PATH: memory errors were not looked for")
    # Without torch's own cache an access outside a tensor is one outside an allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", _SMALL_CASES]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors" in done.stdout
