import numpy as np
import pytest
import torch
from torch import Tensor

from padst_cli.errors import PadstError
from padst_cli.initialise.refit import damped_cholesky, refit
from padst_cli.initialise.statistics import InputStatistics
from padst_cli.structures import StructureOptions, structure_class

OUT, IN, TOKENS = 48, 32, 200


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(TOKENS, IN, generator=generator, dtype=dtype) @ torch.randn(
        IN, IN, generator=generator, dtype=dtype
    )
    sparse = dense + 0.2 * torch.randn(TOKENS, IN, generator=generator, dtype=dtype)
    return torch.randn(OUT, IN, generator=generator, dtype=dtype), dense, sparse


def masks() -> dict[str, Tensor]:
    score = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(7))
    found = {
        name: structure_class(name).for_density(OUT, IN, 0.3, StructureOptions()).project(score)
        for name in ("block", "diag", "nm", "unstructured")
    }
    ragged = score > torch.linspace(0.1, 1.0, OUT)[:, None]
    ragged[5] = ragged[9] = ragged[20]
    ragged[11] = False
    return found | {"ragged, three alike, one empty": ragged, "full": torch.ones(OUT, IN, dtype=torch.bool)}


@pytest.mark.parametrize("name", list(masks()))
def test_each_row_is_the_least_squares_solution_on_its_support(name: str) -> None:
    weight, dense, sparse = problem()
    mask = masks()[name]
    result = refit(weight, mask, sparse.T @ sparse, weight @ dense.T @ sparse, damping=1e-12)
    assert result.escalated_rows == 0
    for row in range(OUT):
        columns = mask[row].nonzero().ravel().numpy()
        expected = np.zeros(IN)
        target = (dense @ weight[row]).numpy()
        expected[columns] = np.linalg.lstsq(sparse.numpy()[:, columns], target, rcond=None)[0]
        np.testing.assert_allclose(result.weight[row].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_damping_pulls_towards_the_old_weight() -> None:
    weight, dense, sparse = problem()
    mask = masks()["diag"]
    gram, cross = sparse.T @ sparse, sparse.T @ dense
    held = refit(weight, mask, gram, weight @ cross.T, damping=1e9).weight
    torch.testing.assert_close(held, torch.where(mask, weight, 0.0), rtol=1e-5, atol=1e-5)
    row, damping = 3, 0.05
    columns = mask[row].nonzero().ravel()
    ridge = damping * gram.diagonal().mean()
    matrix = gram[columns][:, columns] + ridge * torch.eye(len(columns), dtype=gram.dtype)
    expected = torch.linalg.solve(matrix, (cross @ weight[row])[columns] + ridge * weight[row, columns])
    torch.testing.assert_close(refit(weight, mask, gram, weight @ cross.T, damping).weight[row, columns], expected)


def test_a_dead_input_keeps_its_weight() -> None:
    weight, dense, sparse = problem()
    dense, sparse = dense.clone(), sparse.clone()
    dense[:, 4] = sparse[:, 4] = 0.0
    mask = torch.ones(OUT, IN, dtype=torch.bool)
    result = refit(weight, mask, sparse.T @ sparse, weight @ dense.T @ sparse, damping=0.01).weight
    torch.testing.assert_close(result[:, 4], weight[:, 4])


@pytest.mark.parametrize("name", ["block", "nm", "ragged, three alike, one empty"])
def test_memory_budget_does_not_change_the_result(name: str) -> None:
    weight, dense, sparse = problem(dtype=torch.float32)
    mask = masks()[name]
    gram, cross = sparse.T @ sparse, sparse.T @ dense
    whole = refit(weight, mask, gram, weight @ cross.T, 0.01)
    pieces = refit(weight, mask, gram, weight @ cross.T, 0.01, budget_bytes=1)
    torch.testing.assert_close(whole.weight, pieces.weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.weight != 0, mask)


def test_fewer_tokens_than_inputs_still_lower_the_error() -> None:
    weight, dense, sparse = problem(dtype=torch.float32)
    statistics = InputStatistics(IN, torch.device("cpu"))
    statistics.add([sparse[:5]], [dense[:5]], None)
    mask = masks()["unstructured"]
    result = refit(weight, mask, statistics.gram, statistics.aim(weight), 0.01)
    masked = torch.where(mask, weight, 0.0)
    assert torch.isfinite(result.weight).all()
    before, after = statistics.relative_errors(weight, statistics.aim(weight), (masked, result.weight))
    assert after < before


def test_a_singular_problem_is_damped_more_and_counted() -> None:
    # float32 cannot factorise a matrix of rank one with a ridge this small.
    x = torch.ones(8, IN)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(OUT, IN, dtype=torch.bool)
    result = refit(weight, mask, 1e4 * x.T @ x, 1e4 * weight @ x.T @ x, damping=1e-9)
    assert result.escalated_rows == OUT
    assert torch.isfinite(result.weight).all()
    torch.testing.assert_close(x @ result.weight.T, x @ weight.T, rtol=1e-2, atol=1e-2)


def test_what_no_damping_can_solve_is_refused() -> None:
    with pytest.raises(PadstError, match=r"calibration\.damping"):
        damped_cholesky(torch.full((3, 3), float("nan")), 0.1)


def test_no_signal_at_all_keeps_the_old_weights() -> None:
    weight, _, _ = problem()
    mask = masks()["nm"]
    zero = torch.zeros(IN, IN, dtype=weight.dtype)
    assert torch.equal(refit(weight, mask, zero, torch.zeros_like(weight), 0.01).weight, torch.where(mask, weight, 0.0))
