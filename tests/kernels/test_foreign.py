"""The C kernels compiled for 64-bit ARM and run in an emulator, on images packed here."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from padst_kernels.cpu import library
from padst_kernels.cpu.library import TYPES
from padst_kernels.cpu.native import NativeKernel

from tests.kernels.test_native import FAMILIES, close

SOURCES = Path(library.__file__).parent / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
TOKENS = (1, 2, 4, 7, 20, 65)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def run_there(tmp_path_factory):
    program = tmp_path_factory.mktemp("foreign") / "run"
    options = ("-std=gnu11", "-O1", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-pthread", "-static")
    files = [Path(__file__).with_name("foreign.c"), *sorted(SOURCES.glob("*.c"))]
    subprocess.run([COMPILER, *options, f"-I{SOURCES}", *map(str, files), "-o", str(program)], check=True)

    def run(records: bytes) -> bytes:
        return subprocess.run([EMULATOR, str(program)], input=records, stdout=subprocess.PIPE, check=True).stdout

    return run


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_products_and_dense_weights(make_case, run_there, family):
    structure, options = FAMILIES[family]
    records, expected = [], []
    for value_dtype in TYPES:
        case = make_case(structure, 100, 70, 0.3, "io", value_dtype, **options)
        image = NativeKernel(case.layout).image
        for dtype, code in TYPES.items():
            for tokens in TOKENS:
                x, bias = torch.randn(tokens, 70, dtype=dtype), torch.randn(100, dtype=dtype)
                records += [struct.pack("5q", image.numel(), 70, 100, code, tokens), raw(image), raw(x), raw(bias)]
                expected.append((case.weight, x, bias))
    answer = bytearray(run_there(b"".join(records)))
    place = 0
    for weight, x, bias in expected:
        count, dtype = len(x) * 100, x.dtype
        numbers = torch.frombuffer(answer, dtype=dtype, count=count + 7000, offset=place)
        close(numbers[:count].view(-1, 100), weight, x, bias)
        assert torch.equal(numbers[count:].view(100, 70), weight.to(dtype))
        place += numbers.numel() * dtype.itemsize
    assert place == len(answer)
