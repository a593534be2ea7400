"""Every Triton kernel, as it is cut by default, compiles for each target without spills and fits its shared memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from padst_kernels.gpu import bands, block, diag, nm, nm_tiles, permute, rules  # noqa: E402
from padst_kernels.gpu.common import Config  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
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


def precisions(dtype: torch.dtype, target: str) -> tuple[str, ...]:
    return ("ieee", "tf32") if dtype is torch.float32 and target.startswith("cuda") else ("ieee",)


def cuts(space: Callable[..., tuple[Config, ...]], *rest: Any, whole: bool) -> list[Config]:
    """What a space offers for all counts of tokens, or only its defaults."""
    return list(dict.fromkeys(cut for tokens in TOKENS for cut in space(tokens, *rest)[: None if whole else 1]))


def sized(space: Callable[..., tuple[Config, ...]], whole: bool) -> list[Config]:
    """`cuts` of a space that depends on the number of outputs, for wide layers and narrow ones."""
    return list(dict.fromkeys(cut for outputs in (11008, 4096, 768) for cut in cuts(space, outputs, whole=whole)))


def block_launches(dtype: torch.dtype, target: str, whole: bool) -> Iterator[Launch]:
    lists = {"row_offsets": "i32", "col_indices": "i32", "order": "i32"}
    for size, precision, transposed in product((16, 32, 64), precisions(dtype, target), (False, True)):
        constants = {"SIZE": size, "PRECISION": precision, "TRANSPOSED": transposed}
        for cut in cuts(block.space, size, dtype, whole=whole):
            few = cut.TILE <= block.FEW and cut.ROWS == 16 and cut.num_stages == 2
            kernel, more = (block.few_kernel, {"SPLIT": cut.SPLIT}) if few else (block.block_kernel, {})
            yield kernel, {"x": "?", "values": "?", **lists}, {**constants, **more}, cut
        if not transposed:
            pointers = {"x": "?", "dy": "?", "found": "fp32", "row_indices": "i32", **lists}
            for cut in cuts(block.gradient_space, 50, dtype, whole=whole):
                yield block.gradient_kernel, pointers, {"SIZE": size, "PRECISION": precision}, cut


def diag_launches(dtype: torch.dtype, _: str, whole: bool) -> Iterator[Launch]:
    del dtype
    for cut, tall in product(sized(diag.space, whole), (True, False)):
        for minor in (False, True) if cut.TILE > 1 else (False,):
            pointers = {"x": "?", "values": "?", "offsets": "i32", "spans": "i32"}
            yield diag.diag_kernel, pointers, {"TALL": tall, "SPAN": diag.ROWS, "MINOR": minor}, cut
    for cut in diag.gradient_space()[: None if whole else 1]:
        yield diag.gradient_kernel, {"x": "?", "dy": "?", "offsets": "i32", "found": "fp32"}, {}, cut


def one_token_launches(dtype: torch.dtype, _: str, whole: bool) -> Iterator[Launch]:
    del dtype
    for cut in sized(lambda _, out_features: diag.one_space(out_features, False), whole):
        constants = {"CLASSES": diag.CLASSES, "STAGES": cut.num_stages}
        yield diag.wide_kernel, {"copies": "?", "values": "?", "offsets": "i32"}, constants, cut
    for cut in sized(lambda _, out_features: diag.one_space(out_features, True), whole):
        yield diag.tall_kernel, {"x": "?", "values": "?", "classes": "i32"}, {"CLASSES": diag.CLASSES}, cut
    constants = {"COPIES": diag.CLASSES, "COLUMNS": permute.COLUMNS, "PERMUTED": True}
    cut = Config(num_warps=4, num_stages=2)
    yield permute.shift_kernel, {"x": "?", "index": "i32", "y": "?"}, constants, cut


def band_launches(dtype: torch.dtype, target: str, whole: bool) -> Iterator[Launch]:
    for size, tall in product(sorted({bands.side(side, dtype) for side in rules.BAND_SIDES}), (True, False)):
        pointers = {"values": "?", "offsets": "i32", "tiles": "?"}
        yield bands.tile_kernel, pointers, {"TALL": tall, "SIZE": size}, Config(num_warps=4, num_stages=2)
        for precision in precisions(dtype, target):
            constants = {"TALL": tall, "EVEN": True, "PRECISION": precision}
            pointers = {"x": "?", "tiles": "?", "offsets": "i32", "spans": "i32"}
            for cut in cuts(bands.space, size, dtype, target != "cuda:80", whole=whole):
                yield bands.band_kernel, pointers, {**constants, "SPAN": bands.ROWS_OF_SPAN}, cut
            pointers = {"x": "?", "dy": "?", "offsets": "i32", "found": "fp32"}
            for cut in cuts(bands.gradient_space, 50, size, dtype, whole=whole):
                yield bands.gradient_kernel, pointers, constants, cut


def nm_launches(dtype: torch.dtype, target: str, whole: bool) -> Iterator[Launch]:
    for n, m in ((2, 4), (3, 15), (8, 16), (1, 20)):
        group = {"N": n, "M": m, "BITS": nm.index_bits(m)}
        for cut in cuts(nm.space, whole=whole):
            for minor in (False, True) if cut.TILE > 1 else (False,):
                yield nm.nm_kernel, {"x": "?", "values": "?", "indices": "u8"}, {**group, "MINOR": minor}, cut
        for precision, transposed in product(precisions(dtype, target), (False, True)):
            for cut in cuts(nm_tiles.space, dtype, n, whole=whole):
                constants = {**group, "PRECISION": precision, "TRANSPOSED": transposed}
                yield nm_tiles.tile_kernel, {"x": "?", "values": "?", "indices": "u8"}, constants, cut
            pointers = {"x": "?", "dy": "?", "indices": "u8", "found": "fp32"}
            for cut in cuts(nm_tiles.gradient_space, 50, dtype, whole=whole) if not transposed else ():
                yield nm_tiles.gradient_kernel, pointers, {**group, "PRECISION": precision}, cut


def permute_launches(dtype: torch.dtype, _: str, whole: bool) -> Iterator[Launch]:
    del dtype
    for width in (1024, 4096, permute.WIDEST) if whole else (permute.WIDEST,):
        cut = Config(num_warps=4 if width <= 4096 else 8, num_stages=2)
        yield permute.permute_kernel, {"x": "?", "index": "i32", "y": "?"}, {"WIDTH": width, "REPEAT": 4}, cut
    for tile in (2, 16):
        constants = {"TILE": tile, "COLUMNS": permute.COLUMNS, "PERMUTED": True}
        cut = Config(num_warps=4, num_stages=2)
        yield permute.side_kernel, {"x": "?", "index": "i32", "y": "?"}, constants, cut


LAUNCHES = {
    "block": block_launches,
    "diag": diag_launches,
    "diag, one token": one_token_launches,
    "band": band_launches,
    "nm": nm_launches,
    "permute": permute_launches,
}


def compiled(launch: Launch, dtype: torch.dtype, plain: bool, target: GPUTarget) -> tuple[Any, str]:
    """The kernel as `launch` has it, every pointer on 16 bytes, and what `ptxas -v` said when triton called it.

    Plain is a layer without permutations and bias whose sizes are multiples of 16, else it has all and any sizes.
    """
    kernel, pointers, constants, cut = launch
    pointers = {"perm_in": "i32", "store": "i32", "bias": "?", "y": "?", **pointers}
    pointers = {name: DTYPES[dtype] if kind == "?" else kind for name, kind in pointers.items()}
    keywords = cut.keywords()
    options = {key: keywords.pop(key) for key in ("num_warps", "num_stages")}
    switches = {**dict.fromkeys(SWITCHES, not plain), "ACTIVATION": "" if plain else "gelu"}
    constants = {**constants, **keywords, **{key: on for key, on in switches.items() if key in kernel.arg_names}}
    signature = {
        name: "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else "i32"
        for name in kernel.arg_names
    }
    even = {*pointers, *(("out_features", "in_features", "width") if plain else ())}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name in even}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(StringIO()) as report:
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        return triton.compile(source, target=target, options=options), report.getvalue()


def spilled(binary: Any, report: str) -> int:
    """Bytes or registers that the assembler put into memory for want of registers.

    Scalar registers of AMD's that run out go to vector registers, not to memory: the scratch size tells.
    """
    if "amdgcn" in binary.asm:
        found = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", binary.asm["amdgcn"])
        assert len(found) == 2, found
        return sum(int(count) for count in found)
    stores = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert stores, report
    return sum(int(stored) + int(loaded) for stored, loaded in stores)


def check(
    structure: str,
    dtype: torch.dtype,
    target_name: str,
    most: int | None = None,
    plain: bool = False,
    whole: bool = False,
) -> None:
    target, shared = TARGETS[target_name]
    launches = list(LAUNCHES[structure](dtype, target_name, whole))
    assert launches
    wrong = []
    for launch in launches[:most]:
        binary, report = compiled(launch, dtype, plain, target)
        figures = {"spilled": spilled(binary, report), "shared": binary.metadata.shared}
        if figures["spilled"] or figures["shared"] > shared:
            wrong.append((figures, launch))
    assert not wrong


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("structure", LAUNCHES)
def test_one_token_in_bfloat16_compiles(structure, target):
    check(structure, torch.bfloat16, target, 1)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True], ids=["permuted", "plain"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", LAUNCHES)
def test_every_default_compiles(structure, dtype, target, plain):
    check(structure, dtype, target, plain=plain)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", LAUNCHES)
def test_the_whole_space_compiles(structure, dtype, target):
    check(structure, dtype, target, whole=True)


def test_spills_are_seen():
    """The check itself: a tile far too large for one warp spills."""
    target, _ = TARGETS["cuda:90"]
    pointers = {"x": "?", "values": "?", "row_offsets": "i32", "col_indices": "i32", "order": "i32"}
    cut = Config(TILE=64, ROWS=64, STEP=64, num_warps=1, num_stages=1)
    launch = block.block_kernel, pointers, {"SIZE": 64, "PRECISION": "ieee", "TRANSPOSED": False}, cut
    assert spilled(*compiled(launch, torch.bfloat16, False, target)) > 0
