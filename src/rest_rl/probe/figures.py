"""Where the reward signal of a model lies: figures per region and per weight rule from sampled groups, no training.

Shapes: M prompts with a group of responses each, R regions, T sampled tokens. A leading axis "1+M" holds a statistic of
all prompts and then that with each prompt left out (`rest_rl.probe.variance`). Products of gradients are averaged
over pairs of different prompts, so that no sample's noise is taken for signal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rest_rl.probe.sample import Group, Response
from rest_rl.probe.variance import Estimate, GradientSeries, gain, left_out, quotient
from rest_rl.response import NUM_REGIONS, Region

LEAST_PROMPTS = 8
"""Fewer leave no pairs to speak of when some are left out."""


class GroupTokens(NamedTuple):
    """The sampled tokens of one group, one response after the other."""

    regions_T: np.ndarray
    entropies_T: np.ndarray
    """Nats."""
    collisions_T: np.ndarray
    """1 - sum_v p_v²."""


class TokenFacts(NamedTuple):
    """What the tokens of a region are like."""

    number: int
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
    surplus: Estimate
    """norm_share - signal_share: above 0 where there is more noise than signal."""
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
    bounds: tuple[float, float]
    """Least and greatest region weight before it is normalised; NaN for a rule that has none."""
    noise_ratio: Estimate
    """Variance / |mean|² of the gradient of a step; less is not by itself better."""
    cosine: Estimate
    """Of the mean gradient to the gradient of the expected reward."""
    gain: Estimate
    """Expected improvement per step of given length, relative to uniform weights: 0.05 is 5 % more."""
    adam_gain: Estimate
    """The same after Adam's scaling of every parameter by its own root mean square."""
    adam_over_shuffled: Estimate
    """How far `adam_gain` is above the mean of the rules with shuffled weights."""


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


class SureTokens(NamedTuple):
    """The regions whose mean entropy is below that of all tokens, taken together."""

    regions: tuple[str, ...]
    share: Estimate
    """Of the tokens."""
    signal_share: Estimate
    surplus: Estimate
    """signal_share - share"""


@dataclass(frozen=True)
class Probe:
    """All figures of one model, format and set of prompts."""

    format: str
    sampled: Sampled
    regions: Mapping[str, RegionFacts]
    rules: tuple[RuleFacts, ...]
    sure: SureTokens
    signal: Estimate
    """<E g, t>: first-order improvement by the unweighted gradient; shares of it mean nothing unless it is above 0."""
    snr: Estimate
    """Of the unweighted gradient of one prompt."""
    heaviest: float
    """Share of the most extreme prompt in the sum of |g|²."""
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


def region_difference(groups: Sequence[Group], region: Region) -> DifferenceFacts:
    """How telling a difference in a region is about a difference in reward.

    Over all pairs of responses of a group: AUC = 1/2 + (P(region differs | reward differs) - P(region differs | reward
    equal)) / 2, which is the area under the curve of a predictor with two values. NaN if all pairs or none differ in
    reward. A region differs if its sampled ids do.
    """
    rows_M6 = np.array([pair_counts(group.responses, region) for group in groups], dtype=float)
    told_1M, unequal_1M, false_1M, equal_1M, differing_1M, extremes_1M = left_out(rows_M6).T
    hits_1M, alarms_1M = quotient(told_1M, unequal_1M), quotient(false_1M, equal_1M)
    return DifferenceFacts(
        Estimate.of(quotient(differing_1M, extremes_1M)), Estimate.of(0.5 + (hits_1M - alarms_1M) / 2)
    )


def pair_counts(responses: Sequence[Response], region: Region) -> tuple[float, ...]:
    """(differing, all) pairs of unequal reward, of equal reward, and of a best with a worst response as shares of 1."""
    parts = [
        tuple(i for i, r in zip(response.ids, response.regions, strict=True) if r == region) for response in responses
    ]
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


class RegionSeries(NamedTuple):
    """The gradient's figures of some regions together, see `GradientFacts`."""

    norm_share_1M: np.ndarray
    signal_share_1M: np.ndarray
    snr_1M: np.ndarray

    @classmethod
    def of(cls, gram_KMKM: np.ndarray, regions: Sequence[Region]) -> RegionSeries:
        """From inner products of gradients.

        K = R + 1: the gradients g_r of every region in the order of `Region`, then t, that of the expected reward; M
        prompts each. g = sum_r g_r is the unweighted gradient.
        """
        every, some = list(Region), list(regions)
        own = Products.of(summed(gram_KMKM, some, some))
        overlap, square = Products.of(summed(gram_KMKM, some, every)), Products.of(summed(gram_KMKM, every, every))
        along, signal = (Products.of(summed(gram_KMKM, part, [NUM_REGIONS])) for part in (some, every))
        return cls(
            quotient(overlap.within_1M, square.within_1M),
            quotient(along.across_1M, signal.across_1M),
            quotient(own.across_1M, own.noise()),
        )


