"""Test the theory behind ResT on a real model: its lemmas and theorems, and the effect of each weight rule.

Shapes: M prompts with G responses each, T tokens, N kept coordinates. There are two sets of prompts: a pilot with many
responses each gives region statistics, Lemmas 1 and 2, and Theorems 1 and 2. The rules are judged on the other prompts,
so that no weight is judged on the data it was computed from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from research.theory.estimates import GradientFigures, largest_share
from research.theory.expected_squares import expected_squares
from research.theory.group_size import GroupSizeCurve, PromptResponses, measure_group_size_curves
from research.theory.optimal_weights import ClosedFormCheck, RegionOptimum, check_closed_form, find_region_optimum
from research.theory.token_bounds import (
    BoundChain,
    LemmaTwo,
    RegionContrast,
    RegionTokens,
    ResponseTokens,
    check_lemma_two,
    contrast_regions,
    measure_bound_chain,
    rank_correlation,
    summarize_regions,
)
from rest_rl.probe.gradients import Coordinates, compute_token_statistics, compute_weighted_gradients, pad_responses
from rest_rl.probe.measure import (
    MAX_GRADIENT_BYTES,
    RULES_PER_PASS,
    SampledBatch,
    batch_names,
    compute_gradients,
    compute_grpo_weights,
    compute_region_and_true_weights,
    slice_groups,
)
from rest_rl.probe.rules import ENTROPY_RULES, NO_REASONING, SHUFFLED, UNIFORM, built_in_rules
from rest_rl.probe.sample import SampledGroup
from rest_rl.probe.variance import MAX_BLOCKS, GradientSeries, compute_gradient_series, compute_norm_scales
from rest_rl.regions import region_sums
from rest_rl.response import Region
from rest_rl.weights import AUTHORS_CONSTANTS, RegionStatistics, TaggedBatch, WeightConfig, apply_weight_rule

THEOREM_RULE, AUTHORS_RULE = "Theorem 2", "authors' constants"
MAX_COORDINATES = 2**20
"""Parameter entries to keep of a larger model, if memory allows."""
Advance = Callable[[], None]


@dataclass(frozen=True)
class TheorySettings:
    """Sizes and settings of the measurement."""

    token_responses: int = 8
    """Responses per pilot prompt, as one group, for which every token's gradient is computed."""
    batch: int = 16
    """Prompts of the training step to predict."""
    progress: float = 0.0
    """Training progress at which the curriculum is evaluated."""
    cap: float = 3.0
    """Limit for the norm of a prompt's gradient in the capped figures, as a multiple of the median."""
    blocks: int = MAX_BLOCKS
    """Jackknife blocks of prompts, a power of two."""
    coordinates: int | None = MAX_COORDINATES
    """Parameter entries to keep of a larger model."""
    batch_size: int = 128
    """Responses per forward pass."""
    seed: int = 0


class RuleFigures(NamedTuple):
    """Results of one weight rule, measured on the same prompts as uniform weights."""

    name: str
    weights: dict[str, float]
    """Mean weight of each region's tokens."""
    plain: GradientFigures
    capped: GradientFigures


class Theory(NamedTuple):
    """All results of the theory checks."""

    group_size: tuple[GroupSizeCurve, ...]
    lemma_two: LemmaTwo
    regions: tuple[RegionTokens, ...]
    contrast: RegionContrast | None
    rank_correlation: float
    """Spearman's correlation between 1 - exp(-H) and E_y |s_t|² over tokens."""
    bounds: dict[str, BoundChain]
    """Theorem 1 by rule; empty if `optimum` is None."""
    closed_form: ClosedFormCheck
    optimum: RegionOptimum | None
    """None if the rewards in a half of the pilot have too little spread."""
    rules: tuple[RuleFigures, ...]
    pilot: int
    """Number of pilot prompts."""
    blocks: int
    """Jackknife blocks of the judged prompts."""
    live_groups: float
    """Share of the judged groups whose rewards differ."""
    coordinate_share: float


