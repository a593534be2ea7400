"""Freed memory: kept while training, handed back afterwards."""

import json
import subprocess
import sys

import pytest
import torch

from padst_cli.training import memory
from padst_cli.training.memory import kept_memory

glibc = pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")

PROGRAM = '''
import json
import resource

import torch
from torch import nn

from padst_cli.training.memory import kept_memory

model = nn.Sequential(nn.Linear(64, 4096), nn.GELU(), nn.Linear(4096, 64))
x = torch.randn(4096, 64)  # hidden activations of 64 MiB: more than glibc ever keeps by itself


def faults():
    for step in range(15):
        if step == 12:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model(x).square().mean().backward()
        model.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def faults_again():
    """Of a block of a GiB, more than all that was freed before, when it is asked for a second time."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = torch.empty(1 << 28).fill_(1.0)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


told = {"outside": faults()}
with kept_memory(torch.device("cpu")):
    told |= {"inside": faults(), "resident inside": resident()}
told |= {"resident": resident(), "again": faults_again()}
try:
    with kept_memory(torch.device("cpu")):
        raise ZeroDivisionError
except ZeroDivisionError:
    told["again after an error"] = faults_again()
print(json.dumps(told))
'''
"""Page faults of three steps and of one large block, and resident bytes, in a process of its own: a malloc that failed,
as other tests provoke it, moves a thread to an arena that never keeps so large a block."""


@glibc
def test_what_is_freed_inside_serves_again_and_goes_back_at_the_end():
    command = [sys.executable, "-c", PROGRAM]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert told["inside"] < told["outside"] / 10
    assert told["resident"] < told["resident inside"] - (32 << 20)
    # A GiB is 512 pages at least, where the system gives out huge ones.
    assert min(told["again"], told["again after an error"]) > 100


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
