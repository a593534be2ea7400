"""The soft permutation: its penalty, its projection, its rounding."""

import math

import pytest
import torch

from padst_cli.permutation.apply import permute_columns, random_permutation
from padst_cli.permutation.soft import (
    balanced,
    matrix_of,
    nearest_permutation,
    normalised_penalty,
    penalty,
    project,
    soften,
)


@pytest.fixture
def perm() -> torch.Tensor:
    return random_permutation(24, torch.Generator().manual_seed(0))


def test_the_matrix_of_a_permutation_does_what_its_index_does(perm):
    x = torch.randn(5, 24)
    assert torch.equal(x @ matrix_of(perm).T, x[:, perm.long()])
    # W = S P: what the layer computes with S on permuted inputs is W on plain ones, for W[:, perm] = S.
    weight = torch.randn(7, 24)
    torch.testing.assert_close(permute_columns(weight, perm) @ matrix_of(perm), weight)


def test_penalty_is_zero_exactly_at_a_permutation(perm):
    assert penalty(matrix_of(perm)) == 0.0
    assert penalty(soften(perm, 0.01)) > 0.0
    assert penalty(torch.full((24, 24), 1 / 24)).item() == pytest.approx(2 * (24 - 24 / 24**0.5), rel=1e-5)


@pytest.mark.parametrize("mixing", [0.1, 0.3, 0.6])
def test_normalised_penalty_of_the_start_nears_the_mixing_with_width(mixing):
    for width in (16, 64, 256):
        perm = random_permutation(width, torch.Generator().manual_seed(width))
        norm = math.hypot(1 - mixing + mixing / width, (width - 1) ** 0.5 * mixing / width)
        assert normalised_penalty(soften(perm, mixing)).item() == pytest.approx(1 - norm, abs=1e-5)
        assert 1 - norm == pytest.approx(mixing, abs=2 / width**0.5)


def test_gradient_of_the_penalty_against_finite_differences(perm):
    matrix = soften(perm, 0.4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(penalty, (matrix,), eps=1e-6, atol=1e-6)


def test_soften_is_doubly_stochastic_and_rounds_back(perm):
    matrix = soften(perm, 0.5)
    torch.testing.assert_close(matrix.sum(0), torch.ones(24))
    torch.testing.assert_close(matrix.sum(1), torch.ones(24))
    assert torch.equal(nearest_permutation(matrix), perm)


def test_projection_lands_in_the_polytope_and_leaves_its_points_alone(perm):
    start = soften(perm, 0.3)
    torch.testing.assert_close(project(start), start, atol=1e-6, rtol=0)
    moved = project(start + 0.02 * torch.randn(24, 24))
    assert (moved >= 0).all()
    torch.testing.assert_close(moved.sum(0), torch.ones(24), atol=1e-4, rtol=0)
    torch.testing.assert_close(moved.sum(1), torch.ones(24), atol=1e-4, rtol=0)


def test_projection_survives_an_empty_row(perm):
    matrix = soften(perm, 0.3)
    matrix[3] = -1.0
    projected = project(matrix)
    assert torch.isfinite(projected).all()
    assert (projected[3].sum() - 1.0).abs() < 1e-2


def test_rounding_is_the_exact_assignment_not_the_row_maxima():
    matrix = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.1, 0.4], [0.0, 0.4, 0.6]])
    index = nearest_permutation(matrix)
    assert index.dtype == torch.int32
    # Row maxima would send rows 0 and 1 to column 0.
    assert index.tolist() == [1, 0, 2]


def test_balancing_keeps_a_point_of_the_polytope_and_turns_its_gradient_along_it(perm):
    matrix = project(soften(perm, 0.4, torch.float64) * torch.rand(24, 24, dtype=torch.float64))
    log_matrix = matrix.log().requires_grad_()
    torch.testing.assert_close(balanced(log_matrix), matrix, rtol=1e-4, atol=1e-5)
    # What raises a whole row alike is taken back by the projection, so nothing may ask for it.
    (balanced(log_matrix) * torch.randn(24, 24, dtype=torch.float64)).sum().backward()
    assert log_matrix.grad.abs().max() > 1e-3
    assert log_matrix.grad.sum(1).abs().max() < 1e-6


def test_descent_on_the_penalty_alone_reaches_a_permutation(perm):
    log_matrix = torch.nn.Parameter(soften(perm, 0.5).log())
    optimizer = torch.optim.AdamW([log_matrix], lr=0.05, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        penalty(balanced(log_matrix)).backward()
        optimizer.step()
        log_matrix.data = project(log_matrix.detach().exp()).log()
    assert normalised_penalty(log_matrix.exp()) < 0.01
    assert torch.equal(nearest_permutation(log_matrix.detach().exp()), perm)