def measure(
    model: Any,
    pilot: Sequence[SampledGroup],
    groups: Sequence[SampledGroup],
    settings: TheorySettings,
    tokenizer: Any,
    advance: Advance = lambda: None,
) -> Theory:
    """Run all theory checks on the pilot, judge the rules on `groups`, and call `advance` `count_steps(...)` times.

    Theorem 1 and the region optimum of Theorem 2 are left out if the pilot's rewards have too little spread.
    """
    coordinates = Coordinates.choose(model, settings.coordinates, settings.seed)
    # Region statistics come from the pilot, because the rules must not see the prompts that they are judged on.
    statistics, lemma = measure_pilot(model, pilot)
    prompts = []
    tokens: list[ResponseTokens] = []
    for number, group in enumerate(pilot):
        prompts.append(measure_responses(model, group, coordinates))
        tokens += measure_tokens(model, group, number, settings.token_responses, coordinates)
        advance()
    # The optimum of the pilot becomes one more rule, judged like the others on prompts it has not seen.
    optimum = find_region_optimum(tokens)
    rules = select_theory_rules()
    if optimum is not None:
        rules[THEOREM_RULE] = build_constant_rule(optimum.weights["closed form"])
    figures = judge_rules(model, groups, rules, statistics, coordinates, settings, tokenizer, advance)
    regions = summarize_regions(tokens)
    return Theory(
        group_size=tuple(measure_group_size_curves(prompts, seed=settings.seed)),
        lemma_two=lemma,
        regions=tuple(regions),
        contrast=contrast_regions(tokens, regions),
        rank_correlation=rank_correlation(tokens),
        bounds={} if optimum is None else check_theorem_one(tokens, rules, statistics, settings),
        closed_form=check_closed_form(tokens),
        optimum=optimum,
        rules=tuple(figures),
        pilot=len(pilot),
        blocks=settings.blocks,
        live_groups=float(np.mean([bool(group.advantages().any()) for group in groups])),
        coordinate_share=1 / coordinates.scale,
    )


def has_spread(pilot: Sequence[SampledGroup], settings: TheorySettings) -> bool:
    """Return whether each half of the pilot has at least two prompts with unequal rewards."""
    # Halves by position, as in `MomentTable`; only the responses whose tokens are measured count.
    firsts = [group._replace(responses=group.responses[: settings.token_responses]) for group in pilot]
    live = [bool(group.advantages().any()) for group in firsts]
    return min(sum(live[::2]), sum(live[1::2])) >= 2


