"""Where the reward signal of a model lies: figures per region and per weight rule from sampled groups, no training.

Shapes: M prompts with a group of responses each, R regions, T sampled tokens. A leading axis "1+M" holds a statistic of
all prompts and then that with each prompt left out, from which `Estimate.of` takes the jackknife error: whatever is
computed from such arrays element by element keeps its error, differences of two rules on the same prompts included.
Products of gradients are averaged over pairs of different prompts, so that no sample's noise is taken for signal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rest_rl.data.groups import Group, Response
from rest_rl.response import NUM_REGIONS, Region

LEAST_PROMPTS = 3
"""A pair must be left when one is left out."""


class Estimate(NamedTuple):
    """A figure and its standard error over prompts; NaN where it is not defined."""

    value: float
    error: float

    @classmethod
    def of(cls, values_1M: np.ndarray) -> Estimate:
        """From a statistic of all prompts and of all but one: se² = (M-1)/M sum_m (x_-m - mean)² (jackknife)."""
        left_out_M = values_1M[1:]
        count = len(left_out_M)
        spread = float(((left_out_M - left_out_M.mean()) ** 2).sum())
        return cls(float(values_1M[0]), math.sqrt((count - 1) / count * spread))

    def is_above(self, least: float, errors: float) -> bool:
        """Whether it is more than so many errors above `least`; False where it is not defined."""
        return self.value - errors * self.error > least


class GroupTokens(NamedTuple):
    """The sampled tokens of one group, one response after the other."""

    regions_T: np.ndarray
    entropies_T: np.ndarray
    """Nats."""
    collisions_T: np.ndarray
    """1 - sum_v p_v²."""


class TokenFacts(NamedTuple):
    """What the tokens of a region are like."""

    count: int
    share: Estimate
    entropy: Estimate
    """Mean, in nats."""
    entropy_p90: float
    collision: Estimate
    """Mean of 1 - sum_v p_v²."""


class DifferenceFacts(NamedTuple):
    """How a region differs between responses to one prompt."""

    best_worst: Estimate
    """How often the best and the worst response of a group differ in it; groups with spread alone."""
    auc: Estimate
    """Of "the region differs" for "the reward differs", over pairs of a group: 0.5 tells nothing, 1 everything."""


class GradientFacts(NamedTuple):
    """What a region contributes to the gradient."""

    norm_share: Estimate
    """E<g_r, g> / E|g|²: with its share of the overlaps, so that regions add up to 1."""
    signal_share: Estimate
    """<E g_r, t> / <E g, t>, t the gradient of the expected reward; regions add up to 1."""
    snr: Estimate
    """|E g_r|² / E|g_r - E g_r|² of one prompt; of a step of P prompts it is P times as much."""


class RegionFacts(NamedTuple):
    """Everything about one region; a region without a token is left out of a probe."""

    tokens: TokenFacts
    differences: DifferenceFacts
    gradient: GradientFacts


class RuleFacts(NamedTuple):
    """What a weight rule would do in the next step, against uniform weights on the same responses."""

    name: str
    weights: Mapping[str, float]
    """Mean weight of each region's tokens."""
    noise_ratio: Estimate
    """Variance / |mean|² of the gradient of a step; less is not by itself better."""
    cosine: Estimate
    """Of the mean gradient to the gradient of the expected reward."""
    gain: Estimate
    """Expected improvement per step of given length, relative to uniform weights: 0.05 is 5 % more."""
    adam_gain: Estimate
    """The same after Adam's scaling of every parameter by its own root mean square."""


class Sampled(NamedTuple):
    """What was sampled; shares are of responses, that without spread of groups."""

    prompts: int
    group_size: int
    no_spread: float
    exact_match: float
    s_format: float
    s_acc: float
    reward: float
    truncated: float
    mean_tokens: float


@dataclass(frozen=True)
class Probe:
    """All figures of one model, format and set of prompts."""

    format: str
    sampled: Sampled
    regions: Mapping[str, RegionFacts]
    rules: tuple[RuleFacts, ...]
    signal: Estimate
    """<E g, t>: first-order improvement by the unweighted gradient; not above 0, nothing else about gradients holds."""
    snr: Estimate
    """Of the unweighted gradient of one prompt."""
    prompts_per_step: int
    """Of the training step that the rules are judged for."""
    progress: float
    coordinates: int
    """Parameters whose gradients were kept."""
    parameters: int


