"""The contract of every registered structure, over many shapes; a new structure is picked up from the registry."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.structures import DoesNotFit, Structure, StructureOptions, structure_class, structure_names
from padst_cli.structures.block import Block
from padst_cli.structures.diagonal import Diagonal
from padst_cli.structures.nm import NM
from padst_cli.structures.unstructured import Unstructured

SHAPES = [(256, 256), (768, 3072), (3072, 768), (64, 172), (172, 64), (100, 37), (37, 100), (17, 300)]
SMALL_SHAPES = [shape for shape in SHAPES if max(shape) < 400]
WIDE_SHAPES = [(256, 256), (768, 3072), (3072, 768), (257, 300), (264, 264), (256, 4099)]
DENSITIES = [0.05, 0.1, 0.2, 0.5]
MORE_DENSITIES = [*DENSITIES, 0.02, 0.013, 1 - 0.9, 0.25, 0.333, 0.75, 0.97, 1.0]
VARIANTS = [
    StructureOptions(),
    StructureOptions(band=16, block_rows="free", nm=(2, 4)),
    StructureOptions(band=4, block_size=32, nm=(3, 7)),
    StructureOptions(block_size=64, nm=(1, 2)),
]
# Small enough to try every choice of units; blocks of 2 are below what a user may ask for, but the rules are the same.
TINY = [
    Diagonal(4, 6, count=3, band=1),
    Diagonal(6, 6, count=2, band=1),
    Diagonal(9, 5, count=4, band=2),
    NM(2, 5, n=2, m=3),
    NM(1, 10, n=3, m=5),
    NM(1, 7, n=2, m=4),
    Block(5, 7, block_size=2, count=5, rows="even"),
    Block(6, 4, block_size=2, count=3, rows="even"),
    Block(5, 7, block_size=2, count=2, rows="even"),
    Block(5, 7, block_size=2, count=5, rows="free"),
    Unstructured(3, 4, count=5),
]

per_structure = pytest.mark.parametrize("name", structure_names())
per_small_shape = pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)


def specs(name: str, shape: tuple[int, int]) -> Iterator[Structure]:
    """Every member that the variants and densities give for a shape, each once."""
    seen = set()
    for options, density in itertools.product(VARIANTS, DENSITIES):
        try:
            spec = structure_class(name).for_density(*shape, density, options)
        except DoesNotFit:
            continue
        if spec not in seen:
            seen.add(spec)
            yield spec


def random_support(spec: Structure, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spec.project(torch.rand(spec.out_features, spec.in_features, generator=generator))


def random_weight(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(mask.shape, generator=generator).to(dtype).where(mask, torch.zeros((), dtype=dtype))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.dtype.itemsize]
    return left.dtype == right.dtype and torch.equal(left.view(integer), right.view(integer))


# -- choosing parameters ---------------------------------------------------------------------------------------------


def one_unit(spec: Structure) -> float:
    """The density of one unit; for N:M of one slot in every group."""
    entries = spec.out_features * spec.in_features
    match spec:
        case Diagonal():
            return spec.band / spec.diagonals
        case NM():
            return 1 / spec.m
        case Block():
            return spec.block_size**2 / entries
        case _:
            return 1 / entries


@per_structure
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE_SHAPES], ids=str)
def test_density_is_close_to_the_request_and_never_flattered(name, shape):
    variants = (StructureOptions(), StructureOptions(band=16, block_rows="free"), StructureOptions(block_size=64))
    for options, density in itertools.product(variants, MORE_DENSITIES):
        try:
            spec = structure_class(name).for_density(*shape, density, options)
        except DoesNotFit:
            assert name in ("diag", "block")
            continue
        assert spec.density >= density - one_unit(spec) / 2 - 1e-9
        if shape in WIDE_SHAPES:
            assert abs(spec.density - density) <= max(0.01, one_unit(spec)) + 1e-9
        if name == "nm" and shape in WIDE_SHAPES and density in DENSITIES:
            assert abs(spec.density - density) <= 0.01


@per_structure
@pytest.mark.parametrize("shape", [(100, 37), (64, 172)], ids=str)
def test_wider_supports_narrow_within_themselves(name, shape):
    score = torch.rand(*shape, generator=torch.Generator().manual_seed(3)) + 0.1
    for spec in specs(name, shape):
        assert spec.at_density(spec.density / 3) == spec, "never sparser than itself"
        mask = spec.at_density(1.0).project(score)
        covered = int(mask.sum())
        assert covered == spec.at_density(1.0).nonzeros >= spec.nonzeros
        for wide in (*map(spec.at_density, (0.9, 0.62, 0.6, 0.41, 0.2)), spec):
            assert wide.unit_shape == spec.unit_shape
            units = wide.units_of(mask)
            narrowed = wide.select(torch.where(units, wide.unit_scores(score), -torch.inf))
            assert wide.is_feasible(narrowed)
            assert not bool((narrowed & ~units).any())
            mask = wide.expand(narrowed)


@per_structure
@per_small_shape
def test_nonzeros_count_the_mask(name, shape):
    for spec in specs(name, shape):
        covered = int(random_support(spec).sum())
        ragged = name == "block" and (shape[0] % spec.block_size or shape[1] % spec.block_size)
        assert covered <= spec.nonzeros
        assert ragged or covered == spec.nonzeros
        assert spec.density == pytest.approx(spec.nonzeros / (shape[0] * shape[1]))


@per_structure
def test_parameters_survive_json_types_and_come_back_equal(name):
    for shape in SMALL_SHAPES:
        for spec in specs(name, shape):
            assert all(type(value) in (int, str) for value in spec.parameters().values())
            assert type(spec).from_parameters(*shape, spec.parameters()) == spec


@per_structure
def test_parameters_from_a_damaged_file_are_refused(name):
    spec = next(specs(name, (64, 172)))
    good = spec.parameters()
    bad = [{}, {**good, "extra": 1}, list(good), None]
    bad += [{k: v for k, v in good.items() if k != dropped} for dropped in good]
    for key, junk in itertools.product(good, (-1, 0, 10**9, 1.5, True, "x", None, [1])):
        bad.append({**good, key: junk})
    for parameters in bad:
        with pytest.raises(PadstError):
            type(spec).from_parameters(64, 172, parameters)
    for shape in ((0, 172), (64, -3), (64, "172")):
        with pytest.raises(PadstError):
            type(spec).from_parameters(*shape, good)


# -- units -----------------------------------------------------------------------------------------------------------


@per_structure
@per_small_shape
def test_expand_and_units_of_are_inverse_on_supports(name, shape):
    for spec in specs(name, shape):
        active = spec.units_of(random_support(spec))
        assert active.shape == spec.unit_shape
        assert active.dtype == torch.bool
        mask = spec.expand(active)
        assert mask.shape == shape
        assert mask.dtype == torch.bool
        assert mask.is_contiguous()
        assert torch.equal(spec.units_of(mask), active)


@per_structure
@per_small_shape
def test_units_partition_their_entries_and_scores_sum_over_them(name, shape):
    generator = torch.Generator().manual_seed(3)
    score = torch.rand(shape, generator=generator, dtype=torch.float64)
    for spec in specs(name, shape):
        scores = spec.unit_scores(score)
        assert scores.shape == spec.unit_shape
        possible = scores > float("-inf")
        active = possible & (torch.rand(scores.shape, generator=generator) < 0.3)
        kept = score[spec.expand(active)].sum()
        torch.testing.assert_close(scores[active].sum(), kept)


@per_structure
@per_small_shape
def test_projection_is_feasible(name, shape):
    for spec in specs(name, shape):
        for score in (torch.rand(shape), torch.zeros(shape), torch.ones(shape)):
            mask = spec.project(score)
            assert spec.is_feasible(spec.units_of(mask))
            assert torch.equal(spec.expand(spec.units_of(mask)), mask)


@per_structure
def test_one_unit_more_or_less_is_not_feasible(name):
    for spec in specs(name, (64, 172)):
        active = spec.units_of(random_support(spec))
        assert not spec.is_feasible(torch.zeros_like(active))
        for state in (True, False):
            changed = active.clone()
            if bool((changed == state).any()):
                changed.view(-1)[(active.view(-1) == state).nonzero()[0]] = not state
                assert not spec.is_feasible(changed)


def test_tiny_cases_cover_the_registry():
    assert {spec.name for spec in TINY} == set(structure_names())


@pytest.mark.parametrize("spec", TINY, ids=str)
def test_selection_is_the_best_of_all_choices(spec):
    generator = torch.Generator().manual_seed(5)
    scores = [torch.rand(spec.out_features, spec.in_features, generator=generator) for _ in range(3)]
    groups, candidates = spec.unit_shape
    best = [0.0] * len(scores)
    for bits in itertools.product((False, True), repeat=groups * candidates):
        active = torch.tensor(bits).view(groups, candidates)
        if spec.is_feasible(active):
            mask = spec.expand(active)
            best = [max(b, float(score[mask].sum())) for b, score in zip(best, scores, strict=True)]
    for reached, score in zip(best, scores, strict=True):
        assert float(score[spec.project(score)].sum()) == pytest.approx(reached, rel=1e-5)


@per_structure
def test_results_share_no_memory_with_what_they_came_from(name):
    for spec in itertools.chain(specs(name, (256, 256)), specs(name, (100, 37))):
        score = torch.rand(spec.out_features, spec.in_features)
        mask = spec.project(score)
        active = spec.units_of(mask)
        before = score.clone(), mask.clone(), active.clone()
        spec.unit_scores(score).fill_(0)
        spec.units_of(mask).fill_(True)
        spec.expand(active).fill_(True)
        assert all(torch.equal(a, b) for a, b in zip(before, (score, mask, active), strict=True))


# -- packing ---------------------------------------------------------------------------------------------------------


@per_structure
@per_small_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_pack_is_inverted_exactly(name, shape, dtype):
    for spec in specs(name, shape):
        mask = random_support(spec)
        weight = random_weight(mask, dtype)
        # Zeros on the support stay on it, and a negative zero stays negative.
        weight[tuple(mask.nonzero()[0])] = -0.0
        tensors = spec.pack(weight, mask)
        spec.validate(tensors)
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        unpacked = spec.unpack(tensors)
        assert unpacked.is_contiguous()
        assert same_bits(unpacked, weight)
        assert torch.equal(spec.unpack_mask(tensors), mask)


@per_structure
@pytest.mark.parametrize("shape", [(768, 3072), (3072, 768)], ids=str)
def test_pack_is_inverted_exactly_on_transformer_shapes(name, shape):
    for density in (0.1, 0.5):
        spec = structure_class(name).for_density(*shape, density, StructureOptions())
        mask = random_support(spec)
        weight = random_weight(mask, torch.float32)
        tensors = spec.pack(weight, mask)
        spec.validate(tensors)
        assert same_bits(spec.unpack(tensors), weight)
        assert torch.equal(spec.unpack_mask(tensors), mask)


@per_structure
def test_any_shape_packs_or_does_not_fit(name):
    rng = random.Random(7)
    packed = 0
    for seed in range(60):
        shape = rng.randint(1, 90), rng.randint(1, 90)
        options = StructureOptions(band=rng.choice([1, 1, 2, 16]), block_rows=rng.choice(["even", "free"]))
        try:
            spec = structure_class(name).for_density(*shape, rng.uniform(0.01, 1.0), options)
        except DoesNotFit:
            continue
        spec.check_parameters()
        mask = random_support(spec, seed)
        weight = random_weight(mask, torch.float32)
        tensors = spec.pack(weight, mask)
        spec.validate(tensors)
        assert same_bits(spec.unpack(tensors), weight)
        assert torch.equal(spec.unpack_mask(tensors), mask)
        packed += 1
    assert packed > 20


@per_structure
@per_small_shape
def test_layout_names_what_pack_makes_and_allocates_on_meta(name, shape):
    for spec in specs(name, shape):
        mask = random_support(spec)
        tensors = spec.pack(random_weight(mask, torch.bfloat16), mask)
        layout = spec.layout(torch.bfloat16)
        assert list(tensors) == list(layout)
        for key, (size, dtype) in layout.items():
            assert (tuple(tensors[key].shape), tensors[key].dtype) == (size, dtype)
            assert torch.empty(size, dtype=dtype, device="meta").shape == tensors[key].shape
        assert spec.packed_bytes(torch.bfloat16) == sum(t.numel() * t.element_size() for t in tensors.values())


@per_structure
@pytest.mark.parametrize("shape", [(64, 172), (172, 64)], ids=str)
def test_pack_refuses_what_it_could_not_give_back(name, shape):
    for spec in specs(name, shape):
        mask = random_support(spec)
        weight = random_weight(mask, torch.float32)
        spoilt = mask.clone()
        spoilt[tuple(mask.nonzero()[3])] = False
        outside = weight.clone()
        outside[tuple((~mask).nonzero()[3])] = 1.0
        for bad_weight, bad_mask in [
            (weight, spoilt),
            (weight, torch.zeros_like(mask)),
            (weight, torch.ones_like(mask)),
            (outside, mask),
            (outside * float("nan"), mask),
            (weight[1:], mask[1:]),
            (weight, mask.float()),
        ]:
            with pytest.raises(ValueError, match=r"mask"):
                spec.pack(bad_weight, bad_mask)


@per_structure
def test_validate_refuses_missing_misshapen_and_mistyped_tensors(name):
    spec = next(specs(name, (100, 37)))
    mask = random_support(spec)
    tensors = spec.pack(random_weight(mask, torch.float32), mask)
    for key, tensor in tensors.items():
        with pytest.raises(PadstError, match=f"lack '{key}'"):
            spec.validate({k: v for k, v in tensors.items() if k != key})
        for bad in (tensor[:-1], tensor[None], torch.cat([tensor, tensor[-1:]]), tensor.to(torch.int64)):
            with pytest.raises(PadstError, match=f"'{key}' is"):
                spec.validate({**tensors, key: bad})


@per_structure
def test_any_flipped_index_bit_is_noticed_or_gives_another_valid_support(name):
    spec = next(specs(name, (64, 172)))
    mask = random_support(spec)
    tensors = spec.pack(random_weight(mask, torch.float32), mask)
    rng = random.Random(11)
    refused = 0
    for key in set(tensors) - {"values"}:
        for _ in range(150):
            raw = tensors[key].clone().view(torch.uint8)
            raw[rng.randrange(len(raw)) if raw.dim() == 1 else tuple(rng.randrange(n) for n in raw.shape)] ^= (
                1 << rng.randrange(8)
            )
            flipped = {**tensors, key: raw.view(tensors[key].dtype)}
            try:
                spec.validate(flipped)
            except PadstError:
                refused += 1
                continue
            support = spec.unpack_mask(flipped)
            assert spec.is_feasible(spec.units_of(support))
            assert not torch.equal(support, mask)
            spec.unpack(flipped)
    assert refused > 0


@per_structure
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_stays_on_the_device_of_its_input(name):
    for spec in specs(name, (100, 37)):
        score = torch.rand(100, 37, device="cuda")
        mask = spec.project(score)
        weight = score.where(mask, score.new_zeros(()))
        tensors = spec.pack(weight, mask)
        spec.validate(tensors)
        assert all(tensor.is_cuda for tensor in (mask, *tensors.values()))
        assert torch.equal(spec.unpack(tensors), weight)
        assert torch.equal(spec.unpack_mask(tensors), mask)


def test_unknown_structure_names_the_choices():
    with pytest.raises(PadstError, match=r"did you mean 'diag'"):
        structure_class("diagg")
