"""The learner `straight-through`: an index forward, the gradient of a soft matrix backward, in groups."""

import pytest
import torch

from padst_cli.events import Hardened, Step
from padst_cli.permutation.apply import random_permutation
from padst_cli.permutation.soft import matrix_of
from padst_cli.training.hardening import Hardener
from padst_cli.training.permutation import Permutation
from padst_cli.training.sparse_linear import sparse_layers
from padst_cli.training.straight_through import HardLookup
from padst_cli.training.swap import finished_layers

WIDTH = 22


def start_of(width=WIDTH):
    return random_permutation(width, torch.Generator().manual_seed(2))


def dense(lookup, start):
    """The grouped matrices as one `[d, d]` over the inputs themselves."""
    width = start.numel()
    blocks = torch.block_diag(*lookup.matrices())[:width, :width]
    return blocks @ matrix_of(start)


def blurred(group, mixing=0.3):
    lookup, start = HardLookup(start_of(), mixing, group), start_of()
    with torch.no_grad():
        lookup.log_matrix.add_(torch.randn(lookup.log_matrix.shape, generator=torch.Generator().manual_seed(3)))
    lookup.project()
    return lookup, start


@pytest.mark.parametrize("group", [WIDTH, 64, 11, 8])
def test_forward_is_the_index_and_the_gradient_that_of_the_matrix(group):
    lookup, start = blurred(group)
    lookup.index.copy_(start.flip(0))
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    target = torch.randn(3, 5, WIDTH)
    y = lookup(x, start)
    assert torch.equal(y, x[..., start.flip(0).long()])
    dx, dlog = torch.autograd.grad((y * target).sum(), [x, lookup.log_matrix])
    assert torch.equal(dx[..., start.flip(0).long()], target)
    soft = torch.nn.functional.linear(x.detach(), dense(lookup, start))
    (expected,) = torch.autograd.grad((soft * target).sum(), [lookup.log_matrix])
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(dlog, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [WIDTH, 8])
def test_matrices_stay_doubly_stochastic_and_padding_apart(group):
    lookup, start = blurred(group)
    whole = dense(lookup, start)
    ones = torch.ones(WIDTH)
    torch.testing.assert_close(whole.sum(0), ones, rtol=0, atol=1e-3)
    torch.testing.assert_close(whole.sum(1), ones, rtol=0, atol=1e-3)
    assert lookup.padding == (2 if group == 8 else 0)


def test_the_nearest_permutation_stays_within_the_groups_of_the_start():
    lookup, start = blurred(8)
    assert torch.equal(HardLookup(start, 0.3, 8).nearest(start), start)
    swapped = start.clone()
    swapped[[1, 6]] = start[[6, 1]]
    swapped[[20, 21]] = start[[21, 20]]
    with torch.no_grad():
        wanted = torch.eye(8).repeat(3, 1, 1)
        wanted[0, [1, 6]] = wanted[0, [6, 1]]
        wanted[2, [4, 5]] = wanted[2, [5, 4]]
        lookup.log_matrix.copy_((wanted + 1e-3).log())
    lookup.project()
    assert torch.equal(lookup.nearest(start), swapped)


def test_hardening_keeps_the_index_in_use():
    perm = Permutation(start_of(), mixing=0.3, group=8)
    assert perm.is_soft
    assert perm.moved == 0
    perm.lookup.index.copy_(start_of().flip(0))
    assert perm.moved == WIDTH
    x = torch.randn(4, WIDTH)
    before = perm(x)
    perm.harden(perm.rounded())
    assert not perm.is_soft
    assert list(perm.state_dict()) == ["start", "assigned", "index"]
    assert torch.equal(perm(x), before)


def test_indices_follow_their_matrices_every_so_many_steps(bench):
    recipe = bench.recipe(**{"permutation.learner": "straight-through", "permutation.resolve_every": 3})
    _, student = bench.student(recipe)
    hardener = Hardener(sparse_layers(student), recipe)
    assert hardener.penalised == hardener.penalties() == {}
    assert len(hardener.soft) == 8
    for perm in hardener.soft.values():
        with torch.no_grad():
            perm.lookup.log_matrix.copy_(perm.lookup.log_matrix.flip(1))
    hardener.project(2)
    assert all(perm.moved == 0 for perm in hardener.soft.values())
    hardener.project(3)
    assert all(torch.equal(perm.rounded(), perm.start.flip(0)) for perm in hardener.soft.values())
    assert hardener.due(5) == {}
    assert hardener.due(6) == dict.fromkeys(hardener.soft, (0.0, "deadline"))


@pytest.mark.parametrize("structure", ["diag", "nm", "block", "unstructured"])
@pytest.mark.parametrize("group", [256, 12])
def test_a_run_moves_entries_and_hardens_at_the_deadline(bench, events, structure, group):
    changes = {
        "structure": structure, "permutation.learner": "straight-through", "permutation.group": group,
        "permutation.learning_rate": 0.5, "training.steps": 24,
    }  # fmt: skip
    student, result = bench.train(bench.recipe(**changes), on_event=events.append)
    permuted, before = {"unstructured": (0, 0), "nm": (8, 0)}.get(structure, (16, 8))
    assert result.permutations["learned"] == result.permutations["hardened_at_deadline"] == permuted
    assert result.permutations["learned_before_training"] == before
    assert (result.permutations["moved_from_start"] > 0) == (permuted > 0)
    hardened = [event for event in events if isinstance(event, Hardened)]
    assert [(event.step, event.penalty) for event in hardened] == [(0, 0.0)] * before + [(12, 0.0)] * (
        permuted - before
    )
    assert all("penalty" not in event.terms for event in events if isinstance(event, Step))
    for layer in sparse_layers(student).values():
        for _, perm in layer.permutations():
            cut = perm.start.split(group), perm.index.split(group)
            assert all(set(old.tolist()) == set(new.tolist()) for old, new in zip(*cut, strict=True))
    assert all(state.mask.any() for state in finished_layers(student).values())
