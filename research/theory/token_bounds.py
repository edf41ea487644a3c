"""The variance theory of ResT on measured token gradients: Lemma 2 and Theorem 1, and where they part.

Shapes: T tokens of one response, R regions. s_t is the gradient of log pi(y_t | y_<t) in all parameters; `gram_TT`
holds <s_t, s_u>, so the gradient of a response under any weights w and advantage A has the squared norm A² w'Kw / T².

The forms that are tested, for a response's gradient g = A / T sum_t w_t s_t:

Lemma 2: E|e_y - p|² = 1 - sum_v p_v² <= 1 - exp(-H_t), for the score e_y - p of a token's logits.
Theorem 1: E|g|² <= A_max² L² E[sum_t w_t² (1 - exp(-H_t)) / T²], L the largest gain of the map from a logit score to
parameters, and the scores of different tokens uncorrelated; a group of G divides it by G (Lemma 1).
Theorem 2, on the same tokens: `research.theory.optimal_weights`.
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
"""What rounding may cost the inequality of Lemma 2."""
MIN_REGION_SHARE = 0.01
"""Share of the tokens below which a region is not spoken of."""
MIN_COLLISION = 1e-6
"""Tokens with a smaller 1 - sum p² say nothing about a gain: both its sides are rounding."""


class ResponseTokens(NamedTuple):
    """The tokens of one response and the inner products of their gradients."""

    prompt: int
    """Number of the prompt; responses to one prompt are not independent."""
    advantage: float
    regions_T: np.ndarray
    logps_T: np.ndarray
    entropies_T: np.ndarray
    collisions_T: np.ndarray
    expected_T: np.ndarray
    """E_y |s_t|² over all tokens that could have come: what Theorem 2 calls beta."""
    gram_TT: np.ndarray

    @property
    def bounds(self) -> np.ndarray:
        """1 - exp(-H_t): (T,)."""
        return -np.expm1(-self.entropies_T)

    def second_moments(self) -> np.ndarray:
        """A² sum_{t in r, u in s} <s_t, s_u> / T²: (R, R)."""
        member_TR = np.eye(NUM_REGIONS)[self.regions_T]
        return self.advantage**2 * (member_TR.T @ self.gram_TT @ member_TR) / len(self.regions_T) ** 2

    def shares(self) -> np.ndarray:
        """Share of the tokens in each region: (R,)."""
        return np.bincount(self.regions_T, minlength=NUM_REGIONS) / len(self.regions_T)


class LemmaTwo(NamedTuple):
    """Lemma 2, token by token."""

    tokens: int
    violations: int
    tightness: float
    """Mean of 1 - sum p² over the mean of 1 - exp(-H); 1 is tight."""
    z: float
    """How many standard errors the sampled tokens' mean |e_y - p|² is from that of 1 - sum p²: on-policy or not."""


class RegionTokens(NamedTuple):
    """What the tokens of a region are like and how large their gradients are."""

    region: str
    tokens: int
    share: float
    entropy: Estimate
    collision: Estimate
    bound: Estimate
    square: Estimate
    """Mean E_y |s_t|²: what Theorem 2 calls beta."""
    square_per_bound: Estimate
    """Its mean over that of 1 - exp(-H): alike in all regions if uncertainty alone made gradients large."""


class RegionContrast(NamedTuple):
    """How far apart regions are in gradient per uncertainty."""

    high: str
    low: str
    log_ratio: Estimate
    """Natural logarithm of the quotient of their E|s|² / (1 - exp(-H))."""
    is_sure: bool
    """Whether it is beyond chance, as the most striking of all pairs."""


class BoundChain(NamedTuple):
    """From the measured second moment of a response's gradient to its bound, one assumption at a time; ratios."""

    measured: Estimate
    """E|g|²"""
    bound: Estimate
    """Theorem 1's right side."""
    advantage: Estimate
    """A_max² instead of each response's A²."""
    cross_terms: Estimate
    """Tokens taken as uncorrelated, each with its expected square; 1 in expectation at weights fixed beforehand."""
    gain: Estimate
    """The largest gain L² times 1 - sum p² instead of each token's E_y |s_t|²."""
    entropy: Estimate
    """1 - exp(-H) instead of 1 - sum p² (Lemma 2)."""

    @property
    def looseness(self) -> float:
        """Bound over measured."""
        return ratio_or_nan(self.bound.value, self.measured.value)


