"""How good a gradient estimator is: variance, |mean|², cosine with the true gradient, expected progress per unit step.

Shapes: M independent units (prompts with their group of responses, or whole batches), N coordinates, K blocks of units.
Every function takes stacked vectors: `gradients_MN[m]` is what one unit contributes under a token weighting,
`true_MN[m]` an unbiased estimate of the true gradient t from the same unit, such as REINFORCE with a leave-one-out
baseline.

No product pairs a unit with itself: <E g, t>, |E g|² and |t|² are means over pairs of different units, so the noise
that g and t share cannot pose as signal. What a batch of P units would do follows exactly: E|g_P|² = |E g|² + Var / P.
Errors are those of the jackknife over blocks of units; a difference to a baseline is one of the same units, so that
what they share cancels.
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
"""Blocks of units, where there are enough units; a power of two, see `generate_halvings`."""
MOMENT_FLOOR = 1e-3
"""Least second moment of a coordinate, relative to the mean over coordinates. Where half of the units barely have a
gradient, the estimate from them is chance, and a signal divided by it would drown all others."""


class Estimate(NamedTuple):
    """A figure and its standard error over prompts; NaN where it is not defined."""

    value: float
    error: float

    @classmethod
    def from_jackknife(cls, values_1M: np.ndarray) -> Estimate:
        """From a statistic of all units and of all but one: se² = (M-1)/M sum_m (x_-m - mean)² (jackknife)."""
        left_out_M = values_1M[1:]
        count = len(left_out_M)
        spread = float(((left_out_M - left_out_M.mean()) ** 2).sum())
        return cls(float(values_1M[0]), math.sqrt((count - 1) / count * spread))

    def is_above(self, threshold: float, num_errors: float) -> bool:
        """Whether it is more than so many errors above `least`; False where it is not defined."""
        return self.value - num_errors * self.error > threshold


def leave_one_out_sums(sums_M: np.ndarray) -> np.ndarray:
    """The sum over units, then the sums without each of them: (1+M, ...)."""
    total = sums_M.sum(0, keepdims=True)
    return np.concatenate([total, total - sums_M])


def divide_or_nan(above: np.ndarray | float, below: np.ndarray | float) -> np.ndarray:
    """Element by element, NaN where the divisor is 0."""
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, math.nan), where=below != 0)


def relative_gain(own: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Own over baseline, minus 1; NaN where the baseline makes no progress."""
    return divide_or_nan(own, np.where(baseline > 0, baseline, math.nan)) - 1


class GradientSeries(NamedTuple):
    """A weighting's figures in a batch of units: from all that were measured, then with each of K blocks left out.

    `variance` is tr Cov of the batch's gradient, `mean_square` |E g|² (unbiased, so it may come out negative), `cosine`
    that of E g and the true gradient t, `true_norm` |t|. `progress` is <E g, t> / sqrt(E|g|²), the expected improvement
    of a step of length 1; `adam` sum_j t_j E g_j / sqrt(E g_j²) / sqrt(N), that of a step of root mean square
    1 / sqrt(N) in every coordinate.
    """

    variance_1K: np.ndarray
    mean_square_1K: np.ndarray
    cosine_1K: np.ndarray
    true_norm_1K: np.ndarray
    progress_1K: np.ndarray
    adam_1K: np.ndarray

    @property
    def noise_ratio(self) -> np.ndarray:
        """Variance / |E g|²"""
        return divide_or_nan(self.variance_1K, np.maximum(self.mean_square_1K, 0.0))


def compute_gradient_series(
    gradients_MN: Tensor, true_MN: Tensor, *, batch: int = 1, blocks: int = MAX_BLOCKS, scales_M: Tensor | None = None
) -> GradientSeries:
    """The figures of one weighting; `scales_M` multiplies each unit's two vectors (see `compute_norm_scales`)."""
    sums = sum_by_block(gradients_MN, true_MN, blocks, scales_M)
    most = max_batch_size([one.units for one in sums])
    if not 1 <= batch <= most:
        raise UserError(f"a batch of {batch} units", f"1 to {most} of {len(true_MN)}", "measure more prompts")
    whole = add_sums(sums)
    rows = [compute_batch_figures(one, batch) for one in (whole, *(whole.without(one) for one in sums))]
    return GradientSeries(*np.array(rows).T, adam_1K=compute_adam_progress(sums, batch))


class UnitSums(NamedTuple):
    """Sums over units from which every figure follows; those of disjoint units add up."""

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
        """E g_j t_j per coordinate (N,), from pairs of different units: sum_{m != n} g_m t_n / (M (M - 1))."""
        return (self.g_N * self.t_N - self.gt_N) / (self.units * (self.units - 1))

    def second_moments(self, batch: int) -> Tensor:
        """E g_j² of a batch of units, per coordinate (N,), never negative: mean² + s² (1/P - 1/M)."""
        mean_N = self.g_N / self.units
        spread_N = (self.gg_N / self.units - mean_N.square()).clamp_min(0) * self.units / (self.units - 1)
        return mean_N.square() + spread_N * (1 / batch - 1 / self.units)