def token_facts(groups: Sequence[GroupTokens]) -> dict[str, TokenFacts]:
    """Figures of every region that has a token, errors over prompts."""
    counts_MR = np.stack([np.bincount(group.regions_T, minlength=NUM_REGIONS) for group in groups]).astype(float)
    counts_1MR, everything_1M = left_out(counts_MR), left_out(counts_MR.sum(1))
    entropies_1MR = left_out(np.stack([region_sums(group.regions_T, group.entropies_T) for group in groups]))
    collisions_1MR = left_out(np.stack([region_sums(group.regions_T, group.collisions_T) for group in groups]))
    regions_T = np.concatenate([group.regions_T for group in groups])
    entropies_T = np.concatenate([group.entropies_T for group in groups])
    facts = {}
    for region in Region:
        counts_1M = counts_1MR[:, region]
        if not counts_1M[0]:
            continue
        facts[region.label] = TokenFacts(
            int(counts_1M[0]),
            Estimate.of(counts_1M / everything_1M),
            Estimate.of(quotient(entropies_1MR[:, region], counts_1M)),
            float(np.quantile(entropies_T[regions_T == region], 0.9)),
            Estimate.of(quotient(collisions_1MR[:, region], counts_1M)),
        )
    return facts


def difference_facts(groups: Sequence[Group]) -> dict[str, DifferenceFacts]:
    """How telling a difference in each region is about a difference in reward.

    Over all pairs of responses of a group: AUC = 1/2 + (P(region differs | reward differs) - P(region differs | reward
    equal)) / 2, which is the area under the curve of a predictor with two values. NaN if all pairs or none differ in
    reward. A region differs if its sampled ids do.
    """
    return {region.label: region_difference(groups, region) for region in Region}


def region_difference(groups: Sequence[Group], region: Region) -> DifferenceFacts:
    """As `difference_facts`, of one region."""
    rows_M6 = np.array([pair_counts(group.responses, region) for group in groups], dtype=float)
    told_1M, unequal_1M, false_1M, equal_1M, differing_1M, extremes_1M = left_out(rows_M6).T
    hits_1M, alarms_1M = quotient(told_1M, unequal_1M), quotient(false_1M, equal_1M)
    return DifferenceFacts(Estimate.of(quotient(differing_1M, extremes_1M)), Estimate.of(0.5 + (hits_1M - alarms_1M) / 2))


def pair_counts(responses: Sequence[Response], region: Region) -> tuple[float, ...]:
    """(differing, all) pairs of unequal reward, of equal reward, and of a best with a worst response as shares of 1."""
    parts = [tuple(i for i, r in zip(response.ids, response.regions, strict=True) if r == region) for response in responses]
    rewards = [response.reward for response in responses]
    counts = {True: [0, 0], False: [0, 0]}
    for first in range(len(parts)):
        for second in range(first):
            of_kind = counts[rewards[first] != rewards[second]]
            of_kind[0] += parts[first] != parts[second]
            of_kind[1] += 1
    if not counts[True][1]:
        return (0, 0, *counts[False], 0, 0)
    best = [part for part, reward in zip(parts, rewards, strict=True) if reward == max(rewards)]
    worst = [part for part, reward in zip(parts, rewards, strict=True) if reward == min(rewards)]
    differing = sum(one != other for one in best for other in worst) / (len(best) * len(worst))
    return (*counts[True], *counts[False], differing, 1)


def gradient_facts(gram_KMKM: np.ndarray) -> tuple[dict[str, GradientFacts], Estimate, Estimate]:
    """(figures by region, signal, SNR of the whole) from inner products of gradients.

    K = R + 1: the gradients g_r of every region in the order of `Region`, then t, that of the expected reward; M
    prompts each. g = sum_r g_r is the unweighted gradient.
    """
    parts = range(NUM_REGIONS)
    whole_MKM = gram_KMKM[:NUM_REGIONS].sum(0)
    square = Products.of(whole_MKM[:, :NUM_REGIONS].sum(1))
    signal = Products.of(whole_MKM[:, NUM_REGIONS])
    facts = {}
    for region in Region:
        own = Products.of(gram_KMKM[region, :, region])
        overlap = Products.of(gram_KMKM[region][:, list(parts)].sum(1))
        along = Products.of(gram_KMKM[region, :, NUM_REGIONS])
        facts[region.label] = GradientFacts(
            Estimate.of(quotient(overlap.within_1M, square.within_1M)),
            Estimate.of(quotient(along.across_1M, signal.across_1M)),
            Estimate.of(quotient(own.across_1M, own.within_1M - own.across_1M)),
        )
    return facts, Estimate.of(signal.across_1M), Estimate.of(quotient(square.across_1M, square.noise_1M))