def count_steps(pilot: int, groups: int) -> int:
    """Return how often `measure` calls `advance` for these numbers of pilot and other groups."""
    return pilot + groups * (1 + -(-len(select_theory_rules()) // RULES_PER_PASS))


def max_coordinates(longest: int, groups: int) -> int:
    """Return how many entries of each gradient to keep so that all gradients fit in `MAX_GRADIENT_BYTES`.

    `longest` is the number of tokens of the longest pilot response.
    """
    # Two peaks, 4 bytes an entry: one vector per token of a response, or one per group for each rule of a round.
    return max(1, min(MAX_COORDINATES, MAX_GRADIENT_BYTES // (4 * max(longest, groups * (RULES_PER_PASS + 2)))))


def count_token_passes(pilot: Sequence[SampledGroup], count: int) -> int:
    """Return the number of backward passes for single tokens of the first `count` responses per prompt: two each."""
    return 2 * sum(len(response.ids) for group in pilot for response in group.responses[:count])


def select_theory_rules() -> dict[str, WeightConfig]:
    """Return the weight rules to compare: uniform, built-in rules, one shuffled control, the authors' constants."""
    every = built_in_rules()
    names = (UNIFORM, "rest", "rest_live", *(f"rest_live, {rule}" for rule in ENTROPY_RULES), "inverted", "top_entropy")
    names += (NO_REASONING, SHUFFLED[0])
    found = {name: config for name in names if isinstance(config := every.get(name), WeightConfig)}
    return {**found, AUTHORS_RULE: WeightConfig(rule="constant", constants=dict(AUTHORS_CONSTANTS))}


def build_constant_rule(weights: Mapping[str, float]) -> WeightConfig:
    return WeightConfig(rule="constant", constants={region.label: weights.get(region.label, 1.0) for region in Region})


def measure_pilot(model: Any, pilot: Sequence[SampledGroup]) -> tuple[RegionStatistics, LemmaTwo]:
    """Return mean entropy and collision mass of all pilot tokens by region, and the check of Lemma 2 on them."""
    sums = [torch.zeros(len(Region), dtype=torch.float64) for _ in range(3)]
    rows = []
    for group in pilot:
        found = compute_token_statistics(model, group.prompt_ids, [one.ids for one in group.responses])
        regions_BT, mask_BT = pad_responses([one.regions for one in group.responses], Region.OTHER)
        for at, values_BT in ((0, found.entropies_BT), (1, found.collisions_BT)):
            sums_R, counts_R = region_sums(values_BT, regions_BT, mask_BT)
            sums[at] += sums_R
        sums[2] += counts_R
        rows.append(torch.stack([values_BT[mask_BT] for values_BT in found]))
    logps_S, entropies_S, collisions_S = torch.cat(rows, dim=1).numpy()
    statistics = RegionStatistics(sums[2], sums[0] / sums[2], sums[1] / sums[2])
    return statistics, check_lemma_two(logps_S, entropies_S, collisions_S)


def measure_responses(model: Any, group: SampledGroup, coordinates: Coordinates) -> PromptResponses:
    """Return the rewards of a prompt's responses, and inner products of the gradients of their mean log-probability."""
    vectors_nN = torch.zeros(len(group.responses), coordinates.size)
    for i, response in enumerate(group.responses):
        # One forward pass per response: in a shared one, each of the n backward passes would cross all n responses.
        if length := len(response.ids):
            weights_111 = torch.full((1, 1, length), 1 / length)
            vectors_nN[i] = compute_weighted_gradients(
                model, group.prompt_ids, [response.ids], weights_111, coordinates
            )[0]
    rewards_n = np.array([response.reward for response in group.responses])
    return PromptResponses(rewards_n, inner_products(vectors_nN, coordinates))


def measure_tokens(
    model: Any, group: SampledGroup, number: int, count: int, coordinates: Coordinates
) -> list[ResponseTokens]:
    """Measure the tokens of the first `count` responses, which form a group, and the products of their gradients."""
    some = group._replace(responses=group.responses[:count])
    rows = []
    for response, advantage in zip(some.responses, some.advantages().tolist(), strict=True):
        if not (length := len(response.ids)):
            continue
        logps_BT, entropies_BT, collisions_BT = compute_token_statistics(model, group.prompt_ids, [response.ids])
        # T weightings that select one token each: T gradients from one forward pass.
        each_T1T = torch.eye(length)[:, None]
        vectors_TN = compute_weighted_gradients(model, group.prompt_ids, [response.ids], each_T1T, coordinates)
        expected_T = expected_squares(
            model, group.prompt_ids, response.ids, coordinates, seed=number * count + len(rows)
        )
        rows.append(
            ResponseTokens(
                number,
                advantage,
                np.array(response.regions),
                logps_BT[0].numpy(),
                entropies_BT[0].numpy(),
                collisions_BT[0].numpy(),
                expected_T.numpy(),
                inner_products(vectors_TN, coordinates),
            )
        )
    return rows


# Return the inner products of all pairs, scaled from the kept coordinates to the whole model: float64 (n, n).
def inner_products(vectors_nN: Tensor, coordinates: Coordinates) -> np.ndarray:
    return coordinates.scale * (vectors_nN @ vectors_nN.T).double().numpy()


# Check the bound and each of its assumptions under the weights of each rule.
def check_theorem_one(
    tokens: Sequence[ResponseTokens],
    rules: Mapping[str, WeightConfig],
    statistics: RegionStatistics,
    settings: TheorySettings,
) -> dict[str, BoundChain]:
    batches = []
    for one in tokens:
        regions_1T, entropies_1T = (torch.from_numpy(values_T)[None] for values_T in (one.regions_T, one.entropies_T))
        batches.append(build_batch(regions_1T, torch.ones_like(regions_1T), entropies_1T))
    return {
        name: measure_bound_chain(
            tokens,
            [apply_weight_rule(rule, batch, statistics, settings.progress)[0].double().numpy() for batch in batches],
            settings.token_responses,
        )
        for name, rule in rules.items()
    }


def build_batch(regions_BT: Tensor, mask_BT: Tensor, entropies_BT: Tensor) -> TaggedBatch:
    # The rules used here read no token ids. `top_entropy` takes its threshold from these tokens, as from a batch of
    # training.
    return TaggedBatch(regions_BT, mask_BT, regions_BT, None, "toolrl", entropies_BT=entropies_BT)


# Yield the figures of every rule on the same groups, uniform weights first.
def judge_rules(
    model: Any,
    groups: Sequence[SampledGroup],
    rules: Mapping[str, WeightConfig],
    statistics: RegionStatistics,
    coordinates: Coordinates,
    settings: TheorySettings,
    tokenizer: Any,
    advance: Advance,
) -> Iterator[RuleFigures]:
    sampled = SampledBatch.from_groups(groups, model, tokenizer, "toolrl")
    every, own_BT = sampled.tagged, compute_grpo_weights(groups)
    assert every.entropies_BT is not None
    batches = [
        build_batch(every.regions_BT[rows], every.mask_BT[rows], every.entropies_BT[rows])
        for rows in slice_groups(groups)
    ]

    # Scaled once by the root, every inner product below estimates that of the whole model, |t| included.
    def vectors(weights_KBT: Tensor) -> Tensor:
        vectors_KMN = compute_gradients(model, sampled, weights_KBT, coordinates, settings.batch_size, advance)
        return vectors_KMN.mul_(math.sqrt(coordinates.scale))

    true_MN, uniform_MN = vectors(torch.stack([compute_region_and_true_weights(groups)[-1], own_BT]))
    # The caps come from uniform weights and apply to all rules: a separate cap would hide what a rule does to norms.
    judge = RuleJudge(true_MN, (None, compute_norm_scales(uniform_MN, settings.cap)), settings)
    baseline = judge.series(uniform_MN)
    yield judge.figures(UNIFORM, sampled.mean_weights(torch.ones_like(own_BT)), uniform_MN, baseline)
    for names in batch_names([name for name in rules if name != UNIFORM]):
        weights_KBT = torch.stack(
            [
                torch.cat([apply_weight_rule(rules[name], batch, statistics, settings.progress) for batch in batches])
                for name in names
            ]
        )
        for name, weights_BT, vectors_MN in zip(names, weights_KBT, vectors(weights_KBT * own_BT), strict=True):
            yield judge.figures(name, sampled.mean_weights(weights_BT), vectors_MN, baseline)


class RuleJudge(NamedTuple):
    """Compares the gradients of every rule with the true gradient, without and with a cap on each prompt's norm."""

    true_MN: Tensor
    caps: tuple[None, Tensor]
    settings: TheorySettings

    def series(self, vectors_MN: Tensor) -> list[GradientSeries]:
        own = self.settings
        return [
            compute_gradient_series(vectors_MN, self.true_MN, batch=own.batch, blocks=own.blocks, scales_M=scales_M)
            for scales_M in self.caps
        ]

    def figures(
        self, name: str, weights: dict[str, float], vectors_MN: Tensor, baseline: Sequence[GradientSeries]
    ) -> RuleFigures:
        plain, capped = (
            GradientFigures.from_series(own, base, largest_share(vectors_MN, scales_M))
            for own, base, scales_M in zip(self.series(vectors_MN), baseline, self.caps, strict=True)
        )
        return RuleFigures(name, weights, plain, capped)
