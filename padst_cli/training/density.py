"""Gradual density: training begins wide and narrows to the target, unit by unit, in the steps that move the support.

The schedule is the cubic of Zhu and Gupta, "To prune, or not to prune", 2017 (arXiv 1710.01878, equation 1). What goes
in a step is chosen by the structure's own projection at the density of that step, so that it holds for every structure.
"""

from __future__ import annotations

from padst_cli.recipe import SupportRecipe
from padst_cli.structures import Structure


def narrows(recipe: SupportRecipe, done: int, steps: int) -> bool:
    """Whether the density falls in the step that follows `done` finished ones: every `every` steps, and at the last."""
    last = recipe.narrowed_after(steps)
    if last is None:
        return False
    return done == last or (0 < done < last and done % recipe.every == 0)


def density_at(recipe: SupportRecipe, target: float, done: int, steps: int) -> float:
    """`target + (start - target) (1 - t / t_end)^3` after `done` steps, the target from t_end on."""
    last = recipe.narrowed_after(steps)
    if recipe.start_density is None or last is None or done >= last:
        return target
    return target + (recipe.start_density - target) * (1.0 - done / last) ** 3


def narrowed_at(recipe: SupportRecipe, structure: Structure, done: int, steps: int) -> Structure | None:
    """A layer's `structure` at the density of this step, itself at the last; None where the density does not fall."""
    if not narrows(recipe, done, steps):
        return None
    if done == recipe.narrowed_after(steps):
        return structure
    return structure.at_density(density_at(recipe, structure.density, done, steps))
