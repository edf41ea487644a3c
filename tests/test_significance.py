"""Intervals and q-values, by hand-computed numbers."""

from __future__ import annotations

import math

import pytest

from rest_rl.statistics import Interval, q_values


def test_an_unknown_interval_excludes_nothing() -> None:
    assert Interval(1.0, 0.5, 1.5).excludes_zero
    assert Interval(-1.0, -1.5, -0.5).excludes_zero
    assert not Interval(1.0, -0.5, 2.5).excludes_zero
    assert not Interval(1.0, math.nan, math.nan).excludes_zero
    assert Interval(1.0, 0.5, 1.5).half_width == 0.5


def test_q_values_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03 times 3 / rank: 0.03, 0.03, 0.03; then 0.5 as it is among four: 0.04, 0.04, 0.04, 0.5
    assert q_values([0.03, 0.01, 0.02]) == pytest.approx([0.03] * 3)
    assert q_values([0.01, 0.5, 0.02, 0.03]) == pytest.approx([0.04, 0.5, 0.04, 0.04])
    # .01 * 3 / 1 = .03; .03 * 3 / 2 = .045 and .04 * 3 / 3 = .04, of which the smaller counts for both
    assert q_values([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.04, math.nan, 0.04], nan_ok=True)
    assert q_values([]) == []
    assert math.isnan(q_values([math.nan])[0])
