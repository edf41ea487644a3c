"""Figures with standard errors: the jackknife, quotients that may be undefined, and how many errors make a finding.

Shapes: M units (prompts, blocks of prompts). A leading axis "1+M" holds a statistic of all units and then that with
each unit left out: whatever is computed from such arrays element by element keeps its error, differences of two
statistics of the same units included. Efron and Stein (1981), https://doi.org/10.1214/aos/1176345462.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, overload

import numpy as np
from scipy.stats import t

TWO_ERRORS = 0.0455
"""How often a normal figure is more than two standard errors off, to either side."""


class Estimate(NamedTuple):
    """A figure and its standard error over prompts; NaN where it is not defined."""

    value: float
    error: float

    @classmethod
    def of(cls, values_1M: np.ndarray) -> Estimate:
        """From a statistic of all units and of all but one: se² = (M-1)/M sum_m (x_-m - mean)² (jackknife)."""
        left_out_M = values_1M[1:]
        count = len(left_out_M)
        spread = float(((left_out_M - left_out_M.mean()) ** 2).sum())
        return cls(float(values_1M[0]), math.sqrt((count - 1) / count * spread))

    def is_above(self, least: float, errors: float) -> bool:
        """Whether it is more than so many errors above `least`; False where it is not defined."""
        return self.value - errors * self.error > least


def jackknife(count: int, statistic: Callable[[np.ndarray], float]) -> Estimate:
    """A statistic of the positions 0 to count - 1 that it is given, and its error by leaving each of them out."""
    every = np.arange(count)
    return Estimate.of(np.array([statistic(every), *(statistic(np.delete(every, i)) for i in every)], dtype=float))


def left_out(sums_M: np.ndarray) -> np.ndarray:
    """The sum over units, then the sums without each of them: (1+M, ...)."""
    total = sums_M.sum(0, keepdims=True)
    return np.concatenate([total, total - sums_M])


@overload
def quotient(above: float, below: float) -> float: ...
@overload
def quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray: ...
def quotient(above: float | np.ndarray, below: float | np.ndarray) -> float | np.ndarray:
    """Element by element, NaN where the divisor is 0."""
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    found = np.divide(above, below, out=np.full(np.broadcast(above, below).shape, math.nan), where=below != 0)
    return found if found.ndim else float(found)


def above_zero(values: np.ndarray) -> np.ndarray:
    """NaN in the place of numbers that are not positive, to which nothing can be compared."""
    return np.where(values > 0, values, math.nan)


def sure_errors(units: int, comparisons: int = 1) -> float:
    """The standard errors from `units` units beyond which a figure is more than chance, to either side.

    Student's quantile that many units give for the certainty of two errors of many, shared out among `comparisons` of
    which the most striking is picked (Bonferroni).
    """
    return float(t.isf(TWO_ERRORS / 2 / comparisons, units - 1))
