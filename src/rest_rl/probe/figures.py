"""Statistics of a probe, computed from sampled groups, their tokens and inner products of gradients, without a model.

Shapes: M prompts with a group of responses each, R regions, T sampled tokens, K = R + 1 gradients of a prompt: g_r of
every region in the order of `Region`, then t, the gradient of the expected reward. A leading axis "1+M" contains a
statistic of all prompts, followed by the statistics that leave out one prompt each (`rest_rl.probe.variance`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from rest_rl.probe.report import (
    DifferenceFacts,
    EnvironmentFacts,
    GradientFacts,
    LowEntropyFacts,
    RegionFacts,
    RuleFacts,
    SampledTokens,
    SamplingFacts,
    TokenFacts,
)
from rest_rl.probe.sample import SampledGroup, SampledResponse
from rest_rl.probe.variance import Estimate, GradientSeries, divide_or_nan, leave_one_out_sums, relative_gain
from rest_rl.response import NUM_REGIONS, Region
from rest_rl.train.environment import compute_metrics

REGION_INDICES, TRUE_INDEX = list(Region), [NUM_REGIONS]
"""Positions along the axis of the K gradients."""


class RuleSeries(NamedTuple):
    """A weight rule: its mean weights by region, its extreme region weights, and its effect on one optimizer step."""

    name: str
    weights: Mapping[str, float]
    bounds: tuple[float, float]
    series: GradientSeries


class InnerProducts(NamedTuple):
    """Mean inner products of gradients a_m and b_n of prompts m and n: from all prompts, then without each prompt."""

    across_1M: np.ndarray
    """Mean over m != n: unbiased for <E a, E b>."""
    within_1M: np.ndarray
    """Mean over m = n: unbiased for E<a, b>."""

    # Signal and noise from one Gram matrix: gradients of different prompts are independent, so the mean of their
    # products has no noise term, while the diagonal contains signal plus noise. Leaving out prompt m subtracts row and
    # column m from both sums; all M + 1 statistics cost O(M²).
    @classmethod
    def from_gram(cls, gram_MM: np.ndarray) -> InnerProducts:
        """Compute both means from the inner products <a_m, b_n> of all pairs of M prompts."""
        count = len(gram_MM)
        own_M = np.diagonal(gram_MM)
        others = gram_MM.sum() - own_M.sum()
        others_M = others - (gram_MM.sum(0) + gram_MM.sum(1) - 2 * own_M)
        across_1M = np.concatenate([[others / (count * (count - 1))], others_M / ((count - 1) * (count - 2))])
        within_1M = np.concatenate([[own_M.mean()], (own_M.sum() - own_M) / (count - 1)])
        return cls(across_1M, within_1M)

    @classmethod
    def between(cls, gram_KMKM: np.ndarray, left: Sequence[int], right: Sequence[int]) -> InnerProducts:
        return cls.from_gram(sum_gram_blocks(gram_KMKM, left, right))

    def noise(self) -> np.ndarray:
        """Return E<a, b> - <E a, E b>, the variance of one prompt's gradient if a = b. Shape (1+M,), M prompts."""
        return self.within_1M - self.across_1M


def sum_gram_blocks(gram_KMKM: np.ndarray, left: Sequence[int], right: Sequence[int]) -> np.ndarray:
    return gram_KMKM[left][:, :, right].sum((0, 2))


def compute_region_facts(
    groups: Sequence[SampledGroup], tokens: SampledTokens, gram_KMKM: np.ndarray
) -> tuple[dict[str, RegionFacts], LowEntropyFacts]:
    """Compute the statistics of every region that has tokens, and those of the low-entropy regions taken together.

    A region counts as low-entropy if its mean entropy is below the mean over all tokens.
    """
    by_region = compute_token_facts(tokens)
    regions = {region.label: region for region in Region if region.label in by_region}
    facts = {
        label: RegionFacts(
            by_region[label], compute_difference_facts(groups, region), compute_gradient_facts(gram_KMKM, [region])
        )
        for label, region in regions.items()
    }
    # Measure these regions together: the error of a sum of shares is not the sum of their errors.
    overall = float(np.mean(tokens.entropies_T))
    sure = [region for label, region in regions.items() if by_region[label].entropy.value < overall]
    counts_1MR = leave_one_out_sums(tokens.sums(np.ones_like(tokens.entropies_T)))
    share_1M, signal_1M = (
        divide_or_nan(counts_1MR[:, sure].sum(1), counts_1MR.sum(1)),
        compute_signal_shares(gram_KMKM, sure),
    )
    estimates = (Estimate.from_jackknife(values_1M) for values_1M in (share_1M, signal_1M, signal_1M - share_1M))
    return facts, LowEntropyFacts(tuple(region.label for region in sure), *estimates)


