"""Intervals and tests of accuracies: numbers by hand, and what must hold of all of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from rest_rl.statistics import (
    Interval,
    clustered_wilson_interval,
    mcnemar_p_value,
    paired_difference,
    weighted_mean,
    wilson_interval,
)

COUNTS = st.integers(0, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
FLIPS = st.integers(0, 500).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda lost: st.tuples(st.just(lost), st.integers(0, n - lost), st.just(n)))
)
Z = 1.959963984540054


def test_wilson_by_hand() -> None:
    # z² = 3.8415; centre (8 + 1.9207) / 13.8415 = 0.7167, half = 1.96 sqrt(8 * 2 / 10 + 0.9604) / 13.8415 = 0.2266
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    # none of 10: [0, z² / (10 + z²)] = [0, 3.8415 / 13.8415]
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=5e-6)


def test_wilson_with_clusters_by_hand() -> None:
    # Four tasks with 3, 3, 0 and 2 of 3: p = 8/12, p n_c = 2, so the squares add up to 1 + 1 + 4 + 0 = 6, and
    # D = 6 / (12 * 2/3 * 1/3) = 9/4. With 12 / D = 16/3 samples and z² = 3.8415: centre (3.5556 + 1.9207) / 9.1748 =
    # 0.5969, half = sqrt(3.8415 (1.1852 + 0.9604)) / 9.1748 = 0.3129.
    assert clustered_wilson_interval([(3, 3), (3, 3), (0, 3), (2, 3)]) == pytest.approx((0.2840, 0.9098), abs=5e-5)
    # Attempts that always agree count once, as one attempt per task: 4 tasks of which 3 are solved, 5 times each.
    assert clustered_wilson_interval([(5, 5)] * 3 + [(0, 5)]) == pytest.approx(wilson_interval(3, 4))
    assert clustered_wilson_interval([(5, 5)] * 3) == wilson_interval(3, 3)
    assert clustered_wilson_interval([(0, 5)] * 3) == wilson_interval(0, 3)
    # Equal shares in every task do not make the interval narrower than independent samples.
    assert clustered_wilson_interval([(1, 2)] * 6) == pytest.approx(wilson_interval(6, 12))
    assert clustered_wilson_interval([]) == (0.0, 1.0)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=50))
def test_clusters_of_one_sample_change_nothing(outcomes: list[int]) -> None:
    assert clustered_wilson_interval([(right, 1) for right in outcomes]) == wilson_interval(
        sum(outcomes), len(outcomes)
    )


@pytest.mark.parametrize(("n", "points"), [(200, 6.9), (1053, 3.0), (16, 22.0)])
def test_half_widths_given_in_the_docs(n: int, points: float) -> None:
    low, high = wilson_interval(n // 2, n)
    assert round(50 * (high - low), 1) == points


def test_without_samples_the_interval_is_the_whole_range() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert mcnemar_p_value(0, 0) == 1.0
    assert paired_difference(0, 0, 0) == (0.0, -1.0, 1.0)


def test_mcnemar_by_hand() -> None:
    # 1 lost and 7 gained: both tails of a fair coin, 2 * (C(8,0) + C(8,1)) / 2^8 = 18 / 256
    assert mcnemar_p_value(1, 7) == pytest.approx(18 / 256)
    assert mcnemar_p_value(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_p_value(3, 3) == 1.0


def test_paired_difference_by_hand() -> None:
    # n = 98, 4 lost and 9 gained: p = 5 / 100, q = 10 / 100, half = z sqrt((0.15 - 0.05²) / 100) = z sqrt(0.001475)
    value, low, high = paired_difference(4, 9, 98)
    half = Z * math.sqrt(0.001475)
    assert value == pytest.approx(5 / 98)
    assert (low, high) == pytest.approx((0.05 - half, 0.05 + half))
    # the one sample there is was gained: q - p = 1/3, half = z sqrt((1 - 1/9) / 3) = 1.067, cut at 1
    assert paired_difference(0, 1, 1) == pytest.approx((1.0, 1 / 3 - Z * math.sqrt(8 / 27), 1.0))


def share(correct: int, n: int) -> Interval:
    return Interval(correct / n, *wilson_interval(correct, n))


def test_a_weighted_mean_by_hand() -> None:
    # 0.25 * 0.8 + 0.75 * 0.2 = 0.35; sqrt((0.25 * 0.3)² + (0.75 * 0.1)²) = 0.075 sqrt(2) = 0.10607 to the low side,
    # sqrt((0.25 * 0.1)² + (0.75 * 0.2)²) = sqrt(0.000625 + 0.0225) = 0.15207 to the high side
    parts = [(0.25, Interval(0.8, 0.5, 0.9)), (0.75, Interval(0.2, 0.1, 0.4))]
    assert weighted_mean(parts) == pytest.approx((0.35, 0.24393, 0.50207), abs=5e-6)
    # weights count by their shares
    assert weighted_mean([(3 * weight, part) for weight, part in parts]) == pytest.approx(weighted_mean(parts))
    # two halves of 8 of 10, whose distances of Wilson are 0.3098 and 0.1433, each over sqrt(2)
    assert weighted_mean([(1, share(8, 10))] * 2) == pytest.approx((0.8, 0.58094, 0.90133), abs=5e-5)
    # none of 10 twice: 0.27753 / sqrt(2)
    assert weighted_mean([(1, share(0, 10))] * 2) == pytest.approx((0.0, 0.0, 0.19625), abs=1e-5)
    assert weighted_mean([(0.1, share(10, 10))] * 3).value == 1.0
    assert weighted_mean([(0.2, share(3, 9))]) == pytest.approx(share(3, 9))
    for weights in ([], [0.0], [1.0, -1.0], [2.0, -1.0]):
        with pytest.raises(ValueError, match="expected none below 0 and some above"):
            weighted_mean([(weight, share(1, 2)) for weight in weights])


@pytest.mark.parametrize(("first", "second"), [(0.05, 0.02), (0.5, 0.5), (0.9, 0.3), (0.97, 0.6), (0.99, 0.99)])
def test_the_interval_of_a_weighted_mean_has_its_nominal_coverage(first: float, second: float) -> None:
    # Over all outcomes of two groups of 40 and 16 samples, weighed as an official average weighs its categories.
    truth = 0.5 * (first + second)
    covered = 0.0
    for i in range(41):
        for j in range(17):
            _, low, high = weighted_mean([(1, share(i, 40)), (1, share(j, 16))])
            covered += binom.pmf(i, 40, first) * binom.pmf(j, 16, second) * (low <= truth <= high)
    assert 0.93 < covered < 0.995


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(-1, 2),
        lambda: mcnemar_p_value(-1, 2),
        lambda: mcnemar_p_value(2, -1),
        lambda: paired_difference(2, 2, 3),
        lambda: paired_difference(0, -1, 3),
    ],
)
def test_impossible_counts_are_errors(call) -> None:
    with pytest.raises(ValueError, match="expected 0 <= count <= total"):
        call()


@given(COUNTS)
def test_wilson_contains_the_fraction_and_is_symmetric(counts: tuple[int, int]) -> None:
    correct, n = counts
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low - 1e-12 <= correct / n <= high + 1e-12
        assert low < high
    mirrored = wilson_interval(n - correct, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


@given(st.lists(st.tuples(st.floats(0.001, 1), COUNTS.filter(lambda counts: counts[1] > 0)), min_size=1, max_size=8))
def test_a_weighted_mean_stays_between_the_means_of_the_limits(parts: list[tuple[float, tuple[int, int]]]) -> None:
    found = weighted_mean((weight, share(*counts)) for weight, counts in parts)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1
    mirrored = weighted_mean((weight, share(n - correct, n)) for weight, (correct, n) in parts)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-9)


@given(FLIPS)
def test_a_difference_is_in_its_interval_and_changes_sign(flips: tuple[int, int, int]) -> None:
    lost, gained, n = flips
    value, low, high = paired_difference(lost, gained, n)
    assert -1 <= low <= value <= high <= 1
    back = paired_difference(gained, lost, n)
    assert (-back.value, -back.high, -back.low) == pytest.approx((value, low, high), abs=1e-12)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_a_probability_and_symmetric(lost: int, gained: int) -> None:
    p = mcnemar_p_value(lost, gained)
    assert 0 <= p <= 1 + 1e-12
    assert p == pytest.approx(mcnemar_p_value(gained, lost))
    assert p == pytest.approx(1.0) or lost != gained
