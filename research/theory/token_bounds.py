"""Test Lemma 2 and Theorem 1 on measured token gradients.

Shapes: T tokens of one response, R regions. s_t is the gradient of log pi(y_t | y_<t) in all parameters; `gram_TT`
contains K = <s_t, s_u>, so the gradient of a response under weights w and advantage A has squared norm A² w'Kw / T².

For a response's gradient g = A / T sum_t w_t s_t, the tested forms are:

Lemma 2: E|e_y - p|² = 1 - sum_v p_v² <= 1 - exp(-H_t), for the score e_y - p of a token's logits.
Theorem 1: E|g|² <= A_max² L² E[sum_t w_t² (1 - exp(-H_t)) / T²], where L is the largest gain of the map from a logit
score to the parameters and the scores of different tokens are uncorrelated; a group of G divides it by G (Lemma 1).
Theorem 2 on the same tokens: `research.theory.optimal_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from research.theory.estimates import critical_value, jackknife, ratio_or_nan
from rest_rl.probe.variance import Estimate
from rest_rl.response import NUM_REGIONS, Region

TOLERANCE = 1e-9
"""Rounding error allowed in the inequality of Lemma 2."""
MIN_REGION_SHARE = 0.01
"""Share of the tokens below which a region is left out of the contrast between regions."""
MIN_COLLISION = 1e-6
"""Tokens with a smaller 1 - sum p² do not count for the gain: numerator and divisor are rounding errors."""


class ResponseTokens(NamedTuple):
    """The tokens of one response and the inner products of their gradients."""

    prompt: int
    """Index of the prompt; responses to one prompt are not independent."""
    advantage: float
    regions_T: np.ndarray
    logps_T: np.ndarray
    entropies_T: np.ndarray
    collisions_T: np.ndarray
    expected_T: np.ndarray
    """E_y |s_t|² over all tokens of the vocabulary: beta of Theorem 2."""
    gram_TT: np.ndarray

    @property
    def bounds(self) -> np.ndarray:
        """Bound 1 - exp(-H_t) of Lemma 2, from the entropy H_t of each token. Shape (T,)."""
        return -np.expm1(-self.entropies_T)

    def second_moments(self) -> np.ndarray:
        """Return the inner products of the parts that R regions contribute to the response's gradient. Shape (R, R)."""
        member_TR = np.eye(NUM_REGIONS)[self.regions_T]
        return self.advantage**2 * (member_TR.T @ self.gram_TT @ member_TR) / len(self.regions_T) ** 2

    def shares(self) -> np.ndarray:
        """Return the share of the tokens in each of R regions. Shape (R,)."""
        return np.bincount(self.regions_T, minlength=NUM_REGIONS) / len(self.regions_T)


class LemmaTwo(NamedTuple):
    """Result of checking Lemma 2 on every token."""

    tokens: int
    violations: int
    tightness: float
    """Mean of 1 - sum p² over the mean of 1 - exp(-H); 1 is tight."""
    z: float
    """Mean |e_y - p|² of the sampled tokens minus mean 1 - sum p², in standard errors; large if off-policy."""


class RegionTokens(NamedTuple):
    """Uncertainty and gradient size of the tokens of a region."""

    region: str
    tokens: int
    share: float
    entropy: Estimate
    collision: Estimate
    bound: Estimate
    square: Estimate
    """Mean E_y |s_t|²: beta of Theorem 2."""
    square_per_bound: Estimate
    """Mean E_y |s_t|² / mean 1 - exp(-H): equal in all regions if only uncertainty made gradients large."""


class RegionContrast(NamedTuple):
    """The regions with the largest and the smallest squared gradient per uncertainty."""

    high: str
    low: str
    log_ratio: Estimate
    """Natural logarithm of the ratio of their E|s|² / (1 - exp(-H))."""
    is_sure: bool
    """Whether the ratio is significant, given that it is the most extreme of all pairs."""


