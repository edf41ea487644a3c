"""Jackknife errors, quotients and thresholds, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm, t

from research.theory.estimates import critical_value, jackknife
from rest_rl.probe.variance import Estimate, divide_or_nan, leave_one_out_sums, relative_gain


def test_the_jackknife_error_of_a_mean_is_its_standard_error() -> None:
    values = np.array([1.0, 2.0, 3.0, 6.0])  # mean 3, s² = (4 + 1 + 0 + 9) / 3 = 14/3, se = sqrt(14/3 / 4)
    found = Estimate.from_jackknife(leave_one_out_sums(values) / leave_one_out_sums(np.ones(4)))
    assert found.value == 3.0
    assert found.error == pytest.approx(math.sqrt(14 / 12))
    assert jackknife(4, lambda kept: float(values[kept].mean())) == pytest.approx(found)


def test_a_figure_determined_by_one_unit_has_no_error() -> None:
    values = np.array([math.nan, 5.0, math.nan])

    def mean_of_known(kept: np.ndarray) -> float:
        known = values[kept][~np.isnan(values[kept])]
        return float(known.mean()) if len(known) else math.nan

    found = jackknife(3, mean_of_known)
    assert found.value == 5.0
    assert math.isnan(found.error)
    assert not found.is_above(0, 2)


def test_division_by_zero_gives_nan() -> None:
    assert divide_or_nan(3.0, 2.0) == 1.5
    assert math.isnan(divide_or_nan(3.0, 0.0))
    assert divide_or_nan(np.array([1.0, 2.0]), np.array([4.0, 0.0])).tolist() == pytest.approx(
        [0.25, math.nan], nan_ok=True
    )
    gains = relative_gain(np.array([3.0, 1.0, 1.0]), np.array([2.0, 0.0, -1.0]))
    assert gains.tolist() == pytest.approx([0.5, math.nan, math.nan], nan_ok=True)


def test_fewer_units_have_a_larger_critical_value() -> None:
    # two errors of a normal figure; Student's quantile of the same certainty; a tenth of it for each of ten
    assert critical_value(10**7) == pytest.approx(2, abs=1e-3)
    assert critical_value(2) == pytest.approx(t.isf(0.02275, 1), rel=1e-3)
    assert critical_value(2) > 13
    assert critical_value(16) == pytest.approx(2.18, abs=0.01)
    assert critical_value(10**7, comparisons=10) == pytest.approx(norm.isf(0.002275), abs=1e-3)
