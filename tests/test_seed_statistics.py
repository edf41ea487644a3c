"""Statistics over a few seeds, against numbers computed by hand."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import nct, t, ttest_rel

from rest_rl.compare.statistics import (
    MAX_SIGN_DRAWS,
    accuracy_at,
    compare_at_equal_entropy,
    compare_paired,
    count_seeds_needed,
    detectable_difference,
    first_step_reaching,
    mean_interval,
    paired_t_power,
    pooled_sd,
    sign_flip_test,
    steps_ratio,
    steps_to_target,
    t_test,
    trailing_mean,
)

NAN = float("nan")
OURS, THEIRS = {0: 0.5, 1: 0.6, 2: 0.7, 9: 0.1}, {0: 0.4, 1: 0.45, 2: 0.65, 8: 0.9}


def test_the_interval_of_a_mean_is_students() -> None:
    # mean 2, s = 1, t(0.975, 2) = 4.302653, half = 4.302653 / sqrt(3) = 2.484138
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138), abs=1e-6)
    assert mean_interval([0.4])[0] == 0.4
    assert math.isnan(mean_interval([0.4]).low)
    assert math.isnan(mean_interval([]).value)


def test_paired_differences_by_hand() -> None:
    test = compare_paired(OURS, THEIRS)
    # common seeds 0, 1, 2: differences .1, .15, .05; mean .1, s = .05, half = 4.302653 * .05 / sqrt(3) = .124207
    assert (test.n, test.sd) == (3, pytest.approx(0.05))
    assert test.difference == pytest.approx((0.1, 0.1 - 0.124207, 0.1 + 0.124207), abs=1e-6)
    # t = .1 / (.05 / sqrt(3)), t² = 12; with 2 degrees of freedom p = 1 - t / sqrt(t² + 2) = 1 - sqrt(12 / 14)
    assert test.p_t == pytest.approx(1 - math.sqrt(12 / 14))
    # of 8 assignments of signs only +++ and --- are as far from 0
    assert test.p_flip == 0.25
    assert compare_paired({0: 1.0}, {1: 1.0}).n == 0


def test_sign_flips_by_hand() -> None:
    # .1, .15, -.05: sum .2; the sums of ±.1 ±.15 ±.05 are ±.3, ±.2, ±.1, 0, 0: four of eight reach .2
    assert sign_flip_test([0.1, 0.15, -0.05]) == 0.5
    assert sign_flip_test([0.3] * 5) == 2 / 32
    assert sign_flip_test([0.0, 0.0]) == 1.0
    assert math.isnan(sign_flip_test([]))
    # beyond 14 seeds it draws: 17 equal signs have a chance of 2 / 2**17, so almost no draw has them
    assert 1 / (MAX_SIGN_DRAWS + 1) <= sign_flip_test([0.1] * 17) < 0.001
    noise = [random.Random(i).gauss(0, 1) for i in range(20)]
    assert sign_flip_test(noise) == pytest.approx(t_test(noise), abs=0.03)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
def test_both_tests_ignore_the_sign_and_stay_between_0_and_1(differences: list[float]) -> None:
    for test in (t_test, sign_flip_test):
        p, mirrored = test(differences), test([-value for value in differences])
        assert p == pytest.approx(mirrored, nan_ok=True)
        assert math.isnan(p) or 0 <= p <= 1
    assert sign_flip_test(differences) >= 2 / 2 ** len(differences)


def test_the_t_test_is_scipys() -> None:
    ours, theirs = [0.1, 0.5, 0.3, 0.9], [0.2, 0.1, 0.4, 0.5]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert t_test(differences) == pytest.approx(ttest_rel(ours, theirs).pvalue)


def test_equal_differences_show_no_noise() -> None:
    assert t_test([0.0, 0.0, 0.0]) == 1.0
    assert math.isnan(t_test([0.5, 0.5]))
    assert math.isnan(t_test([0.1]))
    assert mean_interval([0.0, 0.0]) == (0, 0, 0)
    assert math.isnan(mean_interval([0.5, 0.5]).low)
    # .53 - .5, .43 - .4 and .63 - .6 equal 0.03 up to rounding, about 3e-17
    alike = compare_paired({0: 0.53, 1: 0.43, 2: 0.63}, {0: 0.5, 1: 0.4, 2: 0.6})
    assert (alike.n, alike.sd) == (3, 0.0)
    assert alike.difference.value == pytest.approx(0.03)
    assert math.isnan(alike.p_t)
    assert math.isnan(alike.difference.low)
    # 0.1 + 0.2 is not exactly 0.3: this counts as no difference
    none = compare_paired({0: 0.1 + 0.2, 1: 0.5}, {0: 0.3, 1: 0.5})
    assert (none.difference, none.p_t) == ((0, 0, 0), 1.0)


def test_power_is_that_of_the_noncentral_t() -> None:
    critical, shift = t.ppf(0.975, 4), 1.5 * math.sqrt(5)
    expected = nct.sf(critical, 4, shift) + nct.cdf(-critical, 4, shift)
    assert paired_t_power(0.03, 0.02, 5) == paired_t_power(-0.03, 0.02, 5) == pytest.approx(expected, abs=1e-6)
    assert paired_t_power(0.0, 0.02, 5) == pytest.approx(0.05, abs=1e-6)
    assert paired_t_power(5.0, 0.02, 3) == pytest.approx(1.0, abs=1e-6)
    rng = random.Random(0)
    drawn = [t_test([rng.gauss(1.5, 1) for _ in range(5)]) <= 0.05 for _ in range(2000)]
    assert statistics.fmean(drawn) == pytest.approx(expected, abs=0.04)  # 4 standard errors


def test_the_difference_that_a_grid_can_detect() -> None:
    for n in (2, 3, 5, 12):
        assert paired_t_power(detectable_difference(0.02, n), 0.02, n) == pytest.approx(0.8, abs=1e-6)
    assert detectable_difference(0.02, 3) > detectable_difference(0.02, 5) > 0
    assert math.isnan(detectable_difference(0.02, 1))
    assert math.isnan(detectable_difference(NAN, 5))
    needed = count_seeds_needed(0.03, 0.02)
    assert needed is not None
    assert paired_t_power(0.03, 0.02, needed) >= 0.8 > paired_t_power(0.03, 0.02, needed - 1)
    assert count_seeds_needed(1.0, 0.001) == 2
    assert count_seeds_needed(1e-6, 1.0) is None
    assert count_seeds_needed(0.0, 1.0) is None
    # variances 1 and 4 with 2 and 1 degrees of freedom: (2 * 1 + 1 * 4) / 3 = 2
    assert pooled_sd([(1.0, 3), (2.0, 2), (NAN, 1)]) == pytest.approx(math.sqrt(2))
    assert math.isnan(pooled_sd([]))


def test_steps_by_hand() -> None:
    theirs = {10: 0.1, 20: 0.4, 30: 0.5, 40: 0.4}
    assert first_step_reaching(theirs, 0.4) == 20
    assert first_step_reaching(theirs, 0.6) is None
    ours = {10: 0.4, 20: 0.45, 30: 0.5, 40: 0.5}
    # theirs ends at .4, which it first reached at 20 and ours at 10; both reach its best of .5 at 30
    assert steps_ratio(ours, theirs, best=False) == 0.5
    assert steps_ratio(ours, theirs, best=True) == 1.0
    assert steps_ratio({10: 0.1}, theirs, best=False) is None
    assert steps_ratio(theirs, theirs, best=True) == steps_ratio(theirs, theirs, best=False) == 1.0


def test_steps_over_seeds_by_hand() -> None:
    theirs = {seed: {10: 0.1, 20: 0.2, 40: 0.4} for seed in (0, 1)}
    # the target of each seed is .4 at 40; ours reaches it at 10 and at 40: ratios 1/4 and 1, geometric mean 1/2
    ours = {0: {10: 0.4, 20: 0.4, 40: 0.4}, 1: {10: 0.1, 20: 0.2, 40: 0.4}, 2: {10: 1.0}}
    found = steps_to_target(ours, theirs, best=False)
    assert found is not None
    assert (found.reached, found.n) == (2, 2)
    assert found.by_seed.value == pytest.approx(0.5)
    # the mean curves: ours .25, .3, .4 against .4 at 40
    assert found.share == 1.0
    never = steps_to_target({0: {10: 0.0}, 1: {10: 0.9}}, theirs, best=False)
    assert never is not None
    assert (never.reached, never.n) == (1, 2)
    assert math.isnan(never.by_seed.value)
    assert steps_to_target({5: {1: 0.0}}, theirs, best=True) is None


def test_the_trailing_mean_uses_no_later_step() -> None:
    curve = {step: float(step) for step in range(1, 21)}  # 20 steps: windows of 2
    means = trailing_mean(curve)
    assert (min(means), means[2], means[20]) == (2, 1.5, 19.5)
    assert trailing_mean({}) == {}
    assert trailing_mean({3: 0.5}) == {3: 0.5}


def test_accuracies_at_equal_entropy_by_hand() -> None:
    ours = {
        0: ({1: 0.5, 2: 0.3, 3: 0.1}, {1: 0.2, 2: 0.4, 3: 0.6}),
        1: ({1: 0.1, 2: 0.3}, {1: 0.2, 2: 0.9}),
        2: ({1: 0.1}, {}),
        3: ({1: 0.1}, {1: 1.0}),
        4: ({1: 0.1, 2: 0.05}, {1: 1.0, 2: 1.0}),
    }
    theirs = {
        0: ({1: 0.5, 2: 0.4, 3: 0.2}, {1: 0.1, 2: 0.3, 3: 0.45}),
        1: ({1: 0.4, 3: 0.2}, {1: 0.1, 3: 0.3}),
        2: ({1: 0.1}, {1: 0.5}),
        4: ({1: 0.3, 2: 0.2}, {1: 0.5, 2: 0.5}),
    }
    # seed 0: level .2, which ours crosses at step 2.5 and theirs reaches at its end: .5 and .45 (.6 and .45 at the end)
    # seed 1: level .3, at which ours ends; theirs crosses it at step 2, between steps 1 and 3: .9 and .2
    # seed 2 lacks a curve, seed 3 the baseline; in seed 4 ours was never as uncertain as theirs at the end
    found = compare_at_equal_entropy(ours, theirs)
    assert found is not None
    assert found.entropy == pytest.approx(0.25)
    assert (found.ours, found.theirs) == (pytest.approx(0.7), pytest.approx(0.325))
    assert (found.paired.n, found.paired.difference.value) == (2, pytest.approx(0.375))
    assert compare_at_equal_entropy({2: ours[2]}, theirs) is None
    # the entropy crosses .35 at steps 1.75, 2.5 and 3.5: the last one counts
    assert accuracy_at(0.35, {1: 0.5, 2: 0.3, 3: 0.4, 4: 0.3}, {1: 0.0, 4: 0.6}) == pytest.approx(0.5)
    assert math.isnan(accuracy_at(0.6, {1: 0.5, 2: 0.3}, {1: 0.0, 2: 0.6}))
