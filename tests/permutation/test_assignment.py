import itertools

import pytest
import torch
from torch import Tensor

from padst_cli.permutation import assignment
from padst_cli.permutation.apply import check_permutation, from_structure, random_permutation, to_structure
from padst_cli.permutation.assignment import exchange_between_groups, kept_share, search, search_shared
from padst_cli.structures import Structure, StructureOptions, structure_class

SHAPES = [(48, 32), (32, 48), (40, 40)]
NAMES = ["block", "diag", "nm", "unstructured"]


def fitted(name: str, out: int, inp: int, density: float, **options: str) -> Structure:
    return structure_class(name).for_density(out, inp, density, StructureOptions(**options))


def planted(structure: Structure, side: str, seed: int = 0) -> Tensor:
    """A score in coordinates of W whose whole mass lies on one of the structure's supports, `side` shuffled."""
    generator = torch.Generator().manual_seed(seed)
    shape = (structure.out_features, structure.in_features)
    score = torch.rand(shape, generator=generator) * structure.project(torch.rand(shape, generator=generator))
    size = shape[1] if side == "input" else shape[0]
    perm = random_permutation(size, generator)
    return from_structure(score, *((perm, None) if side == "input" else (None, perm)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", [("input",), ("output",), ("input", "output"), ()])
def test_never_worse_than_the_identity_and_always_valid(
    name: str, shape: tuple[int, int], sides: tuple[str, ...]
) -> None:
    structure = fitted(name, *shape, 0.25)
    score = torch.randn(shape, generator=torch.Generator().manual_seed(1)).square()
    result = search(score, structure, sides, rounds=4)
    assert (result.perm_in is not None) == ("input" in sides)
    assert (result.perm_out is not None) == ("output" in sides)
    for perm, size in ((result.perm_in, shape[1]), (result.perm_out, shape[0])):
        if perm is not None:
            check_permutation(perm, size, "found")
    ordered = to_structure(score, result.perm_in, result.perm_out)
    assert torch.equal(structure.project(ordered), result.mask)
    assert result.kept == pytest.approx(kept_share(ordered, result.mask))
    assert result.kept >= kept_share(score, structure.project(score)) - 1e-7
    assert result.rounds <= 4


@pytest.mark.parametrize("name", ["block", "diag", "nm"])
def test_search_gains_on_random_scores(name: str) -> None:
    structure = fitted(name, 64, 48, 0.25)
    score = torch.randn(64, 48, generator=torch.Generator().manual_seed(2)).square() ** 2
    plain = kept_share(score, structure.project(score))
    assert search(score, structure, ("input",), rounds=8).kept > plain + 0.005


@pytest.mark.parametrize(("name", "shape"), [("block", (64, 64)), ("block", (96, 64)), ("block", (64, 128))])
def test_a_shuffled_block_matrix_is_recovered(name: str, shape: tuple[int, int]) -> None:
    # Evenly spread blocks: what a free choice hides in a few rows no search by saliency finds again for sure.
    structure = fitted(name, *shape, 0.25, block_rows="even")
    score = planted(structure, "input")
    assert kept_share(score, structure.project(score)) < 0.6
    assert search(score, structure, ("input",), rounds=20).kept > 0.99


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_lightly_shuffled_diagonal_matrix_is_recovered(side: str) -> None:
    structure = fitted("diag", 48, 48, 0.1)
    generator = torch.Generator().manual_seed(3)
    score = structure.project(torch.rand(48, 48, generator=generator)) * torch.rand(48, 48, generator=generator)
    perm = torch.arange(48, dtype=torch.int32)
    moved = torch.randperm(48, generator=generator)[:12]
    perm[moved] = perm[moved.roll(1)]
    shuffled = from_structure(score, *((perm, None) if side == "input" else (None, perm)))
    assert kept_share(shuffled, structure.project(shuffled)) < 0.9
    assert search(shuffled, structure, (side,), rounds=20).kept > 0.999


def test_input_step_is_the_exact_optimum_for_its_support() -> None:
    generator = torch.Generator().manual_seed(4)
    score, mask = torch.rand(4, 5, generator=generator), torch.rand(4, 5, generator=generator) > 0.6
    best = max(float((score[:, list(order)] * mask).sum()) for order in itertools.permutations(range(5)))
    found = assignment._assign(mask.float().T, score.T, torch.arange(5, dtype=torch.int32), generator)
    assert float((score[:, found.long()] * mask).sum()) == pytest.approx(best)


def test_what_gains_nothing_stays_where_it_is() -> None:
    slots, current = torch.ones(6, 2), torch.tensor([3, 1, 0, 2, 5, 4], dtype=torch.int32)
    found = assignment._assign(slots, slots, current, torch.Generator())
    assert found.tolist() == [3, 1, 0, 2, 5, 4]


@pytest.mark.parametrize(("width", "n", "m"), [(24, 2, 4), (26, 1, 4), (27, 3, 13), (8, 4, 4)])
def test_group_exchange_never_loses(width: int, n: int, m: int) -> None:
    structure = structure_class("nm").from_parameters(16, width, {"n": n, "m": m})
    score = torch.randn(16, width, generator=torch.Generator().manual_seed(5)).square() ** 2
    perm = torch.arange(width, dtype=torch.int32)
    kept = kept_share(score, structure.project(score))
    for seed in range(4):
        perm = exchange_between_groups(score, perm, n, m, torch.Generator().manual_seed(seed))
        check_permutation(perm, width, "found")
        ordered = to_structure(score, perm, None)
        now = kept_share(ordered, structure.project(ordered))
        assert now >= kept - 1e-6
        kept = now


def test_the_gain_of_a_seat_is_the_score_that_rises_over_the_threshold() -> None:
    generator = torch.Generator().manual_seed(8)
    ordered = torch.rand(16, 22, generator=generator)
    slots, n, m = torch.tensor([1, 6, 14, 20]), 2, 6  # the last group has 4 real columns
    theta = assignment._thresholds(ordered, slots, n, m)
    found = assignment._seat_gains(ordered[:, slots], theta)
    for group in range(4):
        others = [column for column in range(group * m, min(group * m + m, 22)) if column not in slots.tolist()]
        for column, slot in enumerate(slots.tolist()):
            before = ordered[:, others].topk(n, dim=1).values.sum()
            after = ordered[:, [*others, slot]].topk(n, dim=1).values.sum()
            assert float(found[group, column]) == pytest.approx(float(after - before), abs=1e-5)


def test_many_groups_exchange_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = structure_class("nm").from_parameters(16, 62, {"n": 1, "m": 4})
    score = torch.randn(16, 62, generator=torch.Generator().manual_seed(9)).square() ** 2
    monkeypatch.setattr(assignment, "EXCHANGE_LIMIT", 6)
    sizes = [len(part) for part in assignment._parts(16, 6, torch.Generator())]
    assert max(sizes) <= 6
    assert sum(sizes) == 16
    parts, again = (search(score, structure, ("input",), rounds=6, seed=3) for _ in range(2))
    assert parts.kept > kept_share(score, structure.project(score)) + 0.02
    assert torch.equal(parts.perm_in, again.perm_in)
    check_permutation(parts.perm_in, 62, "perm_in")


def test_long_sides_are_assigned_within_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = fitted("block", 32, 96, 0.3)
    score = torch.randn(32, 96, generator=torch.Generator().manual_seed(6)).square() ** 2
    whole = search(score, structure, ("input",), rounds=10)
    monkeypatch.setattr(assignment, "ASSIGNMENT_LIMIT", 40)
    parts = search(score, structure, ("input",), rounds=10, seed=1)
    again = search(score, structure, ("input",), rounds=10, seed=1)
    plain = kept_share(score, structure.project(score))
    assert plain < parts.kept
    assert whole.kept > plain
    assert torch.equal(parts.perm_in, again.perm_in)
    check_permutation(parts.perm_in, 96, "perm_in")


def test_a_score_of_zeros_keeps_all_of_nothing() -> None:
    result = search(torch.zeros(32, 32), fitted("diag", 32, 32, 0.25), ("input",))
    assert result.kept == 1.0
    assert result.perm_in.tolist() == list(range(32))


@pytest.mark.parametrize("name", ["block", "nm"])
def test_one_permutation_serves_layers_that_share(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    structures = [fitted(name, out, 64, 0.25) for out in (64, 32, 96)]
    perm = random_permutation(64, generator)
    planted_scores = [
        from_structure(
            torch.rand(s.out_features, 64, generator=generator) * s.project(torch.rand(s.out_features, 64)), perm, None
        )
        for s in structures
    ]
    found = search_shared(planted_scores, structures, rounds=20)
    check_permutation(found, 64, "found")

    def kept(order: Tensor) -> float:
        ordered = [to_structure(score, order, None) for score in planted_scores]
        return sum(kept_share(one, s.project(one)) for one, s in zip(ordered, structures, strict=True)) / 3

    assert kept(found) > kept(torch.arange(64).int()) + 0.02


def test_a_loud_layer_does_not_decide_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    structures = [fitted("diag", 48, 32, 0.25), fitted("diag", 64, 32, 0.25)]
    scores = [torch.rand(s.out_features, 32, generator=generator) ** 4 for s in structures]
    found = search_shared(scores, structures, rounds=8)
    assert torch.equal(found, search_shared([1e6 * scores[0], scores[1]], structures, rounds=8))
    assert not torch.equal(found, search_shared(scores[:1], structures[:1], rounds=8))
    assert torch.equal(search_shared([torch.zeros(48, 32)], structures[:1]), torch.arange(32).int())
