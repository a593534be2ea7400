"""One thread a test process: small tensors gain nothing from more, and spinning threads starve each other.

The costs of the machine are made up in this process; the processes that tests start measure them at most once, for
they share a cache folder of the session's own.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as Python has it: a test run in the background of a shell is started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def machine_costs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Kernels always win; called with other `Costs`, those hold for layers that choose a path from then on."""
    from padst_kernels.cpu import machine, transient

    from tests.costs import SPARSE_ONLY

    def use(costs: object) -> None:
        monkeypatch.setattr(machine, "costs", lambda _: costs)
        transient.limits.cache_clear()

    use(SPARSE_ONLY)
    yield use
    transient.limits.cache_clear()