def compute_token_facts(tokens: SampledTokens) -> dict[str, TokenFacts]:
    counts_1MR, entropies_1MR, collisions_1MR = (
        leave_one_out_sums(tokens.sums(values_T))
        for values_T in (np.ones_like(tokens.entropies_T), tokens.entropies_T, tokens.collisions_T)
    )
    facts = {}
    for region in Region:
        counts_1M = counts_1MR[:, region]
        if counts_1M[0]:
            facts[region.label] = TokenFacts(
                int(counts_1M[0]),
                Estimate.from_jackknife(counts_1M / counts_1MR.sum(1)),
                Estimate.from_jackknife(divide_or_nan(entropies_1MR[:, region], counts_1M)),
                float(np.quantile(tokens.entropies_T[tokens.regions_T == region], 0.9)),
                Estimate.from_jackknife(divide_or_nan(collisions_1MR[:, region], counts_1M)),
            )
    return facts


def compute_difference_facts(groups: Sequence[SampledGroup], region: Region) -> DifferenceFacts:
    """Measure how well a difference between two responses in a region predicts a difference in their rewards.

    Two responses of a group differ in a region if their token ids there differ. The result is NaN if no pair differs in
    reward; `auc` is also NaN if all pairs do.
    """
    # The predictor has two values, so its ROC curve has one corner and the area is
    # AUC = 1/2 + (hit rate - false alarm rate) / 2, with
    # hit rate = P(region differs | rewards differ), false alarm rate = P(region differs | rewards equal).
    rows_M6 = np.array([count_pairs(group.responses, region) for group in groups], dtype=float)
    hits_1M, unequal_1M, alarms_1M, equal_1M, differing_1M, extremes_1M = leave_one_out_sums(rows_M6).T
    hit_rate_1M, alarm_rate_1M = divide_or_nan(hits_1M, unequal_1M), divide_or_nan(alarms_1M, equal_1M)
    return DifferenceFacts(
        Estimate.from_jackknife(divide_or_nan(differing_1M, extremes_1M)),
        Estimate.from_jackknife(0.5 + (hit_rate_1M - alarm_rate_1M) / 2),
    )


def count_pairs(responses: Sequence[SampledResponse], region: Region) -> tuple[float, ...]:
    # Returns six numbers: differing and all pairs of unequal reward, the same for equal reward, then the share of
    # differing pairs of a best and a worst response, and 1: the last two count a group once, whatever its ties.
    responses = [response for response in responses if not math.isnan(response.reward)]
    tokens = [zip(response.ids, response.regions, response.sampled, strict=True) for response in responses]
    parts = [tuple(i for i, r, is_own in own if is_own and r == region) for own in tokens]
    rewards = [response.reward for response in responses]
    counts = {True: [0, 0], False: [0, 0]}
    for (part, reward), (other_part, other_reward) in combinations(zip(parts, rewards, strict=True), 2):
        count = counts[reward != other_reward]
        count[0] += part != other_part
        count[1] += 1
    if not counts[True][1]:
        return (0, 0, *counts[False], 0, 0)
    best, worst = (
        [part for part, reward in zip(parts, rewards, strict=True) if reward == extreme]
        for extreme in (max(rewards), min(rewards))
    )
    differing = sum(good != bad for good in best for bad in worst) / (len(best) * len(worst))
    return (*counts[True], *counts[False], differing, 1)


