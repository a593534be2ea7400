"""Every Triton kernel, as it is cut by default, compiles for each target without spills and fits its shared memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from padst_kernels.gpu import block, diag, nm  # noqa: E402
from padst_kernels.gpu.common import Config  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TARGETS = {
    "cuda:80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "cuda:90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "hip:gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
SWITCHES = ("PERM_IN", "STORE", "BIAS")
TOKENS = (1, 2, 16, 64, 4096)

Launch = tuple[Any, dict[str, str], dict[str, Any], Any]


def block_launches(dtype: torch.dtype, backend: str) -> Iterator[Launch]:
    pointers = {"x": DTYPES[dtype], "values": DTYPES[dtype], "row_offsets": "i32", "col_indices": "i32"}
    for size in (16, 32, 64):
        for cut in dict.fromkeys(block.config(tokens, size, dtype) for tokens in TOKENS):
            for precision in ("ieee", "tf32") if dtype is torch.float32 and backend == "cuda" else ("ieee",):
                yield block.block_kernel, pointers, {"SIZE": size, "PRECISION": precision}, cut


def diag_launches(dtype: torch.dtype, _: str) -> Iterator[Launch]:
    pointers = {"x": DTYPES[dtype], "values": DTYPES[dtype], "offsets": "i32", "spans": "i32"}
    for cut in dict.fromkeys(diag.config(tokens) for tokens in TOKENS):
        for tall in (True, False):
            yield diag.diag_kernel, pointers, {"TALL": tall}, cut


def nm_launches(dtype: torch.dtype, _: str) -> Iterator[Launch]:
    pointers = {"x": DTYPES[dtype], "values": DTYPES[dtype], "indices": "u8"}
    for cut in dict.fromkeys(nm.config(tokens) for tokens in TOKENS):
        for n, m in ((2, 4), (3, 15), (1, 20)):
            yield nm.nm_kernel, pointers, {"N": n, "M": m, "BITS": nm.index_bits(m)}, cut


LAUNCHES = {"block": block_launches, "diag": diag_launches, "nm": nm_launches}


def compiled(launch: Launch, dtype: torch.dtype, plain: bool, target: GPUTarget) -> Any:
    """The kernel as `launch` has it, every pointer on 16 bytes.

    Plain is a layer without permutations and bias whose sizes are multiples of 16, else it has all and any sizes.
    """
    kernel, pointers, constants, cut = launch
    pointers = {**pointers, "perm_in": "i32", "store": "i32", "bias": DTYPES[dtype], "y": DTYPES[dtype]}
    keywords = cut.keywords()
    options = {key: keywords.pop(key) for key in ("num_warps", "num_stages")}
    constants = {**constants, **keywords, **dict.fromkeys(SWITCHES, not plain)}
    signature = {
        name: "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else "i32"
        for name in kernel.arg_names
    }
    even = {*pointers, *(("out_features", "in_features", "slots") if plain else ())}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name in even}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def spilled(binary: Any, target: GPUTarget, folder: Any) -> int:
    """Bytes or registers that the assembler put into memory for want of registers.

    Scalar registers of AMD's that run out go to vector registers, not to memory: the scratch size tells.
    """
    if target.backend == "hip":
        found = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", binary.asm["amdgcn"])
        assert len(found) == 2, found
        return sum(int(count) for count in found)
    file = folder / "kernel.ptx"
    file.write_text(binary.asm["ptx"])
    arch = "sm_90a" if target.arch == 90 else f"sm_{target.arch}"
    command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={arch}", str(file), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert stores, report
    return sum(int(stored) + int(loaded) for stored, loaded in stores)


def check(
    structure: str, dtype: torch.dtype, target_name: str, folder: Any, most: int | None = None, plain: bool = False
) -> None:
    target, shared = TARGETS[target_name]
    launches = list(LAUNCHES[structure](dtype, target.backend))
    assert launches
    for launch in launches[:most]:
        binary = compiled(launch, dtype, plain, target)
        assert spilled(binary, target, folder) == 0, launch
        assert binary.metadata.shared <= shared, launch


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("structure", LAUNCHES)
def test_one_token_in_bfloat16_compiles(structure, target, tmp_path):
    check(structure, torch.bfloat16, target, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True], ids=["permuted", "plain"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", LAUNCHES)
def test_every_default_compiles(structure, dtype, target, plain, tmp_path):
    check(structure, dtype, target, tmp_path, plain=plain)


def test_spills_are_seen(tmp_path):
    """The check itself: a tile far too large for one warp spills."""
    target, _ = TARGETS["cuda:90"]
    pointers = {"x": "bf16", "values": "bf16", "row_offsets": "i32", "col_indices": "i32"}
    cut = Config(TILE=64, ROWS=64, STEP=64, num_warps=1, num_stages=1)
    launch = block.block_kernel, pointers, {"SIZE": 64, "PRECISION": "ieee"}, cut
    assert spilled(compiled(launch, torch.bfloat16, False, target), target, tmp_path) > 0