def check_lemma_two(logps_S: np.ndarray, entropies_S: np.ndarray, collisions_S: np.ndarray) -> LemmaTwo:
    """Check 1 - sum p² <= 1 - exp(-H) on every token, and E|e_y - p|² = 1 - sum p² on their mean."""
    bounds_S = -np.expm1(-entropies_S)
    excess_S = 2 * (-np.expm1(logps_S) - collisions_S)  # |e_y - p|² = 2 (1 - p_y) - (1 - sum p²), minus 1 - sum p²
    spread = math.sqrt(float((excess_S**2).sum()))
    return LemmaTwo(
        tokens=len(entropies_S),
        violations=int((collisions_S > bounds_S + TOLERANCE).sum()),
        tightness=ratio_or_nan(float(collisions_S.sum()), float(bounds_S.sum())),
        z=ratio_or_nan(float(excess_S.sum()), spread),
    )


def summarize_regions(responses: Sequence[ResponseTokens]) -> list[RegionTokens]:
    """Every region with tokens: its uncertainty and the size of its gradients."""
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
    """The regions of the largest and the smallest E|s|² per unit of 1 - exp(-H); None without two to compare."""
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
    """The mean of per-token values over a region's tokens; NaN without any."""
    parts = [values(one)[one.regions_T == region] for one in responses]
    joined = np.concatenate(parts) if parts else np.zeros(0)
    return float(joined.mean()) if len(joined) else math.nan


def rank_correlation(responses: Sequence[ResponseTokens]) -> float:
    """Spearman's correlation of 1 - exp(-H_t) with E_y |s_t|² over all tokens."""
    bounds, squares = (np.concatenate([pick(one) for one in responses]) for pick in (_bounds, _expected))
    return spearman(bounds, squares)


def spearman(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation."""
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def largest_advantage(group_size: int) -> float:
    """(G - 1) / sqrt(G): the standardised advantage of one response that differs from all others of its group."""
    return (group_size - 1) / math.sqrt(group_size)


def max_gain_square(responses: Sequence[ResponseTokens]) -> float:
    """L²: the largest E_y |s_t|² / (1 - sum p²) of any token that is not certain."""
    ratios = [
        one.expected_T[one.collisions_T > MIN_COLLISION] / one.collisions_T[one.collisions_T > MIN_COLLISION]
        for one in responses
    ]
    return float(max((ratio.max() for ratio in ratios if len(ratio)), default=math.nan))


def measure_bound_chain(
    responses: Sequence[ResponseTokens], weights: Sequence[np.ndarray], group_size: int
) -> BoundChain:
    """Theorem 1 on measured gradients: the bound, and what each of its assumptions costs.

    L is the largest gain among the prompts of the other half (even against odd numbers), so that a response does not
    set the bound that it is held against. The errors hold L fixed: a maximum has no jackknife error.
    """
    halves = [max_gain_square([one for one in responses if one.prompt % 2 != parity]) for parity in (0, 1)]
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
    """One response's five terms, from its own A² w'Kw / T² to A_max² L² sum w² (1 - exp(-H)) / T²."""
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
    """A statistic and its error by leaving each prompt out in turn; no error where a single prompt determines it."""
    prompts = sorted({one.prompt for one in responses})

    def of(kept: np.ndarray) -> float:
        some = {prompts[i] for i in kept}
        return statistic([one for one in responses if one.prompt in some])

    return jackknife(len(prompts), of)


def jackknife_rows(rows: np.ndarray, prompts: Sequence[int], statistic: Callable[[np.ndarray], float]) -> Estimate:
    """A statistic of the mean row and its error by leaving out the rows of each prompt in turn."""
    numbers, positions = np.unique(prompts, return_inverse=True)
    return jackknife(len(numbers), lambda kept: float(statistic(rows[np.isin(positions, kept)].mean(0))))
