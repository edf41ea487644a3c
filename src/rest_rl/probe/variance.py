"""How good a gradient estimator is: variance, |mean|², cosine with the true gradient, expected progress per unit step.

Shapes: M independent units (prompts with their group of responses, or whole batches), N coordinates, K blocks of units.
Every function takes stacked vectors: `gradients_MN[m]` is what one unit contributes under a token weighting,
`true_MN[m]` an unbiased estimate of the true gradient t from the same unit, such as REINFORCE with a leave-one-out
baseline.

No product pairs a unit with itself: <E g, t>, |E g|² and |t|² are means over pairs of different units, so the noise
that g and t share cannot pose as signal. What a batch of P units would do follows exactly: E|g_P|² = |E g|² + Var / P.
Adam divides every coordinate by a root mean square; that comes from units other than those of the signal which it
divides (cross-fitting), or a unit that makes both large would pull the figure down. Errors are those of the jackknife
over blocks of units; a difference to a baseline is one of the same units, so that what they share cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, overload

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor

from rest_rl.errors import UserError

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


BLOCKS = 16
"""Of units, where there are enough of them; a power of two, see `halvings`."""
FLOOR = 1e-3
"""Of the mean over coordinates: no coordinate's second moment is taken for less. Where half of the units barely have a
gradient, its estimate from them is chance, and a signal over it would drown all others."""
DOMINANT = 0.5
"""A unit with more than this share of the summed squared norms decides the second moment."""


class GradientSeries(NamedTuple):
    """A weighting's figures in a batch of units: from all that were measured, then with each of K blocks left out."""

    variance_1K: np.ndarray
    """tr Cov of the batch's gradient."""
    mean_square_1K: np.ndarray
    """|E g|²; an unbiased estimate, so it may be negative where there is no signal."""
    cosine_1K: np.ndarray
    """Between E g and the true gradient."""
    true_norm_1K: np.ndarray
    """|t|"""
    progress_1K: np.ndarray
    """<E g, t> / sqrt(E|g|²): expected improvement of a step of length 1."""
    adam_1K: np.ndarray
    """sum_j t_j E g_j / sqrt(E g_j²) / sqrt(N): that of a step of root mean square 1 / sqrt(N) in every coordinate."""
    largest_share: float
    """The largest unit's share of the summed squared norms."""

    @property
    def noise_ratio(self) -> np.ndarray:
        """Variance / |E g|²"""
        return quotient(self.variance_1K, np.maximum(self.mean_square_1K, 0.0))


class GradientFigures(NamedTuple):
    """What a weighting does to the gradient of a batch of `batch` units; relative figures are against the baseline."""

    variance: Estimate
    """tr Cov of the batch's gradient."""
    mean_square: Estimate
    """|E g|²; an unbiased estimate, so it may be negative where there is no signal."""
    ratio: Estimate
    """variance / |E g|²"""
    cosine: Estimate
    """Between E g and the true gradient: what reweighting costs in direction."""
    eff: Estimate
    """<E g, t> / sqrt(E|g|² |t|²): expected improvement per unit step, in [-1, 1]."""
    eff_adam: Estimate
    """sum_j t_j E g_j / sqrt(E g_j²) / (sqrt(N) |t|): the same after Adam's scaling, in [-1, 1]."""
    eff_gain: Estimate
    """eff over the baseline's, minus 1."""
    eff_adam_gain: Estimate
    """eff_adam over the baseline's, minus 1."""
    lead: Estimate
    """<E g, t> / sqrt(E|g|²) minus the baseline's: what tells the sign of a gain where |t| or a quotient is noise."""
    adam_lead: Estimate
    """The same after Adam's scaling."""
    largest_share: float
    """The largest unit's share of the summed squared norms."""

    @property
    def is_dominated(self) -> bool:
        """Whether a single unit decides the second moment, so that the figures say little about others."""
        return self.largest_share > DOMINANT

    @classmethod
    def of(cls, own: GradientSeries, baseline: GradientSeries) -> GradientFigures:
        """All figures of one weighting against the baseline, on the same units."""
        return cls(
            variance=Estimate.of(own.variance_1K),
            mean_square=Estimate.of(own.mean_square_1K),
            ratio=Estimate.of(own.noise_ratio),
            cosine=Estimate.of(own.cosine_1K),
            eff=Estimate.of(quotient(own.progress_1K, own.true_norm_1K)),
            eff_adam=Estimate.of(quotient(own.adam_1K, own.true_norm_1K)),
            eff_gain=Estimate.of(gain(own.progress_1K, baseline.progress_1K)),
            eff_adam_gain=Estimate.of(gain(own.adam_1K, baseline.adam_1K)),
            lead=Estimate.of(own.progress_1K - baseline.progress_1K),
            adam_lead=Estimate.of(own.adam_1K - baseline.adam_1K),
            largest_share=own.largest_share,
        )


