"""From the figures of cells to what a study says: means, paired differences, and the gap that is closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from padst_cli.study.cells import UNSTRUCTURED
from padst_cli.study.figures import CellFigures, score_of
from padst_cli.study.recipe import ONE_SHOT
from padst_cli.study.statistics import Interval, gap_closed, interval, paired

BySeed = dict[int, float]


@dataclass(frozen=True)
class Row:
    """All seeds of one method: `kl` to the dense model (None where it is not measured) and `score`, and its cost.

    `start` is the score before training; seconds are those of a step, over the run and over its soft phase; bytes the
    most resident memory; `moved` and `moved_in_training` have one count a seed, empty for a method that learns no
    permutation. What is `one_shot` was never trained.
    """

    structure: str
    method: str
    kl: Interval | None
    score: Interval
    start: Interval
    step_seconds: Interval | None
    soft_step_seconds: Interval | None
    peak_bytes: Interval | None
    moved: tuple[int, ...]
    moved_in_training: tuple[int, ...]
    one_shot: bool


@dataclass(frozen=True)
class Contrast:
    """A method against its structure without a permutation, against the better control, and against what it began as.

    Differences are paired by seed; `*_kl` of the divergence from the dense model (or of the one metric of a model
    without predictions), `*_score` of the second figure. None where one side was not run. `gap` is the share of the
    distance from none to the control that is closed, in the divergence.
    """

    structure: str
    method: str
    none_kl: Interval | None
    none_score: Interval | None
    control_kl: Interval | None
    control_score: Interval | None
    assignment_kl: Interval | None
    frozen_kl: Interval | None
    gap: float | None


@dataclass(frozen=True)
class Comparison:
    """All cells of one model at one sparsity."""

    model: str
    sparsity: float
    cells: Sequence[CellFigures]

    @cached_property
    def methods(self) -> list[tuple[str, str]]:
        """(structure, method) in the order of the grid, what is never trained behind the rest."""
        found = dict.fromkeys((cell.structure, cell.method) for cell in self.cells)
        return sorted(found, key=lambda place: place[1] in ONE_SHOT)

    @cached_property
    def trained(self) -> list[tuple[str, str]]:
        """`methods` without those that are never trained."""
        return [place for place in self.methods if place[1] not in ONE_SHOT]

    @cached_property
    def control(self) -> str | None:
        """The unstructured control with the smaller mean divergence over the seeds that all have; None without one.

        Where they have none in common, the one with the most seeds.
        """
        found = {name: self._primary(UNSTRUCTURED, name) for kind, name in self.trained if kind == UNSTRUCTURED}
        common = set.intersection(*(set(by_seed) for by_seed in found.values())) if found else set()
        if not common:
            return max(found, key=lambda name: len(found[name]), default=None)
        return min(found, key=lambda name: sum(found[name][seed] for seed in common))

    def rows(self) -> list[Row]:
        """One row a method."""
        return [self._row(structure, method) for structure, method in self.methods]

    def contrasts(self) -> list[Contrast]:
        """One contrast for every trained method of a structure."""
        return [self._contrast(*place) for place in self.trained if place[0] != UNSTRUCTURED]

    def _row(self, structure: str, method: str) -> Row:
        cells = self._of(structure, method)
        score = interval([cell.score for cell in cells])
        start = interval([score_of(cell.metric, cell.initial) for cell in cells])
        learned = any(cell.learned for cell in cells)
        assert score is not None
        assert start is not None
        return Row(
            structure=structure,
            method=method,
            kl=interval([cell.kl_to_dense for cell in cells if cell.kl_to_dense is not None]),
            score=score,
            start=start,
            step_seconds=interval([cell.step_seconds for cell in cells if cell.step_seconds is not None]),
            soft_step_seconds=interval(
                [cell.soft_step_seconds for cell in cells if cell.soft_step_seconds is not None]
            ),
            peak_bytes=interval([cell.peak_bytes for cell in cells if cell.peak_bytes is not None]),
            moved=tuple(cell.moved for cell in cells if learned),
            moved_in_training=tuple(cell.moved_in_training for cell in cells if learned),
            one_shot=method in ONE_SHOT,
        )

    def _contrast(self, structure: str, method: str) -> Contrast:
        def against(other_structure: str, other: str | None, figure: Callable[[str, str], BySeed]) -> Interval | None:
            if other is None or (other_structure, other) == (structure, method):
                return None
            return paired(figure(structure, method), figure(other_structure, other))

        own, none = self._primary(structure, method), self._primary(structure, "none")
        return Contrast(
            structure=structure,
            method=method,
            none_kl=against(structure, "none", self._primary),
            none_score=against(structure, "none", self._score),
            control_kl=against(UNSTRUCTURED, self.control, self._primary),
            control_score=against(UNSTRUCTURED, self.control, self._score),
            assignment_kl=against(structure, "assignment", self._primary),
            frozen_kl=against(structure, "frozen", self._primary),
            gap=gap_closed(own, none, self._primary(UNSTRUCTURED, self.control)) if self.control else None,
        )

    def _of(self, structure: str, method: str) -> list[CellFigures]:
        return [cell for cell in self.cells if (cell.structure, cell.method) == (structure, method)]

    def _primary(self, structure: str, method: str) -> BySeed:
        """The figure that decides, by seed: the divergence; of a model without predictions its only metric."""
        return {
            cell.seed: cell.score if cell.kl_to_dense is None else cell.kl_to_dense
            for cell in self._of(structure, method)
        }

    def _score(self, structure: str, method: str) -> BySeed:
        return {cell.seed: cell.score for cell in self._of(structure, method)}


@dataclass(frozen=True)
class ModelSummary:
    """One model: its dense scores, as it came and fine-tuned as long as the sparse ones, and its comparisons."""

    model: str
    metric: str
    dense: float
    finetuned: Interval | None
    finetuned_kl: Interval | None
    comparisons: Sequence[Comparison]


def summarise(cells: Sequence[CellFigures]) -> list[ModelSummary]:
    """The done cells of a study by model, in the order of the grid."""
    summaries = []
    for model in dict.fromkeys(cell.model for cell in cells):
        own = [cell for cell in cells if cell.model == model]
        first = own[0]
        tuned = [score_of(cell.metric, cell.dense_finetuned) for cell in own if cell.dense_finetuned is not None]
        tuned_kl = [cell.dense_finetuned_kl_to_dense for cell in own if cell.dense_finetuned_kl_to_dense is not None]
        comparisons = [
            Comparison(model, sparsity, [cell for cell in own if cell.sparsity == sparsity])
            for sparsity in sorted({cell.sparsity for cell in own})
        ]
        dense = score_of(first.metric, first.dense)
        summaries.append(ModelSummary(model, first.metric, dense, interval(tuned), interval(tuned_kl), comparisons))
    return summaries
