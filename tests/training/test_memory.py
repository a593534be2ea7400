"""Freed memory: kept while training, handed back afterwards."""

import resource

import pytest
import torch

from padst_cli.training import memory
from padst_cli.training.memory import kept_memory

FLOATS = 16 << 20
"""64 MiB: more than glibc ever keeps by itself."""

glibc = pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")


def page_faults() -> int:
    """Pages that the system had to hand out for one allocation."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(FLOATS).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@glibc
def test_what_is_freed_inside_serves_again_and_goes_back_at_the_end():
    outside = page_faults()
    with kept_memory(torch.device("cpu")):
        page_faults()
        again, inside = page_faults(), resident()
    assert again < outside / 4
    assert resident() < inside - 2 * FLOATS
    assert page_faults() > outside / 4


@glibc
def test_the_usual_ways_come_back_after_an_error():
    with pytest.raises(ZeroDivisionError), kept_memory(torch.device("cpu")):
        1 / 0  # noqa: B018
    page_faults()
    assert page_faults() > 4


def test_nothing_is_asked_of_the_allocator_elsewhere(monkeypatch):
    def refuse(*_):
        raise AssertionError("mallopt was called")

    class Library:
        mallopt = malloc_trim = staticmethod(refuse)

    monkeypatch.setattr(memory, "_glibc", Library)
    with kept_memory(torch.device("cuda")):
        pass
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with kept_memory(torch.device("cpu")):
        pass