class Products(NamedTuple):
    """Mean inner products <a_m, b_n> of two stacks of gradients, a row per prompt."""

    across_1M: np.ndarray
    """Over m != n: unbiased for <E a, E b>."""
    within_1M: np.ndarray
    """Over m = n: unbiased for E<a, b>."""

    @classmethod
    def of(cls, gram_MM: np.ndarray) -> Products:
        """From all products of M prompts, and with each prompt left out."""
        count = len(gram_MM)
        own_M = np.diagonal(gram_MM)
        others = gram_MM.sum() - own_M.sum()
        others_M = others - (gram_MM.sum(0) + gram_MM.sum(1) - 2 * own_M)
        across_1M = np.concatenate([[others / (count * (count - 1))], others_M / ((count - 1) * (count - 2))])
        within_1M = np.concatenate([[own_M.mean()], (own_M.sum() - own_M) / (count - 1)])
        return cls(across_1M, within_1M)

    @property
    def noise_1M(self) -> np.ndarray:
        """E<a, b> - <E a, E b>: the variance of one prompt where a is b."""
        return self.within_1M - self.across_1M

    def square_of_step(self, prompts: int) -> np.ndarray:
        """E|mean of a over `prompts` prompts|²: (1+M,)."""
        return self.across_1M + self.noise_1M / prompts


class RuleProducts(NamedTuple):
    """What `rule_facts` needs of a rule's gradients, a row per prompt."""

    name: str
    weights: Mapping[str, float]
    own_MM: np.ndarray
    """<g, g> over pairs of prompts."""
    true_MM: np.ndarray
    """<g, t>."""
    adam_1J: np.ndarray
    """Improvement per step of Adam, of all prompts and with each of J blocks of them left out."""


def rule_facts(
    rules: Sequence[RuleProducts], true_MM: np.ndarray, prompts_per_step: int
) -> tuple[RuleFacts, ...]:
    """Figures of every rule against the first one, which has uniform weights; `true_MM` are products of t with itself.

    Improvement per step of given length: eff = <E g, t> / sqrt(E|g_step|²), g_step the mean over the prompts of a step.
    """
    length_1M = Products.of(true_MM).across_1M
    efficiencies = [efficiency(rule, prompts_per_step) for rule in rules]
    facts = []
    for rule, efficiency_1M in zip(rules, efficiencies, strict=True):
        own, along = Products.of(rule.own_MM), Products.of(rule.true_MM)
        facts.append(
            RuleFacts(
                rule.name,
                rule.weights,
                Estimate.of(quotient(own.noise_1M / prompts_per_step, own.across_1M)),
                Estimate.of(quotient(along.across_1M, root(own.across_1M * length_1M))),
                Estimate.of(quotient(efficiency_1M, efficiencies[0]) - 1),
                Estimate.of(quotient(rule.adam_1J, rules[0].adam_1J) - 1),
            )
        )
    return tuple(facts)


def efficiency(rule: RuleProducts, prompts_per_step: int) -> np.ndarray:
    """<E g, t> / sqrt(E|g_step|²), times the length of t, which all rules share: (1+M,)."""
    square_1M = Products.of(rule.own_MM).square_of_step(prompts_per_step)
    return quotient(Products.of(rule.true_MM).across_1M, root(square_1M))


def left_out(sums_M: np.ndarray) -> np.ndarray:
    """The sum over prompts, then the sums without each of them: (1+M, ...)."""
    total = sums_M.sum(0, keepdims=True)
    return np.concatenate([total, total - sums_M])


def quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Element by element, NaN where the divisor is 0."""
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, math.nan), where=below != 0)


def root(values: np.ndarray) -> np.ndarray:
    """The square root, NaN of a negative number: noise may leave an unbiased estimate of a square below 0."""
    return np.sqrt(np.where(values >= 0, values, math.nan))


def region_sums(regions_T: np.ndarray, values_T: np.ndarray) -> np.ndarray:
    """Sums by region: float64 (R,)."""
    return np.bincount(regions_T, weights=values_T, minlength=NUM_REGIONS)