class BoundChain(NamedTuple):
    """Measured second moment, bound of Theorem 1, and the factor by which each of its assumptions raises the bound."""

    measured: Estimate
    """E|g|²."""
    bound: Estimate
    """Right side of Theorem 1."""
    advantage: Estimate
    """Cost of A_max² instead of each response's A²."""
    cross_terms: Estimate
    """Cost of taking tokens as uncorrelated, with their expected squares; 1 on average for weights fixed in advance."""
    gain: Estimate
    """Cost of the largest gain L² times 1 - sum p² instead of each token's E_y |s_t|²."""
    entropy: Estimate
    """Cost of 1 - exp(-H) instead of 1 - sum p² (Lemma 2)."""

    @property
    def looseness(self) -> float:
        """`bound` divided by `measured`."""
        return ratio_or_nan(self.bound.value, self.measured.value)


def check_lemma_two(logps_S: np.ndarray, entropies_S: np.ndarray, collisions_S: np.ndarray) -> LemmaTwo:
    """Check 1 - sum p² <= 1 - exp(-H) on every token, and E|e_y - p|² = 1 - sum p² on the mean of all tokens."""
    bounds_S = -np.expm1(-entropies_S)
    # |e_y - p|² = 1 - 2 p_y + sum p² = 2 (1 - p_y) - (1 - sum p²); its excess over 1 - sum p² has mean 0 on-policy.
    excess_S = 2 * (-np.expm1(logps_S) - collisions_S)
    spread = math.sqrt(float((excess_S**2).sum()))
    return LemmaTwo(
        tokens=len(entropies_S),
        violations=int((collisions_S > bounds_S + TOLERANCE).sum()),
        tightness=ratio_or_nan(float(collisions_S.sum()), float(bounds_S.sum())),
        z=ratio_or_nan(float(excess_S.sum()), spread),
    )


def summarize_regions(responses: Sequence[ResponseTokens]) -> list[RegionTokens]:
    """Return uncertainty and gradient size of every region that has tokens."""
    counts_R = sum((np.bincount(one.regions_T, minlength=NUM_REGIONS) for one in responses), np.zeros(NUM_REGIONS))
    rows = []
    for region in (region for region in Region if counts_R[region]):

        def mean(values: Callable[[ResponseTokens], np.ndarray], region: Region = region) -> Estimate:
            return jackknife_prompts(responses, lambda some: region_mean(some, values, region))

        def per_bound(some: Sequence[ResponseTokens], region: Region = region) -> float:
            return ratio_or_nan(region_mean(some, _expected, region), region_mean(some, _bounds, region))

        rows.append(
            RegionTokens(
                region.label,
                int(counts_R[region]),
                float(counts_R[region] / counts_R.sum()),
                entropy=mean(lambda one: one.entropies_T),
                collision=mean(lambda one: one.collisions_T),
                bound=mean(_bounds),
                square=mean(_expected),
                square_per_bound=jackknife_prompts(responses, per_bound),
            )
        )
    return rows


def contrast_regions(responses: Sequence[ResponseTokens], rows: Sequence[RegionTokens]) -> RegionContrast | None:
    """Return the regions with the largest and smallest squared gradient per uncertainty; None for fewer than two."""
    known = [row for row in rows if row.share >= MIN_REGION_SHARE and row.square_per_bound.value > 0]
    if len(known) < 2:
        return None
    low, high = (pick(known, key=lambda row: row.square_per_bound.value) for pick in (min, max))
    by_label = {region.label: region for region in Region}

    def log_ratio(some: Sequence[ResponseTokens]) -> float:
        pair = [
            ratio_or_nan(
                region_mean(some, _expected, by_label[row.region]), region_mean(some, _bounds, by_label[row.region])
            )
            for row in (high, low)
        ]
        return math.log(pair[0] / pair[1]) if min(pair) > 0 else math.nan

    # The extremes were picked after looking at the data, so the threshold accounts for all pairs. A log ratio treats
    # "twice" and "half" alike.
    pairs = len(known) * (len(known) - 1) // 2
    least = critical_value(len({one.prompt for one in responses}), pairs)
    found = jackknife_prompts(responses, log_ratio)
    return RegionContrast(high.region, low.region, found, found.is_above(0, least))


def _bounds(one: ResponseTokens) -> np.ndarray:
    return one.bounds


def _expected(one: ResponseTokens) -> np.ndarray:
    return one.expected_T


def region_mean(
    responses: Sequence[ResponseTokens], values: Callable[[ResponseTokens], np.ndarray], region: Region
) -> float:
    """Return the mean of per-token values over a region's tokens; NaN if it has none."""
    parts = [values(one)[one.regions_T == region] for one in responses]
    joined = np.concatenate(parts) if parts else np.zeros(0)
    return float(joined.mean()) if len(joined) else math.nan