def compute_batch_figures(sums: UnitSums, batch: int) -> tuple[float, float, float, float, float]:
    """The figures of `GradientSeries`, but for Adam's, in its order."""
    signal, pairs = float(sums.signals.sum()), sums.units * (sums.units - 1)
    mean_square = float((sums.g_N.square() - sums.gg_N).sum()) / pairs
    true_norm = sqrt_or_nan((float(sums.t_N.square().sum()) - sums.tt) / pairs)
    variance = float(sums.gg_N.sum()) / sums.units - mean_square
    cosine = float(divide_or_nan(signal, sqrt_or_nan(mean_square) * true_norm))
    progress = float(divide_or_nan(signal, math.sqrt(float(sums.second_moments(batch).sum()))))
    return variance / batch, mean_square, cosine, true_norm, progress


class HalfStatistics(NamedTuple):
    """What one half of the units has to say about every coordinate."""

    signals_N: Tensor
    """E g_j t_j"""
    inverse_N: Tensor
    """1 / sqrt(E g_j²) of a batch, see `MOMENT_FLOOR`; 0 where there is no gradient at all."""

    @classmethod
    def from_sums(cls, sums: UnitSums, batch: int) -> HalfStatistics:
        moments_N = sums.second_moments(batch)
        moments_N = moments_N.clamp_min(MOMENT_FLOOR * float(moments_N.mean()))
        return cls(sums.signals, torch.where(moments_N > 0, moments_N.rsqrt(), 0.0))

    def progress(self, other: HalfStatistics) -> float:
        """The signals of either half over the scales of the other, averaged."""
        both = self.signals_N @ other.inverse_N + other.signals_N @ self.inverse_N
        return float(both) / 2 / math.sqrt(len(self.signals_N))


def compute_adam_progress(sums: Sequence[UnitSums], batch: int) -> np.ndarray:
    """`GradientSeries.adam_1K` from the sums of each block, cross-fitted between halves of the blocks.

    1. Put the blocks into two halves; signals E g_j t_j and scales 1 / sqrt(E g_j²) follow from each half's sums.
    2. Progress is the signals of one half times the scales of the other, both ways. Were signal and scale taken from
       the same units, a unit with a large gradient would raise both, and the estimate would come out too low.
    3. To leave a block out, take it from its own half only. Average over the ways to halve (`generate_halvings`).
    """
    found = []
    for sides in generate_halvings(len(sums)):
        halves = [add_sums([one for one, side in zip(sums, sides, strict=True) if side == own]) for own in (0, 1)]
        first, second = (HalfStatistics.from_sums(half, batch) for half in halves)
        own = [first.progress(second)]
        for one, side in zip(sums, sides, strict=True):
            left = HalfStatistics.from_sums(halves[side].without(one), batch)
            own.append(left.progress(first if side else second))
        found.append(own)
    return np.mean(found, axis=0)


def generate_halvings(blocks: int) -> Iterator[list[int]]:
    """The side, 0 or 1, of each of 2^k blocks in k ways: by the bits of their numbers, so that most pairs meet."""
    for bit in range(blocks.bit_length() - 1):
        yield [number >> bit & 1 for number in range(blocks)]


def choose_num_blocks(units: int) -> int:
    """The largest power of two of blocks, 16 at most, that so many units can be put into."""
    return 2 ** (min(MAX_BLOCKS, max(4, units - 2)).bit_length() - 1)


def max_prompts_per_step(units: int) -> int:
    """The largest step that can be predicted from so many units, in `choose_num_blocks` blocks."""
    return max_batch_size([len(own) for own in np.array_split(np.arange(units), choose_num_blocks(units))])


def max_batch_size(sizes: Sequence[int]) -> int:
    """The largest batch that can be predicted from blocks of these sizes.

    A quarter of the units, and fewer than there are in half of the blocks when one is left out: else the variance of a
    batch would be taken for nearly 0 and the squared mean, which is noise above all, would be all that Adam divides by.
    """
    halves = [
        [size for size, side in zip(sizes, sides, strict=True) if side == own]
        for sides in generate_halvings(len(sizes))
        for own in (0, 1)
    ]
    return max(1, min(sum(sizes) // 4, min(sum(half) - max(half) for half in halves) - 1))


def compute_norm_scales(baseline_MN: Tensor, cap: float) -> Tensor:
    """The factor that brings each unit's norm down to `cap` times the median of the norms above 0: float64 (M,).

    The same factors for every weighting, so that they stay comparable. What is measured then is the typical unit and no
    longer the expectation.
    """
    if not cap > 0:
        raise ValueError(f"got a norm cap of {cap}, expected a positive multiple of the median norm")
    norms_M = torch.linalg.vector_norm(baseline_MN, dim=1, dtype=torch.float64)
    live_M = norms_M[norms_M > 0]
    if not len(live_M):
        return torch.ones_like(norms_M)
    return (cap * live_M.median() / norms_M.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)


def sum_by_block(gradients_MN: Tensor, true_MN: Tensor, blocks: int, scales_M: Tensor | None = None) -> list[UnitSums]:
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
        tt = float(t_mN.square().sum())
        sums.append(UnitSums(len(index), g_mN.sum(0), t_mN.sum(0), g_mN.square().sum(0), (g_mN * t_mN).sum(0), tt))
    return sums


def add_sums(sums: Sequence[UnitSums]) -> UnitSums:
    return reduce(UnitSums.plus, sums)


def sqrt_or_nan(square: float) -> float:
    """The square root; NaN for an estimate of a square that came out negative."""
    return math.sqrt(square) if square >= 0 else math.nan
