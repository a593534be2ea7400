"""Dense layers swapped for sparse ones and back: how training begins, is resumed, and hands on to packing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from padst_cli.initialise.start import LayerStart
from padst_cli.permutation.apply import identity, to_structure
from padst_cli.plan import LayerPlan, Plan
from padst_cli.recipe import Recipe
from padst_cli.structures.base import Structure
from padst_cli.training.dynadiag import DiagonalGates
from padst_cli.training.latent import Latent
from padst_cli.training.permutation import Permutation
from padst_cli.training.sparse_linear import SparseLinear, sparse_layers


@dataclass(frozen=True)
class SparseState:
    """One trained layer, ready to be packed: S `[out, in]` zero outside `mask`, and hard permutations (or None)."""

    structure: Structure
    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    perm_in: Tensor | None
    perm_out: Tensor | None


def sparsify_modules(
    student: nn.Module,
    starts: Mapping[str, LayerStart],
    plan: Plan,
    recipe: Recipe,
    teacher: nn.Module | None = None,
) -> None:
    """Swap every planned `nn.Linear` or `Conv1D` of `student` for a `SparseLinear` at its start, in place.

    With permutations of kind "learned" the planned sides begin at the start's permutation (where it has none, those
    that training may change begin at the identity), soft around it on the sides where the learner trains a matrix;
    otherwise the start's permutations are taken as they are. Layers that share their input permutation hold the same
    module. DynaDiag and the learner `projected` need `teacher`, whose dense weights are the latent values outside the
    support.
    """
    shared: dict[str, Permutation] = {}
    for planned in plan.layers:
        start = starts[planned.name]
        old = student.get_submodule(planned.name)
        old_weight = old.get_parameter("weight")
        dtype = old_weight.dtype
        gates = latent = None
        weight = start.weight
        if recipe.support.method == "dynadiag":
            gates, weight = DiagonalGates.from_start(start, _dense_weight(teacher, planned))
        elif recipe.permutation.is_projected:
            latent = Latent(planned.in_features, dtype)
            dense = to_structure(_dense_weight(teacher, planned).to(start.weight), start.perm_in, start.perm_out)
            weight = torch.where(start.mask, start.weight, dense)
        perms = {
            "input": _permutation("input", start.perm_in, start.assigned_in, planned, recipe, dtype),
            "output": _permutation("output", start.perm_out, start.assigned_out, planned, recipe, dtype),
        }
        if planned.shared and perms["input"] is not None:
            perms["input"] = shared.setdefault(planned.shared[0], perms["input"])
        new = SparseLinear(
            start.structure,
            weight.to(dtype),
            start.mask,
            None if start.bias is None else start.bias.to(dtype),
            perms["input"],
            perms["output"],
            gates,
            latent,
        )
        new.train(old.training)
        parent, _, leaf = planned.name.rpartition(".")
        setattr(student.get_submodule(parent), leaf, new.to(old_weight.device))


def _permutation(
    side: str, index: Tensor | None, assigned: Tensor | None, planned: LayerPlan, recipe: Recipe, dtype: torch.dtype
) -> Permutation | None:
    """One side's permutation as training begins with it: to be learned, learned already, or as the start has it."""
    choice = recipe.permutation
    learned = choice.kind == "learned" and side in planned.sides
    if learned and index is None and not choice.is_refined and side in planned.trained:
        index = identity(planned.in_features if side == "input" else planned.out_features)
    if index is None:
        return None
    if not learned:
        return Permutation(index, mixing=None)
    mixing = choice.mixing if choice.is_soft and side in planned.trained else None
    made = Permutation(index, mixing=mixing, dtype=dtype, group=choice.lookup_group, assigned=assigned)
    return made.requires_grad_(not choice.frozen)


def _dense_weight(teacher: nn.Module | None, planned: LayerPlan) -> Tensor:
    """The dense model's W `[out, in]` of a planned layer."""
    if teacher is None:
        raise ValueError("the dense model is needed for latent values")
    dense = teacher.get_submodule(planned.name).get_parameter("weight").detach()
    return dense.T if planned.transposed else dense


def finished_layers(student: nn.Module) -> dict[str, SparseState]:
    """What packing needs of every sparse layer, detached and on the CPU; a side that is still soft is rounded."""
    finished: dict[str, SparseState] = {}
    for name, layer in sparse_layers(student).items():
        perms = {side: perm.rounded().cpu() for side, perm in layer.permutations()}
        finished[name] = SparseState(
            layer.structure,
            layer.effective_weight().detach().cpu(),
            layer.mask.cpu(),
            None if layer.bias is None else layer.bias.detach().cpu(),
            perms.get("input"),
            perms.get("output"),
        )
    return finished


def match_layout(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Harden, fold and settle what was so when the state was saved, so that its tensors find their places."""
    for name, layer in sparse_layers(model).items():
        for side, perm in layer.permutations():
            key = f"{name}.perm_{'in' if side == 'input' else 'out'}.index"
            if perm.is_soft and key in saved:
                perm.harden(saved[key])
        if layer.gates is not None and f"{name}.gates.scores" not in saved:
            layer.gates = None
        if layer.latent is not None and f"{name}.latent.squares" not in saved:
            layer.latent = None
