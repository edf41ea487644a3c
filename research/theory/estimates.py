"""Shared statistics of the theory checks: a weighting compared with a baseline, jackknife errors, thresholds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor

from rest_rl.probe.variance import Estimate, GradientSeries, divide_or_nan, relative_gain

# 2 * (1 - Phi(2)).
TWO_SIGMA_TAIL = 0.0455
"""Probability that a normal variable is more than two standard errors off, in either direction."""
DOMINANT_SHARE = 0.5
"""A unit (a prompt with its responses) with a larger share of the sum of squared norms dominates the second moment."""


class GradientFigures(NamedTuple):
    """Effect of a token weighting on the gradient g of a batch of units (prompts), partly relative to a baseline."""

    variance: Estimate
    """Trace of the covariance of the batch's gradient."""
    mean_square: Estimate
    """|E g|²; the estimate is unbiased and can be negative if there is no signal."""
    ratio: Estimate
    """variance / |E g|²."""
    cosine: Estimate
    """Cosine between E g and the true gradient t: how far reweighting changes the direction."""
    eff: Estimate
    """<E g, t> / sqrt(E|g|² |t|²): expected improvement per unit step, in [-1, 1]."""
    eff_adam: Estimate
    """sum_j t_j E g_j / sqrt(E g_j²) / (sqrt(N) |t|): the same after Adam's scaling, in [-1, 1]."""
    eff_gain: Estimate
    """eff / eff of the baseline - 1."""
    eff_adam_gain: Estimate
    """eff_adam / eff_adam of the baseline - 1."""
    lead: Estimate
    """<E g, t> / sqrt(E|g|²) minus the baseline's. Its sign is reliable even if the gain, a ratio, is noise."""
    adam_lead: Estimate
    """The same after Adam's scaling."""
    largest_share: float
    """The largest unit's share of the summed squared norms."""

    @property
    def is_dominated(self) -> bool:
        """Whether one unit dominates the second moment, so that the values say little about the other units."""
        return self.largest_share > DOMINANT_SHARE

    @classmethod
    def from_series(cls, own: GradientSeries, baseline: GradientSeries, largest_share: float) -> GradientFigures:
        """Compare one weighting with the baseline on the same units."""
        return cls(
            variance=Estimate.from_jackknife(own.variance_1K),
            mean_square=Estimate.from_jackknife(own.mean_square_1K),
            ratio=Estimate.from_jackknife(own.noise_ratio),
            cosine=Estimate.from_jackknife(own.cosine_1K),
            eff=Estimate.from_jackknife(divide_or_nan(own.progress_1K, own.true_norm_1K)),
            eff_adam=Estimate.from_jackknife(divide_or_nan(own.adam_1K, own.true_norm_1K)),
            eff_gain=Estimate.from_jackknife(relative_gain(own.progress_1K, baseline.progress_1K)),
            eff_adam_gain=Estimate.from_jackknife(relative_gain(own.adam_1K, baseline.adam_1K)),
            lead=Estimate.from_jackknife(own.progress_1K - baseline.progress_1K),
            adam_lead=Estimate.from_jackknife(own.adam_1K - baseline.adam_1K),
            largest_share=largest_share,
        )


def ratio_or_nan(above: float, below: float) -> float:
    """Return above / below; NaN if `below` is 0."""
    return float(divide_or_nan(above, below))


def largest_share(gradients_MN: Tensor, scales_M: Tensor | None = None) -> float:
    """Return the largest unit's share of the sum of squared norms; NaN if all are 0."""
    squares_M = torch.linalg.vector_norm(gradients_MN, dim=1, dtype=torch.float64).square()
    if scales_M is not None:
        squares_M = squares_M * scales_M.square()
    return ratio_or_nan(float(squares_M.max()), float(squares_M.sum()))


def jackknife(count: int, statistic: Callable[[np.ndarray], float]) -> Estimate:
    """Estimate a statistic with its jackknife error; it receives the positions kept out of 0 to `count` - 1."""
    every = np.arange(count)
    return Estimate.from_jackknife(
        np.array([statistic(every), *(statistic(np.delete(every, i)) for i in every)], dtype=float)
    )


def critical_value(units: int, comparisons: int = 1) -> float:
    """Return the number of standard errors beyond which an estimate is significant, two-sided.

    It is the quantile of Student's t with `units` - 1 degrees of freedom at the level of two normal standard errors,
    divided by `comparisons` if the most extreme of several estimates is picked (Bonferroni).
    """
    return float(t.isf(TWO_SIGMA_TAIL / 2 / comparisons, units - 1))
