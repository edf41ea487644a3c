"""Quality of a gradient estimator: variance, |mean|², cosine with the true gradient, expected progress per unit step.

Shapes: M independent units (prompts with their group of responses, or whole batches), N coordinates, K blocks of units.
Every function takes stacked vectors. `gradients_MN[m]` is the contribution of unit m under a token weighting, and
`true_MN[m]` is an unbiased estimate of the true gradient t from the same unit, such as REINFORCE with a leave-one-out
baseline.

No product pairs a unit with itself: <E g, t>, |E g|² and |t|² are means over pairs of different units, so noise that g
and t share is never counted as signal. The second moment of a batch of P units follows exactly:
E|g_P|² = |E g|² + Var / P. Standard errors are jackknife errors over blocks of units. A rule is compared with the
baseline on the same units, so the noise they share cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rest_rl.errors import UserError

MAX_BLOCKS = 16
"""Blocks of units if there are enough units; a power of two, see `generate_halvings`."""
# A coordinate in which half of the units have almost no gradient gets a second moment close to 0 by chance. A signal
# divided by its root would drown every other coordinate.
MOMENT_FLOOR = 1e-3
"""Smallest second moment of a coordinate, relative to the mean over coordinates."""


class Estimate(NamedTuple):
    """A value and its standard error over prompts; NaN where it is undefined."""

    value: float
    error: float

    @classmethod
    def from_jackknife(cls, values_1M: np.ndarray) -> Estimate:
        """Return the estimate; `values_1M` has the statistic of all units, then the M statistics without one unit each.

        The squared standard error is (M-1)/M sum_m (x_m - mean)², where x_m is the statistic without unit m.
        """
        left_out_M = values_1M[1:]
        count = len(left_out_M)
        spread = float(((left_out_M - left_out_M.mean()) ** 2).sum())
        return cls(float(values_1M[0]), math.sqrt((count - 1) / count * spread))

    def is_above(self, threshold: float, num_errors: float) -> bool:
        """Return whether the value exceeds `threshold` by more than `num_errors` standard errors; False for NaN."""
        return self.value - num_errors * self.error > threshold


def leave_one_out_sums(sums_M: np.ndarray) -> np.ndarray:
    """Return the sum over all M units, then the M sums that leave out one unit each. Shape (1+M, ...)."""
    total = sums_M.sum(0, keepdims=True)
    return np.concatenate([total, total - sums_M])


def divide_or_nan(above: np.ndarray | float, below: np.ndarray | float) -> np.ndarray:
    """Divide element by element; NaN where the divisor is 0."""
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, math.nan), where=below != 0)


def relative_gain(own: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Return `own` / `baseline` - 1; NaN where `baseline` is not above 0."""
    return divide_or_nan(own, np.where(baseline > 0, baseline, math.nan)) - 1


class GradientSeries(NamedTuple):
    """Statistics of the gradient g of a batch of units (prompts): from all units, then without each of K blocks.

    `variance` is the trace of the covariance of g. `mean_square` is |E g|²; its estimate is unbiased and can therefore
    be negative. `cosine` is the cosine between E g and the true gradient t, `true_norm` is |t|. `progress` is
    <E g, t> / sqrt(E|g|²), the expected improvement of a step of length 1. With N coordinates j, `adam` is
    sum_j t_j E g_j / sqrt(E g_j²) / sqrt(N), the expected improvement of a step whose root mean square is 1 / sqrt(N)
    in every coordinate.
    """

    variance_1K: np.ndarray
    mean_square_1K: np.ndarray
    cosine_1K: np.ndarray
    true_norm_1K: np.ndarray
    progress_1K: np.ndarray
    adam_1K: np.ndarray

    @property
    def noise_ratio(self) -> np.ndarray:
        """`variance` divided by `mean_square`; NaN where that is not above 0."""
        return divide_or_nan(self.variance_1K, np.maximum(self.mean_square_1K, 0.0))


def compute_gradient_series(
    gradients_MN: Tensor, true_MN: Tensor, *, batch: int = 1, blocks: int = MAX_BLOCKS, scales_M: Tensor | None = None
) -> GradientSeries:
    """Compute the statistics of one token weighting for a batch of `batch` units; UserError for too few units.

    `scales_M` has a factor for both vectors of each unit, see `compute_norm_scales`.
    """
    sums = sum_by_block(gradients_MN, true_MN, blocks, scales_M)
    most = max_batch_size([one.units for one in sums])
    if not 1 <= batch <= most:
        raise UserError(
            f"{len(true_MN)} units cannot predict a batch of {batch}", f"a batch of 1 to {most}", "measure more prompts"
        )
    whole = add_sums(sums)
    rows = [compute_batch_figures(one, batch) for one in (whole, *(whole.without(one) for one in sums))]
    return GradientSeries(*np.array(rows).T, adam_1K=compute_adam_progress(sums, batch))


