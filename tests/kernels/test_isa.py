"""The user's limit on instruction sets: kept to, and refused where it names none."""

from __future__ import annotations

import pytest
from padst_kernels.cpu import library
from padst_kernels.cpu.isa import ISAS, VARIABLE, allowed


@pytest.fixture
def lib():
    found = library.library()
    before = found.padst_isa()
    yield found
    found.padst_use_isa(before)


@pytest.mark.parametrize("name", ISAS)
def test_kernels_use_no_more_than_is_allowed(name, lib, monkeypatch):
    monkeypatch.setenv(VARIABLE, name)
    there = [isa for isa in ISAS[: ISAS.index(name) + 1] if lib.padst_runs(ISAS.index(isa))]
    assert ISAS[library.library.__wrapped__().padst_isa()] == there[-1]


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_limit_all_are_allowed(value, monkeypatch):
    if value is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, value)
    assert allowed() == ISAS[-1]


def test_another_name_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "neon")
    with pytest.raises(ValueError, match="PADST_ISA is 'neon': set it to portable, avx2, avx512"):
        allowed()
