"""q-values, by hand-computed numbers."""

from __future__ import annotations

import math

import pytest

from rest_rl.statistics import q_values


def test_q_values_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03 times 3 / rank: 0.03, 0.03, 0.03; then 0.5 as it is among four: 0.04, 0.04, 0.04, 0.5
    assert q_values([0.03, 0.01, 0.02]) == pytest.approx([0.03] * 3)
    assert q_values([0.01, 0.5, 0.02, 0.03]) == pytest.approx([0.04, 0.5, 0.04, 0.04])
    # .01 * 3 / 1 = .03; .03 * 3 / 2 = .045 and .04 * 3 / 3 = .04, of which the smaller counts for both
    assert q_values([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.04, math.nan, 0.04], nan_ok=True)
    assert q_values([]) == []
    assert math.isnan(q_values([math.nan])[0])
