"""What every comparison needs, of models as of methods: a value with its interval, and p-values of many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import false_discovery_control

LEVEL = 0.05
"""Of every test; intervals are of 95 %."""


class Interval(NamedTuple):
    """A value and its 95 % interval; NaN limits where there is no spread to tell from."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside; an unknown interval excludes nothing."""
        return self.low > 0 or self.high < 0


def q_values(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's q-values: among the tests with q <= 0.05 at most 5 % are expected to be chance.

    NaN for tests without a p, which count for none. Benjamini, Y. and Hochberg, Y. (1995),
    https://doi.org/10.1111/j.2517-6161.1995.tb02031.x, for independent tests. Tests that share a reference depend on
    each other positively, under which the bound is known to hold for one-sided tests and taken to hold for these.
    """
    known = [p for p in p_values if not math.isnan(p)]
    adjusted = iter(false_discovery_control(known) if known else [])
    return [math.nan if math.isnan(p) else float(next(adjusted)) for p in p_values]
