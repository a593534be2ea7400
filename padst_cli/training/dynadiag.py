"""DynaDiag: which diagonals are active follows from one learned score each, through a soft top-k that hardens with
time.

After Tyagi et al., "Dynamic Sparse Training of Diagonally Sparse Networks" (ICML 2025, arXiv 2506.11449): diagonal j
enters with the gate `min(1, k softmax(score / T)_j)` and T falls over the run (a cosine, as in their code). What
differs here, because we start from a pretrained model and promise an exactly sparse forward pass:

- only the k best-scored diagonals enter the forward pass; the others get a gradient of their score as if their gate
  multiplied their latent values (straight-through), so they can climb into the top k;
- latent values of a diagonal that was never active are the dense model's own, and they rest while the diagonal is
  inactive;
- scores start so that the support is the calibrated one with gates of 0.9, and the weights are divided by them: the
  model starts unchanged. Scores are in units of the first temperature for that, so only the ratio of the two counts;
- the top k is taken every `support.every` steps, and at the share `support.until` the gates are multiplied into the
  weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from padst_cli.errors import PadstError
from padst_cli.initialise.start import LayerStart
from padst_cli.permutation.apply import to_structure
from padst_cli.structures.diagonal import Diagonal

# How far a score can travel while diagonals still move, whatever the number of steps: about twice what parts the best
# inactive diagonal from the active ones at the start (4.4 at density 0.1).
_TRAVEL = 8.0
_START_GATE = 0.9
_START_SPREAD = 0.5


class _Gated(torch.autograd.Function):
    """`where(mask, weight * gates, 0)`, all `[out, in]`, with gradients to all weights and gates, active or not."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gates: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, gates)
        return torch.where(mask, weight * gates, torch.zeros((), dtype=weight.dtype, device=weight.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, gates = ctx.saved_tensors
        return grads[0] * gates, grads[0] * weight, None


class DiagonalGates(nn.Module):
    """The scores of all diagonals (or bands) of one layer, float `[1, units]`, and their gates at `temperature`.

    It is 1 at the start, whatever the recipe's first one is.
    """

    def __init__(self, structure: Diagonal, scores: Tensor) -> None:
        super().__init__()
        self.structure = structure
        self.temperature = 1.0
        self.scores = nn.Parameter(scores)

    @classmethod
    def from_start(cls, start: LayerStart, dense: Tensor) -> tuple[DiagonalGates, Tensor]:
        """Gates whose support is the start's, and the latent weight S `[out, in]` to go with them.

        `dense` `[out, in]` is the original matrix W; its entries fill the inactive diagonals. Raises `PadstError` for
        any structure but diagonals.
        """
        structure = start.structure
        if not isinstance(structure, Diagonal):
            raise PadstError(
                f"dst method 'dynadiag' learns scores of diagonals, layer '{start.name}' is {structure.name}"
            )
        dense = to_structure(dense.to(start.weight), start.perm_in, start.perm_out)
        scores = _start_scores(structure.units_of(start.mask), structure.unit_scores(dense.square()))
        gates = cls(structure, scores)
        return gates, torch.where(start.mask, start.weight / gates.by_entry().detach(), dense)

    def by_entry(self) -> Tensor:
        """The gate in [0, 1] of every entry's diagonal, `[out, in]`; 0 for diagonals that belong to no band."""
        active = self.structure.count // self.structure.band
        soft = torch.softmax(self.scores / self.temperature, dim=1) * active
        return self.structure.spread(soft.clamp(max=1.0))

    def apply_to(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The gated weight `[out, in]`, zero outside `mask`; gradients reach the scores of inactive diagonals too."""
        gated: Tensor = _Gated.apply(weight, self.by_entry().to(weight.dtype), mask)
        return gated

    @torch.no_grad()
    def support(self) -> Tensor:
        """The mask `[out, in]` of the present top k."""
        return self.structure.expand(self.structure.select(self.scores.detach()))


def score_learning_rate(steps: int, until: float) -> float:
    """Adam's learning rate for scores: it moves an entry by at most about this much a step, and scores must cross."""
    return _TRAVEL / max(1.0, until * steps)


def temperature_at(share: float, until: float, start: float, end: float) -> float:
    """The temperature after `share` of the run: half a cosine from `start` to `end`, which it reaches at `until`."""
    progress = min(1.0, share / until) if until > 0 else 1.0
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _start_scores(active: Tensor, saliency: Tensor) -> Tensor:
    """Equal scores for active units, lower ones by rank of saliency for the rest; all `[1, units]`."""
    ranks = torch.where(active, -torch.inf, saliency).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    scores = _START_SPREAD * (ranks.to(saliency) / ranks.shape[1] - 1.0)
    # k e^s / (k e^s + rest) = the start gate, solved for the score s of an active unit.
    rest = float(scores[~active].exp().sum())
    level = math.log(max(rest, 1e-6) * _START_GATE / (1.0 - _START_GATE) / int(active.sum()))
    return torch.where(active, max(level, _START_SPREAD), scores)
