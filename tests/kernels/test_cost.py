"""What the cost model says, with costs that are made up."""

from __future__ import annotations

import json

import pytest
from padst_kernels.cost import FEW, NEVER, TOKENS, Costs, Curve, Work, index_bits, resident_bound

from tests.costs import SPARSE_ONLY, costs, curve

WORK = Work("diag", "float32", 100, 50, 2000)


def test_seconds_are_linear_between_the_points_of_the_grid():
    edges, rates = tuple(float(t) for t in TOKENS), tuple(2.0 * t for t in TOKENS)
    found = Curve(7.0, edges, rates)
    for tokens in (1, 3, 16, 100, 512, 5000):
        assert found.seconds(tokens, 10, 5) == pytest.approx(7 + 10 * tokens + 5 * 2 * tokens)
    bent = Curve(0.0, (0.0,) * len(TOKENS), tuple(float(t >= 4) for t in TOKENS))
    assert [bent.seconds(tokens, 0, 1) for tokens in (2, 3, 4)] == [0.0, 0.5, 1.0]


def test_families_and_entries():
    assert Work.of("nm", 4, "float32", 8, 8, 32).family == "nm2"
    assert Work.of("nm", 15, "float32", 8, 8, 32).family == "nm4"
    assert Work.of("nm", 32, "float32", 8, 8, 32).family == "nm8"
    assert Work.of("block", 0, "float32", 8, 8, 32).family == "block"
    assert (WORK.dense_entries, WORK.features) == (5000, 150)
    assert [index_bits(m) for m in (2, 4, 5, 16, 17, 32)] == [2, 2, 4, 4, 8, 8]


def test_unpacking_pays_from_the_token_count_on_where_it_is_cheaper():
    # An entry and token: kernel 10 ns for 2000 entries, product 1 ns for 5000; unpacking 300 us: even at 20 tokens.
    made = costs(kernel=10e-9, dense=1e-9, unpack=60e-9)
    first = made.transient_from(WORK, "float32")
    assert 20 < first <= 24
    assert made.transient_seconds(WORK, first, "float32") < made.kernel_seconds(WORK, first)
    assert costs(kernel=2e-9, dense=1e-9, unpack=0.0).transient_from(WORK, "float32") == NEVER
    assert costs(kernel=1e-6, dense=1e-9, unpack=0.0).transient_from(WORK, "float32") == FEW + 2
    assert SPARSE_ONLY.transient_from(WORK, "float32") == NEVER


def test_a_gain_at_few_tokens_alone_does_not_count():
    kernel = Curve(0.0, (0.0,) * len(TOKENS), tuple(1.0 if tokens < 64 else 1e-12 for tokens in TOKENS))
    made = costs(kernel=1.0, dense=1e-9, unpack=0.0)
    odd = Costs({**made.kernels, "diag float32": kernel}, made.unpacks, made.dense)
    assert odd.transient_from(WORK, "float32") == NEVER


def test_where_a_dense_weight_at_hand_would_gain():
    assert costs(kernel=10e-9, dense=1e-9, unpack=60e-9).dense_gains(WORK, "float32")
    assert not costs(kernel=2e-9, dense=1e-9, unpack=60e-9).dense_gains(WORK, "float32")
    assert not costs(kernel=10e-9, dense=1e-9, unpack=0.0).dense_gains(WORK, "float32")


def test_both_16_bit_value_dtypes_have_one_cost():
    made = costs(kernel=1e-9, dense=1e-9, unpack=1e-9)
    half = Work("diag", "float16", 100, 50, 2000)
    assert made.kernel_seconds(half, 8) == made.kernel_seconds(Work("diag", "bfloat16", 100, 50, 2000), 8)


def test_costs_survive_json():
    made = costs(kernel=1e-9, dense=2e-9, unpack=3e-9, call=4e-6)
    assert Costs.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw.pop("dense"),
        lambda raw: raw.update(kernels={}, unpacks={}),
        lambda raw: raw["unpacks"].popitem(),
        lambda raw: raw["kernels"]["diag float32"].update(call=-1.0),
        lambda raw: raw["kernels"]["diag float32"].update(rates=[1.0]),
        lambda raw: raw["unpacks"]["diag float32"].update(value="much"),
        lambda raw: raw["unpacks"]["diag float32"].update(more=1.0),
        lambda raw: raw["dense"].update(float32=[1.0]),
    ],
)
def test_damaged_costs_are_refused(spoil):
    raw = json.loads(json.dumps(SPARSE_ONLY.to_json()))
    spoil(raw)
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        Costs.from_json(raw)


def test_the_memory_bound():
    assert resident_bound("diag", 0, 1000, 4) == pytest.approx(1.15 * 4000)
    assert resident_bound("block", 0, 1000, 2) == pytest.approx(1.15 * 2000)
    assert resident_bound("nm", 10, 1000, 4) == pytest.approx((1.03 + 4 / 32) * 4000)
    assert resident_bound("nm", 4, 1000, 2) == pytest.approx((1.03 + 2 / 16) * 2000)


def test_curves_of_the_tests_are_in_proportion():
    assert curve(2.0).seconds(1024, 5, 3) == pytest.approx(2.0 * 1024 * 3)
