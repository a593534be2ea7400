"""The average of the weights of the last steps, taken as the result (Izmailov et al., "Averaging weights", UAI 2018).

Every parameter counts, each step with the same weight. By the time averaging begins no support moves and no permutation
is soft (the recipe sees to that), so that an average of sparse weights lies on their common support.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

from padst_cli.recipe import TrainingRecipe


class Average:
    """The running mean of `parameters` over the last share of the steps; empty until then."""

    def __init__(self, parameters: Sequence[Tensor], recipe: TrainingRecipe) -> None:
        self.parameters = list(parameters)
        # Rounded down: the step in which gates are folded or latent values dropped must lie before.
        self.begin = recipe.steps - int(recipe.average * recipe.steps + 1e-9)
        self.count = 0
        self.means: list[Tensor] = []
        self._update = get_swa_multi_avg_fn()

    @torch.no_grad()
    def see(self, done: int) -> None:
        """Count in the parameters as they are after `done` steps, where these are among the last."""
        if done <= self.begin:
            return
        if not self.means:
            self.means = [parameter.detach().clone() for parameter in self.parameters]
        else:
            self._update(self.means, [each.detach() for each in self.parameters], self.count)
        self.count += 1

    @torch.no_grad()
    def take(self) -> None:
        """Put the mean in the parameters' place; nothing where no step was counted in."""
        for parameter, mean in zip(self.parameters, self.means, strict=False):
            parameter.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"count": self.count, "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; means go to the device of their parameters."""
        self.count = state["count"]
        self.means = [
            mean.to(parameter.device) for mean, parameter in zip(state["means"], self.parameters, strict=False)
        ]
