import pytest
import torch
from torch import Tensor

from padst_cli.initialise.refit import refit
from padst_cli.initialise.saliency import plain_saliency, refit_saliency
from padst_cli.initialise.statistics import InputStatistics

OUT, IN, TOKENS, DAMPING = 5, 8, 60, 0.01


def setting() -> tuple[Tensor, InputStatistics, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(TOKENS, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    sparse = dense + 0.3 * torch.randn(TOKENS, IN, generator=generator)
    statistics = InputStatistics(IN, torch.device("cpu"))
    statistics.add([sparse], [dense], None)
    return torch.randn(OUT, IN, generator=generator), statistics, sparse, dense


def test_plain_saliency_is_the_energy_of_each_product() -> None:
    weight, statistics, sparse, _ = setting()
    expected = (sparse[:, None, :] * weight).square().mean(0)
    torch.testing.assert_close(plain_saliency(weight, statistics), expected)


@pytest.mark.parametrize("column", range(IN))
def test_refit_saliency_is_the_loss_of_leaving_one_weight_out(column: int) -> None:
    weight, statistics, sparse, dense = setting()
    ridge = DAMPING * statistics.gram.diagonal().mean()

    def loss(mask: Tensor) -> Tensor:
        fitted = refit(weight, mask, statistics.gram, statistics.aim(weight), DAMPING).weight
        residual = dense @ weight.T - sparse @ fitted.T
        return residual.square().sum(0) + ridge * (fitted - weight).square().sum(1)

    full = torch.ones(OUT, IN, dtype=torch.bool)
    without = full.clone()
    without[:, column] = False
    expected = (loss(without) - loss(full)) / TOKENS
    found = refit_saliency(weight, statistics.aim(weight), statistics, DAMPING)[:, column]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-4)


def test_without_any_token_it_is_the_squared_weight() -> None:
    weight = setting()[0]
    statistics = InputStatistics(IN, torch.device("cpu"))
    assert torch.equal(refit_saliency(weight, statistics.aim(weight), statistics, DAMPING), weight.square())
    assert torch.equal(plain_saliency(weight, statistics), weight.square())
