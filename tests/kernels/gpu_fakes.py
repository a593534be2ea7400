"""A device that is not there: its properties, and a clock that is told how long things take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from padst_kernels.gpu import measured

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """torch knows one GPU, and the cache folder is empty; what is set on the result changes its properties."""
    facts = SimpleNamespace(
        name="Pretended", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20, total_memory=80 << 30
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _=None: facts)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    measured.forget()
    yield facts
    measured.forget()


class Clock:
    """A timer whose seconds are what the timed work adds up in `passed`; `calls` counts what was timed."""

    def __init__(self):
        self.passed, self.calls = 0.0, 0

    def __call__(self, work):
        self.calls += 1
        before = self.passed
        work()
        return self.passed - before