def compute_gradient_facts(gram_KMKM: np.ndarray, regions: Sequence[Region]) -> GradientFacts:
    # With g = sum_r g_r: E|g|² = sum_r E<g_r, g>, so each region's share of the squared norm includes its overlaps and
    # the shares of all regions add up to 1. The signal <E g, t> decomposes in the same way.
    own, overlap, square = (
        InnerProducts.between(gram_KMKM, *pair)
        for pair in ((regions, regions), (regions, REGION_INDICES), (REGION_INDICES, REGION_INDICES))
    )
    norm_1M = divide_or_nan(overlap.within_1M, square.within_1M)
    signal_1M = compute_signal_shares(gram_KMKM, regions)
    return GradientFacts(
        norm_share=Estimate.from_jackknife(norm_1M),
        signal_share=Estimate.from_jackknife(signal_1M),
        surplus=Estimate.from_jackknife(norm_1M - signal_1M),
        snr=Estimate.from_jackknife(divide_or_nan(own.across_1M, own.noise())),
    )


def compute_signal_shares(gram_KMKM: np.ndarray, regions: Sequence[Region]) -> np.ndarray:
    """Return the share of `regions` in <mean gradient, true gradient>, with and without each prompt. Shape (1+M,)."""
    along, signal = (InnerProducts.between(gram_KMKM, part, TRUE_INDEX) for part in (regions, REGION_INDICES))
    return divide_or_nan(along.across_1M, signal.across_1M)


def measure_signal(gram_KMKM: np.ndarray) -> tuple[Estimate, Estimate, float]:
    """Return statistics of the unweighted gradient, as `ProbeReport` defines them: `signal`, `snr`, `heaviest`."""
    whole_MM = sum_gram_blocks(gram_KMKM, REGION_INDICES, REGION_INDICES)
    square, along = InnerProducts.from_gram(whole_MM), InnerProducts.between(gram_KMKM, REGION_INDICES, TRUE_INDEX)
    squares_M = np.diagonal(whole_MM)
    heaviest = float(squares_M.max() / squares_M.sum()) if squares_M.any() else 0.0
    return (
        Estimate.from_jackknife(along.across_1M),
        Estimate.from_jackknife(divide_or_nan(square.across_1M, square.noise())),
        heaviest,
    )


def compute_rule_facts(rules: Sequence[RuleSeries], shuffled: Sequence[str]) -> tuple[RuleFacts, ...]:
    """Compare every rule with the first, which must be uniform, and with the mean of the rules named in `shuffled`."""
    base = rules[0].series
    gains = [relative_gain(rule.series.adam_1K, base.adam_1K) for rule in rules]
    control_1K = np.mean([own for own, rule in zip(gains, rules, strict=True) if rule.name in shuffled], axis=0)
    return tuple(
        RuleFacts(
            rule.name,
            rule.weights,
            rule.bounds,
            noise_ratio=Estimate.from_jackknife(rule.series.noise_ratio),
            cosine=Estimate.from_jackknife(rule.series.cosine_1K),
            gain=Estimate.from_jackknife(relative_gain(rule.series.progress_1K, base.progress_1K)),
            adam_gain=Estimate.from_jackknife(gain_1K),
            adam_over_shuffled=Estimate.from_jackknife(gain_1K - control_1K),
        )
        for rule, gain_1K in zip(rules, gains, strict=True)
    )


def summarize_samples(groups: Sequence[SampledGroup], eos_ids: Collection[int]) -> SamplingFacts:
    """Average the scores and lengths of all responses; one that does not end with one of `eos_ids` was truncated.

    Unscored responses are left out of the mean reward.
    """
    no_spread = float(np.mean([not group.has_spread for group in groups]))
    rows = [
        (r.is_exact, r.s_format, r.s_acc, r.reward, r.is_truncated(eos_ids), sum(r.sampled))
        for group in groups
        for r in group.responses
    ]
    means = (float(np.nanmean(column)) for column in zip(*rows, strict=True))
    return SamplingFacts(len(groups), len(groups[0].responses), no_spread, *means)


def summarize_rollouts(groups: Sequence[SampledGroup], name: str, credit: str) -> EnvironmentFacts | None:
    """Average over all rollouts in the environment `name`, as training logs it; None for single responses."""
    rollouts = [r.rollout for group in groups for r in group.responses if r.rollout is not None]
    if not rollouts:
        return None
    metrics = compute_metrics(rollouts)
    names = ("env/success", "env/turns", "env/calls", "rest/call_rate", "env/stop/turn limit", "env/stop/failed")
    return EnvironmentFacts(name, credit, *(metrics.get(each, 0.0) for each in names))
