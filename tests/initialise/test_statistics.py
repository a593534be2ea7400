import math

import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.initialise import statistics as module
from padst_cli.initialise.statistics import InputStatistics

CPU = torch.device("cpu")


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(seed))


def test_sums_over_calls_batches_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 7)
    statistics = InputStatistics(6, CPU)
    statistics.add([inputs(0), inputs(1)], [inputs(2), inputs(3)], None)
    statistics.add([inputs(4)], [inputs(5)], None)
    sparse = torch.cat([inputs(0), inputs(1), inputs(4)]).view(-1, 6)
    dense = torch.cat([inputs(2), inputs(3), inputs(5)]).view(-1, 6)
    assert statistics.tokens == 90
    torch.testing.assert_close(statistics.gram, sparse.T @ sparse)
    torch.testing.assert_close(statistics.cross, sparse.T @ dense)
    torch.testing.assert_close(statistics.dense_gram, dense.T @ dense)


def test_padding_is_left_out() -> None:
    keep = torch.arange(30) % 3 > 0
    padded, plain = InputStatistics(6, CPU), InputStatistics(6, CPU)
    padded.add([inputs(0)], [inputs(1)], keep)
    plain.add([inputs(0).view(-1, 6)[keep]], [inputs(1).view(-1, 6)[keep]], None)
    assert padded.tokens == plain.tokens == 20
    torch.testing.assert_close(padded.cross, plain.cross)


def test_other_tokens_in_the_two_models_cannot_be_paired() -> None:
    statistics = InputStatistics(6, CPU)
    statistics.add([inputs(0)], [inputs(1)], None)
    statistics.add([inputs(2)[:2]], [inputs(3)], None)
    statistics.add([], [inputs(3)], None)
    assert not statistics.paired
    sparse = torch.cat([inputs(0), inputs(2)[:2]]).view(-1, 6)
    torch.testing.assert_close(statistics.gram, sparse.T @ sparse)
    assert statistics.cross is statistics.gram
    assert statistics.dense_gram is statistics.gram


def test_relative_error_is_that_of_the_outputs() -> None:
    statistics = InputStatistics(6, CPU)
    statistics.add([inputs(0)], [inputs(1)], None)
    w, s = torch.randn(4, 6), torch.randn(4, 6)
    sparse, dense = inputs(0).view(-1, 6), inputs(1).view(-1, 6)
    expected = (dense @ w.T - sparse @ s.T).square().sum() / (dense @ w.T).square().sum()
    found, none, all_of_it = statistics.relative_errors(w, statistics.aim(w), (s, torch.zeros(4, 6), w))
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert none == pytest.approx(1.0)
    changed = (dense @ w.T - sparse @ w.T).square().sum() / (dense @ w.T).square().sum()
    assert all_of_it == pytest.approx(float(changed), rel=1e-4)


def test_the_aim_is_what_the_sparse_inputs_say_of_the_dense_outputs() -> None:
    statistics = InputStatistics(6, CPU)
    statistics.add([inputs(0)], [inputs(1)], None)
    w = torch.randn(4, 6)
    torch.testing.assert_close(statistics.aim(w), (inputs(0).view(-1, 6).T @ inputs(1).view(-1, 6) @ w.T).T)


def test_no_token_has_no_error() -> None:
    statistics, weight = InputStatistics(6, CPU), torch.ones(2, 6)
    assert all(map(math.isnan, statistics.relative_errors(weight, statistics.aim(weight), (weight, weight))))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_inputs_that_are_not_finite_are_refused(value: float, side: int) -> None:
    statistics = InputStatistics(6, CPU)
    pair = [inputs(0), inputs(1)]
    pair[side][1, 2, 3] = value
    statistics.add([pair[0]], [pair[1]], None)
    with pytest.raises(PadstError, match="NaN or infinity"):
        statistics.check_finite()
