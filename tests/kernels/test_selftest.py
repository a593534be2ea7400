"""The test that an instruction set must pass: it passes for what is right and fails for what is not."""

from __future__ import annotations

import pytest
import torch
from padst_kernels.cpu import library, selftest
from padst_kernels.cpu.isa import ISAS
from padst_kernels.cpu.library import TYPES, LayerHeader
from padst_kernels.cpu.selftest import agree

PORTABLE, AVX2 = ISAS.index("portable"), ISAS.index("avx2")


class Wrong:
    """A library whose kernels for one instruction set add a little to one output, or refuse."""

    def __init__(self, lib, isa, status=0):
        self.lib, self.isa, self.status = lib, isa, status

    def __getattr__(self, name):
        return getattr(self.lib, name)

    def padst_forward(self, image, x, kind, bias, y, tokens, threads):
        status = self.lib.padst_forward(image, x, kind, bias, y, tokens, threads)
        if self.lib.padst_isa() == self.isa:
            if self.status:
                return self.status
            import ctypes

            ctypes.c_float.from_address(y + 4 * 30).value += 0.5
        return status


@pytest.fixture
def lib():
    found = library.library()
    before = found.padst_isa()
    if not found.padst_runs(AVX2):
        pytest.skip("this machine has no avx2")
    yield found
    found.padst_use_isa(before)


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_right_kernels_pass_and_are_chosen(lib, default):
    lib.padst_use_isa(PORTABLE)
    with torch.device(default):
        assert agree(lib, LayerHeader, TYPES, PORTABLE, AVX2)
    assert lib.padst_isa() == AVX2


@pytest.mark.parametrize("status", [0, -1])
def test_wrong_kernels_fail_and_are_not_chosen(lib, status):
    lib.padst_use_isa(PORTABLE)
    assert not agree(Wrong(lib, AVX2, status), LayerHeader, TYPES, PORTABLE, AVX2)
    assert lib.padst_isa() == PORTABLE


def test_an_instruction_set_that_does_not_exist_fails(lib):
    assert not agree(lib, LayerHeader, TYPES, PORTABLE, len(ISAS))


def test_every_index_of_the_test_layers_is_valid():
    assert selftest._IN % 4 != 0
    assert selftest._OUT % 16 != 0


def test_a_failed_test_warns_and_keeps_the_smaller_set(lib, monkeypatch):
    lib.padst_use_isa(AVX2)
    monkeypatch.setattr(library, "find", lambda: "anywhere")
    monkeypatch.setattr(library, "open_library", lambda _: Everything(lib))
    monkeypatch.setattr(library, "agree", lambda *_: False)
    with pytest.warns(RuntimeWarning, match="AVX-512 kernels failed"):
        assert library.library.__wrapped__().padst_isa() == AVX2


class Everything:
    """A machine that claims every instruction set."""

    def __init__(self, lib):
        self.lib = lib

    def __getattr__(self, name):
        return getattr(self.lib, name)

    def padst_runs(self, _):
        return 1