class UnitSums(NamedTuple):
    """Sums over units from which all of `GradientSeries` follows; sums of disjoint sets of units can be added."""

    # g: gradients under the weighting; t: true gradients; gg, gt: products by coordinate; tt: sum of |t|².
    units: int
    g_N: Tensor
    t_N: Tensor
    gg_N: Tensor
    gt_N: Tensor
    tt: float

    def plus(self, other: UnitSums) -> UnitSums:
        both: Any = zip(self, other, strict=True)
        return UnitSums(*(own + its for own, its in both))

    def without(self, other: UnitSums) -> UnitSums:
        both: Any = zip(self, other, strict=True)
        return UnitSums(*(own - its for own, its in both))

    @property
    def signals(self) -> Tensor:
        """Estimates of E g_j t_j by coordinate j from pairs of different units: sum_{m != n} g_m t_n / (M (M - 1))."""
        return (self.g_N * self.t_N - self.gt_N) / (self.units * (self.units - 1))

    def second_moments(self, batch: int) -> Tensor:
        """Return estimates of E g_j² for a batch of P = `batch` units by coordinate j; they are never negative."""
        # mean² overestimates (E g_j)² by s²/M, the batch adds s²/P; P < M keeps the sum positive.
        mean_N = self.g_N / self.units
        spread_N = (self.gg_N / self.units - mean_N.square()).clamp_min(0) * self.units / (self.units - 1)
        return mean_N.square() + spread_N * (1 / batch - 1 / self.units)


# |sum_m g_m|² = sum_m |g_m|² + sum_{m != n} <g_m, g_n>. Subtracting the squares leaves M (M - 1) products of different
# units, whose mean is unbiased for |E g|². The same identity gives |t|² and <E g, t>; the cost is linear in M.
def compute_batch_figures(sums: UnitSums, batch: int) -> tuple[float, float, float, float, float]:
    signal, pairs = float(sums.signals.sum()), sums.units * (sums.units - 1)
    mean_square = float((sums.g_N.square() - sums.gg_N).sum()) / pairs
    true_norm = sqrt_or_nan((float(sums.t_N.square().sum()) - sums.tt) / pairs)
    variance = float(sums.gg_N.sum()) / sums.units - mean_square
    cosine = float(divide_or_nan(signal, sqrt_or_nan(mean_square) * true_norm))
    progress = float(divide_or_nan(signal, math.sqrt(float(sums.second_moments(batch).sum()))))
    return variance / batch, mean_square, cosine, true_norm, progress


class HalfStatistics(NamedTuple):
    """For every gradient coordinate, signal and Adam scale estimated from one half of the prompts."""

    signals_N: Tensor
    """E g_j t_j."""
    inverse_N: Tensor
    """1 / sqrt(E g_j²) of a batch, see `MOMENT_FLOOR`; 0 if no coordinate has a gradient."""

    @classmethod
    def from_sums(cls, sums: UnitSums, batch: int) -> HalfStatistics:
        moments_N = sums.second_moments(batch)
        moments_N = moments_N.clamp_min(MOMENT_FLOOR * float(moments_N.mean()))
        return cls(sums.signals, torch.where(moments_N > 0, moments_N.rsqrt(), 0.0))

    def progress(self, other: HalfStatistics) -> float:
        """Return the expected improvement after Adam's scaling; signals and scales come from different halves."""
        both = self.signals_N @ other.inverse_N + other.signals_N @ self.inverse_N
        return float(both) / 2 / math.sqrt(len(self.signals_N))


# 1. Split the blocks into two halves. Each half gives signals E g_j t_j and scales 1 / sqrt(E g_j²) by coordinate.
# 2. Progress is the signals of one half times the scales of the other, averaged over both directions. If both came from
#    the same units, a unit with a large gradient would raise them together and bias the estimate far below 0.
# 3. Leaving a block out changes only its own half. The result is the average over log2(K) ways to split, and every
#    figure comes from the block sums: K log2(K) passes over N coordinates, independent of M.
def compute_adam_progress(sums: Sequence[UnitSums], batch: int) -> np.ndarray:
    """Return `GradientSeries.adam_1K` from the sums of each block, cross-fitted between halves of the blocks."""
    splits = []
    for sides in generate_halvings(len(sums)):
        halves = [add_sums([own for own, side in zip(sums, sides, strict=True) if side == half]) for half in (0, 1)]
        first, second = (HalfStatistics.from_sums(half, batch) for half in halves)
        progress_1K = [first.progress(second)]
        for block, side in zip(sums, sides, strict=True):
            reduced = HalfStatistics.from_sums(halves[side].without(block), batch)
            progress_1K.append(reduced.progress(first if side else second))
        splits.append(progress_1K)
    return np.mean(splits, axis=0)