def gradient_facts(gram_KMKM: np.ndarray, regions: Sequence[Region]) -> GradientFacts:
    """Figures of some regions together, from inner products of gradients (`RegionSeries.of`)."""
    own = RegionSeries.of(gram_KMKM, regions)
    return GradientFacts(
        norm_share=Estimate.of(own.norm_share_1M),
        signal_share=Estimate.of(own.signal_share_1M),
        surplus=Estimate.of(own.norm_share_1M - own.signal_share_1M),
        snr=Estimate.of(own.snr_1M),
    )


def summed(gram_KMKM: np.ndarray, left: Sequence[int], right: Sequence[int]) -> np.ndarray:
    """Products of one sum of gradients with another: (M, M)."""
    return gram_KMKM[left][:, :, right].sum((0, 2))


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

    def noise(self) -> np.ndarray:
        """E<a, b> - <E a, E b>, the variance of one prompt where a is b: (1+M,)."""
        return self.within_1M - self.across_1M


class RuleSeries(NamedTuple):
    """A rule, its weights, and its figures of a step."""

    name: str
    weights: Mapping[str, float]
    bounds: tuple[float, float]
    series: GradientSeries


def rule_facts(rules: Sequence[RuleSeries], shuffled: Sequence[str]) -> tuple[RuleFacts, ...]:
    """Figures of every rule against the first one, which has uniform weights, and the mean of the shuffled ones."""
    base = rules[0].series
    gains = [gain(rule.series.adam_1K, base.adam_1K) for rule in rules]
    control_1K = np.mean([own for own, rule in zip(gains, rules, strict=True) if rule.name in shuffled], axis=0)
    return tuple(
        RuleFacts(
            rule.name,
            rule.weights,
            rule.bounds,
            noise_ratio=Estimate.of(rule.series.noise_ratio),
            cosine=Estimate.of(rule.series.cosine_1K),
            gain=Estimate.of(gain(rule.series.progress_1K, base.progress_1K)),
            adam_gain=Estimate.of(gain_1K),
            adam_over_shuffled=Estimate.of(gain_1K - control_1K),
        )
        for rule, gain_1K in zip(rules, gains, strict=True)
    )


def region_sums(regions_T: np.ndarray, values_T: np.ndarray) -> np.ndarray:
    """Sums by region: float64 (R,)."""
    return np.bincount(regions_T, weights=values_T, minlength=NUM_REGIONS)


def sampled_facts(groups: Sequence[Group], ends: Collection[int]) -> Sampled:
    """Scores and lengths; a response whose last token is none of `ends` was cut off."""
    responses = [response for group in groups for response in group.responses]
    rewards = [{response.reward for response in group.responses} for group in groups]
    return Sampled(
        prompts=len(groups),
        group_size=len(groups[0].responses),
        no_spread=mean(len(values) == 1 for values in rewards),
        exact_match=mean(response.is_exact for response in responses),
        s_format=mean(response.s_format for response in responses),
        s_acc=mean(response.s_acc for response in responses),
        reward=mean(response.reward for response in responses),
        truncated=mean(not response.ids or response.ids[-1] not in ends for response in responses),
        mean_tokens=mean(len(response.ids) for response in responses),
    )


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    return float(np.mean(list(values)))


def region_facts(
    groups: Sequence[Group], tokens: Sequence[GroupTokens], gram_KMKM: np.ndarray
) -> tuple[dict[str, RegionFacts], SureTokens]:
    """Figures of every region that has tokens, and of those that are surer than all tokens together."""
    seen = token_facts(tokens)
    regions = {region.label: region for region in Region if region.label in seen}
    facts = {
        label: RegionFacts(seen[label], region_difference(groups, region), gradient_facts(gram_KMKM, [region]))
        for label, region in regions.items()
    }
    overall = mean(np.concatenate([group.entropies_T for group in tokens]))
    sure = [region for label, region in regions.items() if seen[label].entropy.value < overall]
    shares_1M = left_out(np.stack([[np.isin(group.regions_T, sure).sum(), len(group.regions_T)] for group in tokens]))
    share_1M, signal_1M = quotient(shares_1M[:, 0], shares_1M[:, 1]), RegionSeries.of(gram_KMKM, sure).signal_share_1M
    estimates = (Estimate.of(values_1M) for values_1M in (share_1M, signal_1M, signal_1M - share_1M))
    return facts, SureTokens(tuple(region.label for region in sure), *estimates)


def signal_and_noise(gram_KMKM: np.ndarray) -> tuple[Estimate, Estimate, float]:
    """(signal <E g, t>, SNR of one prompt, share of the heaviest prompt in |g|²) of the unweighted gradient."""
    every = list(Region)
    whole_MM = summed(gram_KMKM, every, every)
    square, along = Products.of(whole_MM), Products.of(summed(gram_KMKM, every, [NUM_REGIONS]))
    squares_M = np.diagonal(whole_MM)
    heaviest = float(squares_M.max() / squares_M.sum()) if squares_M.any() else 0.0
    return Estimate.of(along.across_1M), Estimate.of(quotient(square.across_1M, square.noise())), heaviest
