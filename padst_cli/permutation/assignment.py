"""Search for the permutation under which a structure keeps the most of a saliency score.

Two steps alternate, each the exact optimum of its half: the best support for the permutation (`structure.project`, a
top-k), and the best permutation for the support (a linear assignment, solved by scipy). Structures that choose N of
every M inputs stop at once under that alternation, because their support was picked greedily for the present order;
for them one column is lifted out of every group and the lifted columns are reassigned to the groups where they gain
the most, which is again an exact assignment (after gyro-permutation, Yu et al. 2024, arXiv 2407.20496, with the gain
computed in closed form).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from padst_cli.permutation.apply import identity, invert, to_structure

ASSIGNMENT_LIMIT = 512
"""Most slots of one assignment, whose time grows with their cube: a longer side is drawn into equal parts in each
round and assigned within them. What is kept differs by no more than between two beginnings, a hundredth or two."""
EXCHANGE_LIMIT = 512
"""Most N:M groups that exchange columns with each other in one move; its time grows with their square."""
EXCHANGE_ROWS = 2048
"""Most rows that one sweep of exchanges sums its gains over: more are sampled, anew for each sweep."""
_STAY = 1e-9
_ENOUGH = 1e-5
"""A round that adds less than this to the kept share is the last."""


class Supporting(Protocol):
    """What the search asks of a structure."""

    @property
    def name(self) -> str:
        """The structure's registered name."""

    def project(self, score: Tensor) -> Tensor:
        """The feasible support, bool `[out, in]`, that keeps the most of a nonnegative score `[out, in]`."""


@runtime_checkable
class PicksFromGroups(Protocol):
    """A structure that keeps `n` of every `m` consecutive inputs of a row."""

    n: int
    m: int


@dataclass(frozen=True)
class SearchResult:
    """The best order found: permutations (None on a side not asked for), the support of S, the kept share, rounds."""

    perm_in: Tensor | None
    perm_out: Tensor | None
    mask: Tensor
    kept: float
    rounds: int


@dataclass(frozen=True)
class Stacked:
    """Structures of layers that read the same inputs, one below the other: to `search` they are one structure."""

    parts: tuple[Supporting, ...]
    heights: tuple[int, ...]

    @property
    def name(self) -> str:
        """The parts' names."""
        return "+".join(part.name for part in self.parts)

    def project(self, score: Tensor) -> Tensor:
        """The supports of all parts, bool `[sum of out, in]`."""
        rows = score.split(self.heights)
        return torch.cat([part.project(own) for part, own in zip(self.parts, rows, strict=True)])


@dataclass(frozen=True)
class StackedGroups(Stacked):
    """Stacked structures that all keep `n` of every `m` consecutive inputs of a row."""

    n: int
    m: int


def search_shared(scores: Sequence[Tensor], structures: Sequence[Supporting], rounds: int = 8, seed: int = 0) -> Tensor:
    """The one input permutation, int32 `[in]`, under which several structures keep the most of their scores together.

    Score i is `[out_i, in]`; each counts by the share of it that is kept, whatever its scale, so a layer with large
    outputs does not decide alone. Structures that choose N of M must have the same N and M.
    """
    parts, heights = tuple(structures), tuple(score.shape[0] for score in scores)
    together = Stacked(parts, heights)
    first = parts[0]
    if isinstance(first, PicksFromGroups):
        assert all(isinstance(part, PicksFromGroups) and (part.n, part.m) == (first.n, first.m) for part in parts)
        together = StackedGroups(parts, heights, first.n, first.m)
    least = torch.finfo(torch.float32).tiny
    stack = torch.cat([score.float() / float(score.sum(dtype=torch.float64).clamp_min(least)) for score in scores])
    found = search(stack, together, ("input",), rounds, seed).perm_in
    assert found is not None
    return found


def search_together(
    scores: Sequence[Tensor],
    structures: Sequence[Supporting],
    sides: Sequence[Sequence[str]],
    rounds: int = 8,
    seed: int = 0,
) -> list[SearchResult]:
    """`search` for one layer, or for several that have one input permutation together: that comes first, then each
    layer's own part. Raises nothing of its own; `sides` are each layer's.
    """
    if len(scores) == 1:
        return [search(scores[0], structures[0], sides[0], rounds, seed)]
    together = search_shared(scores, structures, rounds, seed) if all("input" in own for own in sides) else None
    results = []
    for score, structure, own in zip(scores, structures, sides, strict=True):
        left = tuple(side for side in own if side != "input")
        found = search(to_structure(score, together, None), structure, left, rounds, seed)
        results.append(replace(found, perm_in=together))
    return results


def kept_share(score: Tensor, mask: Tensor) -> float:
    """The share of a score `[out, in]` that a mask over the same entries covers; 1 for a score of zeros."""
    total = float(score.sum(dtype=torch.float64))
    return float(score[mask].sum(dtype=torch.float64)) / total if total > 0 else 1.0


def search(score: Tensor, structure: Supporting, sides: Sequence[str], rounds: int = 8, seed: int = 0) -> SearchResult:
    """Find permutations of `sides` ("input", "output") and the support that keep the most of `score` `[out, in]`.

    Starts from the identity and returns the best order met, so `kept` is never below the identity's. `score` is
    nonnegative and in coordinates of W. Deterministic for a seed, which only matters above `ASSIGNMENT_LIMIT`
    and for N:M.
    """
    score = score.detach().float()
    best_in = identity(score.shape[1], score.device) if "input" in sides else None
    best_out = identity(score.shape[0], score.device) if "output" in sides else None
    best_mask = structure.project(score)
    best = kept_share(score, best_mask)
    generator = torch.Generator().manual_seed(seed)
    perm_in, perm_out, mask, done = best_in, best_out, best_mask, 0
    while done < rounds and sides:
        done += 1
        perm_in, perm_out = _reorder(score, structure, perm_in, perm_out, mask, generator)
        ordered = to_structure(score, perm_in, perm_out)
        mask = structure.project(ordered)
        kept = kept_share(ordered, mask)
        if kept <= best + _ENOUGH:
            break
        best, best_in, best_out, best_mask = kept, perm_in, perm_out, mask
    return SearchResult(best_in, best_out, best_mask, best, done)