def generate_halvings(blocks: int) -> Iterator[list[int]]:
    """Yield k ways to split 2^k blocks into halves, each as a list with 0 or 1 for every block."""
    # Split k by bit k of the block's number: any two blocks differ in a bit, so some split separates every pair.
    for bit in range(blocks.bit_length() - 1):
        yield [number >> bit & 1 for number in range(blocks)]


def choose_num_blocks(units: int) -> int:
    """Return the number of blocks for the jackknife: the largest power of two up to `units` - 2, from 4 to 16."""
    return 2 ** (min(MAX_BLOCKS, max(4, units - 2)).bit_length() - 1)


def max_prompts_per_step(units: int) -> int:
    """Return the largest number of prompts per step whose gain can be estimated from `units` prompts."""
    return max_batch_size([len(own) for own in np.array_split(np.arange(units), choose_num_blocks(units))])


def max_batch_size(sizes: Sequence[int]) -> int:
    """Return the largest batch, in units, whose gain can be estimated from blocks of these sizes."""
    # At most a quarter of the units, and less than a half of the blocks with one left out: as P approaches the number M
    # of units in a half, (1/P - 1/M) approaches 0 and Adam would divide by the squared mean, which is mostly noise.
    halves = [
        [size for size, side in zip(sizes, sides, strict=True) if side == own]
        for sides in generate_halvings(len(sizes))
        for own in (0, 1)
    ]
    return max(1, min(sum(sizes) // 4, min(sum(half) - max(half) for half in halves) - 1))


def compute_norm_scales(baseline_MN: Tensor, cap: float) -> Tensor:
    """Return the factor of each of M units that limits its norm to `cap` times the median nonzero norm. Shape (M,).

    Every weighting gets the factors of the baseline, so that rules stay comparable. The figures then describe the
    typical unit instead of the expectation.
    """
    if not cap > 0:
        raise ValueError(f"norm cap is {cap}, expected a positive multiple of the median norm")
    norms_M = torch.linalg.vector_norm(baseline_MN, dim=1, dtype=torch.float64)
    live_M = norms_M[norms_M > 0]
    if not len(live_M):
        return torch.ones_like(norms_M)
    # `tiny` avoids a division by 0 for a unit without gradient, whose factor is 1.
    return (cap * live_M.median() / norms_M.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)


def sum_by_block(gradients_MN: Tensor, true_MN: Tensor, blocks: int, scales_M: Tensor | None = None) -> list[UnitSums]:
    """Return the sums of `blocks` contiguous blocks of the M units; the sizes of the blocks differ by at most 1."""
    if gradients_MN.ndim != 2 or gradients_MN.shape != true_MN.shape:
        shapes = tuple(gradients_MN.shape), tuple(true_MN.shape)
        raise ValueError(f"gradients are {shapes[0]} and true gradients {shapes[1]}, expected the same (M, N) for both")
    if blocks < 4 or blocks.bit_count() != 1 or len(gradients_MN) < max(8, blocks + 2):
        raise UserError(
            f"{len(gradients_MN)} units cannot form {blocks} blocks",
            "a power of two of at least 4 blocks, and at least 8 units and 2 more than blocks",
            "measure more prompts",
        )
    sums = []
    for index in torch.arange(len(gradients_MN)).tensor_split(blocks):
        g_mN, t_mN = gradients_MN[index].double(), true_MN[index].double()
        if scales_M is not None:
            g_mN, t_mN = g_mN * scales_M[index, None], t_mN * scales_M[index, None]
        tt = float(t_mN.square().sum())
        sums.append(UnitSums(len(index), g_mN.sum(0), t_mN.sum(0), g_mN.square().sum(0), (g_mN * t_mN).sum(0), tt))
    return sums


def add_sums(sums: Sequence[UnitSums]) -> UnitSums:
    return reduce(UnitSums.plus, sums)


def sqrt_or_nan(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan
