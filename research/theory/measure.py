"""The theory behind ResT, measured on a real model: its lemmas and theorems, and what each weight rule does.

Shapes: M prompts with G responses each, T tokens, N kept coordinates. Two sets of prompts: a pilot (many responses
each) gives region statistics, Lemma 1, Lemma 2, Theorem 1 and Theorem 2; the rules are judged on the other prompts, so
that no weight is judged on what it was made from.
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
"""Parameter entries kept of a larger model, memory permitting."""
Advance = Callable[[], None]


@dataclass(frozen=True)
class TheorySettings:
    """How much is measured."""

    token_responses: int = 8
    """Responses of each pilot prompt, as one group, whose tokens get a gradient each."""
    batch: int = 16
    """Prompts of a training step, for which the rules' figures hold."""
    progress: float = 0.0
    """Where in training the curriculum stands."""
    cap: float = 3.0
    """Norm beyond which a prompt's gradient is scaled down, in medians, for the second set of figures."""
    blocks: int = MAX_BLOCKS
    """Blocks of prompts of the jackknife, a power of two."""
    coordinates: int | None = MAX_COORDINATES
    """Parameter entries kept of a larger model."""
    batch_size: int = 128
    """Responses that share a forward pass."""
    seed: int = 0


class RuleFigures(NamedTuple):
    """What one weight rule does on the same prompts as uniform weights."""

    name: str
    weights: dict[str, float]
    """Mean weight of each region's tokens."""
    plain: GradientFigures
    capped: GradientFigures


class Theory(NamedTuple):
    """Everything measured."""

    group_size: tuple[GroupSizeCurve, ...]
    lemma_two: LemmaTwo
    regions: tuple[RegionTokens, ...]
    contrast: RegionContrast | None
    rank_correlation: float
    """Spearman's, of a token's 1 - exp(-H) with E_y |s_t|²."""
    bounds: dict[str, BoundChain]
    """Theorem 1, by rule; empty where `optimum` is None."""
    closed_form: ClosedFormCheck
    optimum: RegionOptimum | None
    """None where a half of the pilot has too little spread of rewards."""
    rules: tuple[RuleFigures, ...]
    pilot: int
    """Prompts of the pilot."""
    blocks: int
    """Blocks of the judged prompts."""
    live_groups: float
    """Share of the judged groups with any spread of rewards."""
    coordinate_share: float


def measure(
    model: Any,
    pilot: Sequence[SampledGroup],
    groups: Sequence[SampledGroup],
    settings: TheorySettings,
    tokenizer: Any,
    advance: Advance = lambda: None,
) -> Theory:
    """Measure everything; `advance` is called `count_steps` times. Too little spread leaves out Theorem 1 and 2."""
    coordinates = Coordinates.choose(model, settings.coordinates, settings.seed)
    statistics, lemma = measure_pilot(model, pilot)
    prompts = []
    tokens: list[ResponseTokens] = []
    for number, group in enumerate(pilot):
        prompts.append(measure_responses(model, group, coordinates))
        tokens += measure_tokens(model, group, number, settings.token_responses, coordinates)
        advance()
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
    """Whether two prompts of either half of the pilot have rewards that differ."""
    firsts = [group._replace(responses=group.responses[: settings.token_responses]) for group in pilot]
    live = [bool(group.advantages().any()) for group in firsts]
    return min(sum(live[::2]), sum(live[1::2])) >= 2


def count_steps(pilot: int, groups: int) -> int:
    """How often `measure` calls `advance`."""
    return pilot + groups * (1 + -(-len(select_theory_rules()) // RULES_PER_PASS))


def max_coordinates(longest: int, groups: int) -> int:
    """Entries to keep so that the gradients of a response's tokens, or of all groups, stay within `MAX_GRADIENT_BYTES`.

    `longest` is the number of tokens of the longest pilot response.
    """
    return max(1, min(MAX_COORDINATES, MAX_GRADIENT_BYTES // (4 * max(longest, groups * (RULES_PER_PASS + 2)))))


def count_token_passes(pilot: Sequence[SampledGroup], count: int) -> int:
    """Backward passes through a single token's log-probability that the pilot needs: two per token."""
    return 2 * sum(len(response.ids) for group in pilot for response in group.responses[:count])


def select_theory_rules() -> dict[str, WeightConfig]:
    """The rules compared, uniform first: `built_in_rules` with one control, and the published code's constants."""
    every = built_in_rules()
    names = (UNIFORM, "rest", *(f"rest, {rule}" for rule in ENTROPY_RULES), "paper", "inverted", "top_entropy")
    names += (NO_REASONING, SHUFFLED[0])
    found = {name: config for name in names if isinstance(config := every.get(name), WeightConfig)}
    return {**found, AUTHORS_RULE: WeightConfig(rule="constant", constants=dict(AUTHORS_CONSTANTS))}


def build_constant_rule(weights: Mapping[str, float]) -> WeightConfig:
    """Fixed weights by region label; a region that is left out weighs 1."""
    return WeightConfig(rule="constant", constants={region.label: weights.get(region.label, 1.0) for region in Region})


def measure_pilot(model: Any, pilot: Sequence[SampledGroup]) -> tuple[RegionStatistics, LemmaTwo]:
    """Mean entropy and collision mass by region over all pilot tokens, and Lemma 2 on each of them."""
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
    """Inner products of the gradients 1 / T sum_t grad log pi(y_t) of the responses to a prompt."""
    vectors_nN = torch.zeros(len(group.responses), coordinates.size)
    for i, response in enumerate(group.responses):
        if length := len(response.ids):  # one by one: a backward pass through all of them for each would cost n times
            weights_111 = torch.full((1, 1, length), 1 / length)
            vectors_nN[i] = compute_weighted_gradients(
                model, group.prompt_ids, [response.ids], weights_111, coordinates
            )[0]
    rewards_n = np.array([response.reward for response in group.responses])
    return PromptResponses(rewards_n, inner_products(vectors_nN, coordinates))


def measure_tokens(
    model: Any, group: SampledGroup, number: int, count: int, coordinates: Coordinates
) -> list[ResponseTokens]:
    """The tokens of the first `count` responses, which form a group, with the products of their gradients."""
    some = group._replace(responses=group.responses[:count])
    rows = []
    for response, advantage in zip(some.responses, some.advantages().tolist(), strict=True):
        if not (length := len(response.ids)):
            continue
        logps_BT, entropies_BT, collisions_BT = compute_token_statistics(model, group.prompt_ids, [response.ids])
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


def inner_products(vectors_nN: Tensor, coordinates: Coordinates) -> np.ndarray:
    """Inner products of all pairs over the whole model, estimated from the kept coordinates: float64 (n, n)."""
    return coordinates.scale * (vectors_nN @ vectors_nN.T).double().numpy()


def check_theorem_one(
    tokens: Sequence[ResponseTokens],
    rules: Mapping[str, WeightConfig],
    statistics: RegionStatistics,
    settings: TheorySettings,
) -> dict[str, BoundChain]:
    """The bound and its assumptions under the weights of each rule."""
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
    """Tokens whose ids no rule here reads; `top_entropy` takes its threshold from them, as from a batch in training."""
    return TaggedBatch(regions_BT, mask_BT, regions_BT, None, "toolrl", entropies_BT=entropies_BT)


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
    """Every rule on the same groups, uniform weights first; those of a round share a forward pass."""
    sampled = SampledBatch.from_groups(groups, model, tokenizer, "toolrl")
    every, own_BT = sampled.tagged, compute_grpo_weights(groups)
    assert every.entropies_BT is not None
    batches = [
        build_batch(every.regions_BT[rows], every.mask_BT[rows], every.entropies_BT[rows])
        for rows in slice_groups(groups)
    ]

    def vectors(weights_KBT: Tensor) -> Tensor:
        vectors_KMN = compute_gradients(model, sampled, weights_KBT, coordinates, settings.batch_size, advance)
        return vectors_KMN.mul_(math.sqrt(coordinates.scale))

    true_MN, uniform_MN = vectors(torch.stack([compute_region_and_true_weights(groups)[-1], own_BT]))
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
    """What the gradients of all rules are judged by: the true gradient, with norms as they are and capped."""

    true_MN: Tensor
    caps: tuple[None, Tensor]
    settings: TheorySettings

    def series(self, vectors_MN: Tensor) -> list[GradientSeries]:
        """The figures of a rule without and with the cap."""
        own = self.settings
        return [
            compute_gradient_series(vectors_MN, self.true_MN, batch=own.batch, blocks=own.blocks, scales_M=scales_M)
            for scales_M in self.caps
        ]

    def figures(
        self, name: str, weights: dict[str, float], vectors_MN: Tensor, baseline: Sequence[GradientSeries]
    ) -> RuleFigures:
        """The same against uniform weights."""
        plain, capped = (
            GradientFigures.from_series(own, base, largest_share(vectors_MN, scales_M))
            for own, base, scales_M in zip(self.series(vectors_MN), baseline, self.caps, strict=True)
        )
        return RuleFigures(name, weights, plain, capped)