def _reorder(
    score: Tensor,
    structure: Supporting,
    perm_in: Tensor | None,
    perm_out: Tensor | None,
    mask: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor | None, Tensor | None]:
    """One round: new permutations of the sides that have one, the second side for the support of the first's."""
    if perm_in is not None:
        rows = to_structure(score, None, perm_out)
        if isinstance(structure, PicksFromGroups):
            perm_in = exchange_between_groups(rows, perm_in, structure.n, structure.m, generator)
        else:
            perm_in = _assign(mask.float().T, rows.T, perm_in, generator)
        if perm_out is not None:
            mask = structure.project(to_structure(score, perm_in, perm_out))
    if perm_out is not None:
        columns = to_structure(score, perm_in, None)
        slots = _assign(mask.float(), columns, invert(perm_out), generator)
        perm_out = invert(slots)
    return perm_in, perm_out


def _assign(slots: Tensor, items: Tensor, current: Tensor, generator: torch.Generator) -> Tensor:
    """The assignment of items to slots, int32 `[d]`, with the largest sum of `slots[s] @ items[result[s]]`, both
    `[d, k]`.

    Among equals (the slots of one block are alike) an item stays where `current` has it: moves then mean something.
    """
    result = current.to(torch.int64, copy=True)
    for part in _parts(len(current), ASSIGNMENT_LIMIT, generator):
        group = part.to(current.device)
        seated = result[group]
        table = (slots[group] @ items[seated].T).double().cpu().numpy()
        table[range(len(part)), range(len(part))] += _STAY * float(abs(table).max(initial=0.0))
        _, chosen = linear_sum_assignment(table, maximize=True)
        result[group] = seated[torch.from_numpy(chosen).to(current.device)]
    return result.to(torch.int32)


def exchange_between_groups(score: Tensor, perm_in: Tensor, n: int, m: int, generator: torch.Generator) -> Tensor:
    """One sweep of column exchanges for N:M: every seat of the groups is lifted and reassigned once, in random order.

    `score` `[out, in]` has its columns in coordinates of W. In each of up to M moves one column of every group is
    lifted; a lifted column c brings group g the gain `sum over rows of relu(score[c] - theta[g])`, where theta is the
    N-th largest score of the group's other columns. The kept score of the rows summed over never falls. More than
    `EXCHANGE_LIMIT` groups are drawn into equal parts in each move, and columns stay within their part.
    """
    if len(score) > EXCHANGE_ROWS:
        score = score[torch.randperm(len(score), generator=generator)[:EXCHANGE_ROWS].to(score.device)]
    size = score.shape[1]
    groups = math.ceil(size / m)
    perm = perm_in.long().clone()
    widths = torch.full((groups,), m)
    widths[-1] = size - (groups - 1) * m
    seats = [torch.randperm(int(width), generator=generator) for width in widths]
    for move in range(m):
        taking = [group for group in range(groups) if move < widths[group]]
        slots = torch.tensor([group * m + int(seats[group][move]) for group in taking])
        ordered = score.index_select(1, perm)
        lifted, theta = ordered[:, slots], _thresholds(ordered, slots, n, m)[:, torch.tensor(taking)]
        for part in _parts(len(taking), EXCHANGE_LIMIT, generator):
            gain = _seat_gains(lifted[:, part], theta[:, part])
            table = gain.cpu().numpy()
            table[range(len(part)), range(len(part))] += _STAY * float(abs(table).max())
            _, chosen = linear_sum_assignment(table, maximize=True)
            perm[slots[part]] = perm[slots[part[torch.from_numpy(chosen)]]]
    return perm.to(torch.int32)


def _parts(count: int, limit: int, generator: torch.Generator) -> Sequence[Tensor]:
    """`range(count)` whole, or shuffled into as few parts of about equal size as have at most `limit` each."""
    if count <= limit:
        return [torch.arange(count)]
    return torch.randperm(count, generator=generator).chunk(math.ceil(count / limit))


def _thresholds(ordered: Tensor, slots: Tensor, n: int, m: int) -> Tensor:
    """Theta `[out, groups]` of `ordered` `[out, in]`, in slot order, once the columns in `slots` are lifted."""
    rest = torch.nn.functional.pad(ordered, (0, -ordered.shape[1] % m))
    rest[:, slots] = 0.0
    grouped = rest.view(ordered.shape[0], -1, m)
    return grouped.amax(dim=2) if n == 1 else grouped.topk(n, dim=2).values[:, :, -1]


def _seat_gains(lifted: Tensor, theta: Tensor) -> Tensor:
    """Gain `[group, column]`, float64, of seating each column `lifted` `[out, column]` in each group `[out, group]`.

    relu(a - b) = (|a - b| + a - b) / 2, so that the sum over rows is an l1 distance, for which there is a kernel; in
    float64 because two large sums cancel.
    """
    columns, levels = lifted.T.double().contiguous(), theta.T.double().contiguous()
    distance = torch.cdist(levels, columns, p=1.0)
    return (distance + columns.sum(1) - levels.sum(1)[:, None]) / 2
