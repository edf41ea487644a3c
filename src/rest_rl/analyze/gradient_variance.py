"""How good a gradient estimator is: variance, |mean|², cosine with the true gradient, expected progress per unit step.

Shapes: M independent units (prompts with their group of responses, or whole batches), N coordinates. Every function
takes stacked vectors: `gradients_MN[m]` is what one unit contributes under a token weighting, `true_MN[m]` an unbiased
estimate of the true gradient t from the same unit, such as REINFORCE with a leave-one-out baseline.

No product pairs a unit with itself: <E g, t>, |E g|² and |t|² are means over pairs of different units, so the noise
that g and t share cannot pose as signal. What a batch of P units would do follows exactly: E|g_P|² = |E g|² + Var / P.
Errors are those of the jackknife over blocks of units; a difference to a baseline is one of the same units, so that
what they share cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rest_rl.analyze.probe import Estimate

DOMINANT = 0.5
"""A unit with more than this share of the summed squared norms decides the second moment."""


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


@dataclass(frozen=True)
class Sums:
    """Sums over units from which every figure follows; of disjoint units they add up."""

    units: int
    g_N: Tensor
    t_N: Tensor
    gg_N: Tensor
    gt_N: Tensor
    tt: float

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

    def progress(self, batch: int, *, adam: bool) -> float:
        """Expected improvement of a step of length 1, or of root mean square 1 in every coordinate over sqrt(N)."""
        moments_N = self.second_moments(batch)
        if not adam:
            return quotient(self.signal, math.sqrt(float(moments_N.sum())))
        scales_N = moments_N.sqrt()
        return float((self.signals / scales_N)[scales_N > 0].sum()) / math.sqrt(len(scales_N))

    def eff(self, batch: int, *, adam: bool = False) -> float:
        """See `GradientFigures.eff` and `eff_adam`."""
        return quotient(self.progress(batch, adam=adam), root(self.true_square))

    def cosine(self) -> float:
        """See `GradientFigures.cosine`."""
        return quotient(self.signal, root(self.mean_square) * root(self.true_square))


def efficiency(
    gradients_MN: Tensor,
    true_MN: Tensor,
    *,
    adam: bool = False,
    batch: int = 1,
    blocks: int = 8,
    scales_M: Tensor | None = None,
) -> Estimate:
    """Expected improvement per unit step of a batch of `batch` units: <E g, t> / sqrt(E|g|² |t|²), or after Adam.

    Scaling all gradients leaves it as it is; two rules are compared by `efficiency_gain`, whose error is the paired
    one. `scales_M` multiplies each unit's two vectors (see `norm_cap`).
    """
    sums = [block_sums(gradients_MN, true_MN, blocks, scales_M)]
    return jackknifed(sums, lambda parts: parts[0].eff(batch, adam=adam), batch)


def efficiency_gain(
    gradients_MN: Tensor,
    baseline_MN: Tensor,
    true_MN: Tensor,
    *,
    adam: bool = False,
    batch: int = 1,
    blocks: int = 8,
    scales_M: Tensor | None = None,
) -> Estimate:
    """How much more a weighting improves per unit step than the baseline on the same units: eff / eff_baseline - 1."""
    sums = [block_sums(stack, true_MN, blocks, scales_M) for stack in (gradients_MN, baseline_MN)]
    return jackknifed(sums, lambda parts: gain(parts, batch, adam=adam), batch)


def gradient_figures(
    gradients_MN: Tensor,
    baseline_MN: Tensor,
    true_MN: Tensor,
    *,
    batch: int = 1,
    blocks: int = 8,
    scales_M: Tensor | None = None,
) -> GradientFigures:
    """All figures of one weighting against the baseline, on the same units."""
    sums = [block_sums(stack, true_MN, blocks, scales_M) for stack in (gradients_MN, baseline_MN)]

    def measured(statistic: Callable[[Sums], float]) -> Estimate:
        return jackknifed(sums, lambda parts: statistic(parts[0]), batch)

    return GradientFigures(
        variance=measured(lambda own: own.variance / batch),
        mean_square=measured(lambda own: own.mean_square),
        ratio=measured(lambda own: quotient(own.variance / batch, max(own.mean_square, 0.0))),
        cosine=measured(Sums.cosine),
        eff=measured(lambda own: own.eff(batch)),
        eff_adam=measured(lambda own: own.eff(batch, adam=True)),
        eff_gain=jackknifed(sums, lambda parts: gain(parts, batch, adam=False), batch),
        eff_adam_gain=jackknifed(sums, lambda parts: gain(parts, batch, adam=True), batch),
        lead=jackknifed(sums, lambda parts: lead(parts, batch, adam=False), batch),
        adam_lead=jackknifed(sums, lambda parts: lead(parts, batch, adam=True), batch),
        largest_share=largest_share(gradients_MN, scales_M),
    )


def gain(parts: list[Sums], batch: int, *, adam: bool) -> float:
    """Eff of the first over that of the second, minus 1; |t| cancels."""
    own, base = (part.progress(batch, adam=adam) for part in parts)
    return own / base - 1 if base > 0 else math.nan


def lead(parts: list[Sums], batch: int, *, adam: bool) -> float:
    """The first's progress minus the second's."""
    own, base = (part.progress(batch, adam=adam) for part in parts)
    return own - base


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
    if blocks < 2 or len(gradients_MN) < blocks + 2:
        raise ValueError(
            f"got {len(gradients_MN)} units for {blocks} blocks, expected at least 2 blocks and 2 units more than "
            "blocks; measure more prompts"
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


def total(sums: list[Sums]) -> Sums:
    """The sums of all blocks."""
    g_N, t_N, gg_N, gt_N = (
        torch.stack([getattr(one, name) for one in sums]).sum(0) for name in ("g_N", "t_N", "gg_N", "gt_N")
    )
    return Sums(sum(one.units for one in sums), g_N, t_N, gg_N, gt_N, math.fsum(one.tt for one in sums))


def jackknifed(sums: list[list[Sums]], statistic: Callable[[list[Sums]], float], batch: int) -> Estimate:
    """The statistic of all units and its standard error, sqrt((K - 1) / K sum_k (leave-block-k-out - their mean)²).

    `sums` are the block sums of each estimator on the same units. Efron and Stein (1981),
    https://doi.org/10.1214/aos/1176345462.
    """
    wholes = [total(blocks) for blocks in sums]
    fewest = wholes[0].units - max(block.units for block in sums[0])
    if not 1 <= batch <= fewest:
        raise ValueError(
            f"got a batch of {batch} units, expected 1 to {fewest}, what is left when a block is; measure more prompts"
        )
    left_out = [
        statistic([whole.without(blocks[k]) for whole, blocks in zip(wholes, sums, strict=True)])
        for k in range(len(sums[0]))
    ]
    return Estimate(statistic(wholes), jackknife_error(left_out))


def jackknife_error(left_out: list[float]) -> float:
    """The standard error from the K estimates that leave one block out each."""
    values = torch.tensor(left_out, dtype=torch.float64)
    return float(((len(values) - 1) * (values - values.mean()).square().mean()).sqrt())


def root(square: float) -> float:
    """The square root; NaN for an estimate of a square that came out negative."""
    return math.sqrt(square) if square >= 0 else math.nan


def quotient(above: float, below: float) -> float:
    """The quotient; NaN over 0."""
    return above / below if below != 0 else math.nan
