"""Launches on a GPU that is not the current one: which device is current is pretended."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from padst_kernels.gpu.device import current, is_current
from padst_kernels.gpu.tuning import tune

from tests.kernels.gpu_fakes import Clock, gpu  # noqa: F401

pytestmark = pytest.mark.usefixtures("gpu")
CPU, CUDA, FIRST, SECOND = (torch.device(name) for name in ("cpu", "cuda", "cuda:0", "cuda:1"))


@pytest.fixture
def switches(monkeypatch):
    """The device that is current, after each switch; the first GPU is at the beginning."""
    made = [0]

    class Switch:
        def __init__(self, device):
            self.device = device.index

        def __enter__(self):
            self.before = made[-1]
            made.append(self.device)

        def __exit__(self, *_):
            made.append(self.before)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: made[-1])
    monkeypatch.setattr(torch.cuda, "device", Switch)
    return made


def test_only_another_gpu_is_made_the_current_one(switches):
    for device in (CPU, CUDA, FIRST):
        assert is_current(device)
        with current(device):
            assert switches == [0]
    assert not is_current(SECOND)
    with current(SECOND):
        assert is_current(SECOND)
    assert switches == [0, 1, 0]


@pytest.mark.parametrize(("device", "expected"), [(FIRST, [0]), (SECOND, [0, 1, 0])], ids=str)
def test_a_kernel_is_launched_where_its_input_is(switches, monkeypatch, device, expected):
    pytest.importorskip("triton")
    from padst_kernels.gpu import common

    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append((switches[-1], grid, arguments))

    monkeypatch.setattr(common, "direct", lambda _: True)
    kernel = Kernel()
    launcher = common.launcher(kernel, SimpleNamespace(device=device))
    assert (launcher is kernel) == (device is FIRST)
    launcher[(3,)](tokens=5)
    assert launched == [(device.index, (3,), {"tokens": 5})]
    assert switches == expected


def test_kernels_are_tuned_and_timed_where_they_run(switches):
    seen = []
    tune(lambda: seen.append(switches[-1]), Clock(), SECOND)
    assert set(seen) == {1}
    assert switches == [0, 1, 0]