def gain(own: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Own over baseline, minus 1; NaN where the baseline makes no progress."""
    return quotient(own, above_zero(baseline)) - 1


@dataclass(frozen=True)
class Sums:
    """Sums over units from which every figure follows; of disjoint units they add up."""

    units: int
    g_N: Tensor
    t_N: Tensor
    gg_N: Tensor
    gt_N: Tensor
    tt: float

    def plus(self, other: Sums) -> Sums:
        """The sums of the units of both."""
        return Sums(
            self.units + other.units,
            self.g_N + other.g_N,
            self.t_N + other.t_N,
            self.gg_N + other.gg_N,
            self.gt_N + other.gt_N,
            self.tt + other.tt,
        )

    def without(self, other: Sums) -> Sums:
        """The sums of the units that are not in `other`."""
        return Sums(
            self.units - other.units,
            self.g_N - other.g_N,
            self.t_N - other.t_N,
            self.gg_N - other.gg_N,
            self.gt_N - other.gt_N,
            self.tt - other.tt,
        )

    @property
    def signals(self) -> Tensor:
        """E g_j t_j per coordinate (N,), from pairs of different units: sum_{m != n} g_m t_n / (M (M - 1))."""
        return (self.g_N * self.t_N - self.gt_N) / (self.units * (self.units - 1))

    @property
    def signal(self) -> float:
        """<E g, t>"""
        return float(self.signals.sum())

    @property
    def mean_square(self) -> float:
        """|E g|²"""
        return float((self.g_N.square() - self.gg_N).sum()) / (self.units * (self.units - 1))

    @property
    def true_square(self) -> float:
        """|t|²"""
        return (float(self.t_N.square().sum()) - self.tt) / (self.units * (self.units - 1))

    @property
    def variance(self) -> float:
        """Tr Cov of one unit."""
        return float(self.gg_N.sum()) / self.units - self.mean_square

    def second_moments(self, batch: int) -> Tensor:
        """E g_j² of a batch of units, per coordinate (N,), never negative: mean² + s² (1/P - 1/M)."""
        mean_N = self.g_N / self.units
        spread_N = (self.gg_N / self.units - mean_N.square()).clamp_min(0) * self.units / (self.units - 1)
        return mean_N.square() + spread_N * (1 / batch - 1 / self.units)

    def progress(self, batch: int) -> float:
        """Expected improvement of a step of length 1 that a batch of units makes."""
        return quotient(self.signal, math.sqrt(float(self.second_moments(batch).sum())))

    def cosine(self) -> float:
        """Between E g and t."""
        return quotient(self.signal, root(self.mean_square) * root(self.true_square))


class Half(NamedTuple):
    """What one half of the units has to say about every coordinate."""

    signals_N: Tensor
    """E g_j t_j"""
    inverse_N: Tensor
    """1 / sqrt(E g_j²) of a batch, see `FLOOR`; 0 where there is no gradient at all."""

    @classmethod
    def of(cls, sums: Sums, batch: int) -> Half:
        """From the half's sums."""
        moments_N = sums.second_moments(batch)
        moments_N = moments_N.clamp_min(FLOOR * float(moments_N.mean()))
        return cls(sums.signals, torch.where(moments_N > 0, moments_N.rsqrt(), 0.0))

    def progress(self, other: Half) -> float:
        """The signals of either half over the scales of the other, averaged."""
        both = self.signals_N @ other.inverse_N + other.signals_N @ self.inverse_N
        return float(both) / 2 / math.sqrt(len(self.signals_N))


def gradient_series(
    gradients_MN: Tensor,
    true_MN: Tensor,
    *,
    batch: int = 1,
    blocks: int = BLOCKS,
    scales_M: Tensor | None = None,
) -> GradientSeries:
    """The figures of one weighting; `scales_M` multiplies each unit's two vectors (see `norm_cap`)."""
    sums = block_sums(gradients_MN, true_MN, blocks, scales_M)
    most = most_per_batch([one.units for one in sums])
    if not 1 <= batch <= most:
        raise UserError(f"a batch of {batch} units", f"1 to {most} of {len(true_MN)}", "measure more prompts")
    whole = total(sums)
    parts = [whole, *(whole.without(one) for one in sums)]
    return GradientSeries(
        variance_1K=np.array([one.variance / batch for one in parts]),
        mean_square_1K=np.array([one.mean_square for one in parts]),
        cosine_1K=np.array([one.cosine() for one in parts]),
        true_norm_1K=np.array([root(one.true_square) for one in parts]),
        progress_1K=np.array([one.progress(batch) for one in parts]),
        adam_1K=adam_series(sums, batch),
        largest_share=largest_share(gradients_MN, scales_M),
    )


def adam_series(sums: Sequence[Sums], batch: int) -> np.ndarray:
    """See `GradientSeries.adam_1K`: cross-fitted between halves of the blocks, averaged over the ways to halve them."""
    found = []
    for sides in halvings(len(sums)):
        halves = [total([one for one, side in zip(sums, sides, strict=True) if side == own]) for own in (0, 1)]
        first, second = (Half.of(half, batch) for half in halves)
        own = [first.progress(second)]
        for one, side in zip(sums, sides, strict=True):
            left = Half.of(halves[side].without(one), batch)
            own.append(left.progress(first if side else second))
        found.append(own)
    return np.mean(found, axis=0)


def halvings(blocks: int) -> Iterator[list[int]]:
    """The side, 0 or 1, of each of 2^k blocks in k ways: by the bits of their numbers, so that most pairs meet."""
    for bit in range(blocks.bit_length() - 1):
        yield [number >> bit & 1 for number in range(blocks)]


def blocks_for(units: int) -> int:
    """The largest power of two of blocks, 16 at most, that so many units can be put into."""
    return 2 ** (min(BLOCKS, max(4, units - 2)).bit_length() - 1)


def most_per_step(units: int) -> int:
    """The largest step that can be predicted from so many units, in `blocks_for` blocks."""
    return most_per_batch([len(own) for own in np.array_split(np.arange(units), blocks_for(units))])


def most_per_batch(sizes: Sequence[int]) -> int:
    """The largest batch that can be predicted from blocks of these sizes.

    A quarter of the units, and fewer than there are in half of the blocks when one is left out: else the variance of a
    batch would be taken for nearly 0 and the squared mean, which is noise above all, would be all that Adam divides by.
    """
    halves = [
        [size for size, side in zip(sizes, sides, strict=True) if side == own]
        for sides in halvings(len(sizes))
        for own in (0, 1)
    ]
    return max(1, min(sum(sizes) // 4, min(sum(half) - max(half) for half in halves) - 1))


def norm_cap(baseline_MN: Tensor, cap: float) -> Tensor:
    """The factor that brings each unit's norm down to `cap` times the median of the norms above 0: float64 (M,).

    The same factors for every weighting, so that they stay comparable. What is measured then is the typical unit and no
    longer the expectation.
    """
    if not cap > 0:
        raise ValueError(f"got a norm cap of {cap}, expected a positive multiple of the median norm")
    norms_M = row_norms(baseline_MN)
    live_M = norms_M[norms_M > 0]
    if not len(live_M):
        return torch.ones_like(norms_M)
    return (cap * live_M.median() / norms_M.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)


def largest_share(gradients_MN: Tensor, scales_M: Tensor | None = None) -> float:
    """The largest unit's share of the sum of squared norms; NaN where all are 0."""
    squares_M = row_norms(gradients_MN).square()
    if scales_M is not None:
        squares_M = squares_M * scales_M.square()
    return quotient(float(squares_M.max()), float(squares_M.sum()))


def row_norms(gradients_MN: Tensor) -> Tensor:
    """The norm of each unit's vector: float64 (M,)."""
    return torch.linalg.vector_norm(gradients_MN, dim=1, dtype=torch.float64)


def block_sums(gradients_MN: Tensor, true_MN: Tensor, blocks: int, scales_M: Tensor | None = None) -> list[Sums]:
    """Sums over `blocks` runs of consecutive units, sizes as equal as they can be."""
    if gradients_MN.ndim != 2 or gradients_MN.shape != true_MN.shape:
        shapes = tuple(gradients_MN.shape), tuple(true_MN.shape)
        raise ValueError(f"got gradients {shapes[0]} and true gradients {shapes[1]}, expected one (M, N) for both")
    if blocks < 4 or blocks.bit_count() != 1 or len(gradients_MN) < max(8, blocks + 2):
        raise UserError(
            f"{len(gradients_MN)} units for {blocks} blocks",
            "a power of two of blocks from 4 on, 8 units and 2 more than blocks",
            "measure more prompts",
        )
    sums = []
    for index in torch.arange(len(gradients_MN)).tensor_split(blocks):
        g_mN, t_mN = gradients_MN[index].double(), true_MN[index].double()
        if scales_M is not None:
            g_mN, t_mN = g_mN * scales_M[index, None], t_mN * scales_M[index, None]
        products_N = (g_mN * t_mN).sum(0)
        tt = float(t_mN.square().sum())
        sums.append(Sums(len(index), g_mN.sum(0), t_mN.sum(0), g_mN.square().sum(0), products_N, tt))
    return sums


def total(sums: Sequence[Sums]) -> Sums:
    """The sums of all blocks."""
    return reduce(Sums.plus, sums)


def root(square: float) -> float:
    """The square root; NaN for an estimate of a square that came out negative."""
    return math.sqrt(square) if square >= 0 else math.nan