def rank_correlation(responses: Sequence[ResponseTokens]) -> float:
    """Return Spearman's correlation between the bound 1 - exp(-H_t) and E_y |s_t|² over all tokens t."""
    bounds, squares = (np.concatenate([pick(one) for one in responses]) for pick in (_bounds, _expected))
    return spearman(bounds, squares)


def spearman(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def largest_advantage(group_size: int) -> float:
    """Return (G - 1) / sqrt(G), the advantage of the only response with another reward in a group of G."""
    return (group_size - 1) / math.sqrt(group_size)


def max_gain_square(responses: Sequence[ResponseTokens]) -> float:
    """Return L² of Theorem 1, the largest E_y |s_t|² / (1 - sum p²) of all tokens that are not certain."""
    # Both sides of the ratio vanish for a certain token, so its gain would be rounding error.
    ratios = [
        one.expected_T[one.collisions_T > MIN_COLLISION] / one.collisions_T[one.collisions_T > MIN_COLLISION]
        for one in responses
    ]
    return float(max((ratio.max() for ratio in ratios if len(ratio)), default=math.nan))


def measure_bound_chain(
    responses: Sequence[ResponseTokens], weights: Sequence[np.ndarray], group_size: int
) -> BoundChain:
    """Compute the bound of Theorem 1 and the cost of each of its assumptions on measured gradients."""
    # Each term relaxes the one before by one assumption, so the ratios of neighbors multiply to bound / measured. L is
    # the largest gain among the prompts of the other half (even or odd index): a response does not set its own bound.
    # The errors treat L as fixed, because the jackknife does not work for a maximum.
    halves = [max_gain_square([one for one in responses if one.prompt % 2 != parity]) for parity in (0, 1)]
    # `terms` has one row per response and one column per step of the chain; every ratio is one of mean columns.
    largest = largest_advantage(group_size) ** 2
    terms = np.array(
        [
            compute_chain_terms(one, w_T, largest, halves[one.prompt % 2])
            for one, w_T in zip(responses, weights, strict=True)
        ]
    )
    prompts = [one.prompt for one in responses]

    def ratio(above: int, below: int) -> Estimate:
        return jackknife_rows(terms, prompts, lambda mean: ratio_or_nan(mean[above], mean[below]))

    return BoundChain(
        measured=jackknife_rows(terms, prompts, lambda mean: mean[0]),
        bound=jackknife_rows(terms, prompts, lambda mean: mean[4]),
        advantage=ratio(1, 0),
        cross_terms=ratio(2, 1),
        gain=ratio(3, 2),
        entropy=ratio(4, 3),
    )


def compute_chain_terms(one: ResponseTokens, weights_T: np.ndarray, largest: float, gain: float) -> list[float]:
    """Return the five terms of one response, from A² w'Kw / T² to A_max² L² sum w² (1 - exp(-H)) / T²."""
    scale = 1 / len(weights_T) ** 2
    square = scale * float(weights_T @ one.gram_TT @ weights_T)
    own, collisions, bounds = (
        scale * float(weights_T**2 @ values) for values in (one.expected_T, one.collisions_T, one.bounds)
    )
    return [
        one.advantage**2 * square,
        largest * square,
        largest * own,
        *(largest * gain * x for x in (collisions, bounds)),
    ]


def jackknife_prompts(
    responses: Sequence[ResponseTokens], statistic: Callable[[Sequence[ResponseTokens]], float]
) -> Estimate:
    """Estimate a statistic of the responses, with its jackknife error over prompts."""
    prompts = sorted({one.prompt for one in responses})

    def statistic_of_kept(kept: np.ndarray) -> float:
        kept_prompts = {prompts[i] for i in kept}
        return statistic([one for one in responses if one.prompt in kept_prompts])

    return jackknife(len(prompts), statistic_of_kept)


def jackknife_rows(rows: np.ndarray, prompts: Sequence[int], statistic: Callable[[np.ndarray], float]) -> Estimate:
    """Estimate a statistic of the mean row, with its jackknife error over prompts; row i belongs to `prompts[i]`."""
    numbers, positions = np.unique(prompts, return_inverse=True)
    return jackknife(len(numbers), lambda kept: float(statistic(rows[np.isin(positions, kept)].mean(0))))
