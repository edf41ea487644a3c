"""Measurements of a probe that need the model: token statistics, and gradients by region and by weight rule.

Shapes: M prompts, G responses each, B = M G of all prompts, T tokens of the longest, R regions, K weightings, N kept
coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rest_rl.authors_code import authors_step
from rest_rl.probe.figures import RuleSeries
from rest_rl.probe.gradients import Coordinates, compute_token_statistics, compute_weighted_gradients, pad_responses
from rest_rl.probe.report import SampledTokens
from rest_rl.probe.rules import UNIFORM
from rest_rl.probe.sample import SampledGroup, SampledResponse
from rest_rl.probe.variance import choose_num_blocks, compute_gradient_series, compute_norm_scales
from rest_rl.regions import region_means, region_sums
from rest_rl.response import NUM_REGIONS, Region
from rest_rl.weights import RegionStatistics, TaggedBatch, WeightRule, apply_weight_rule, get_region_weights

RULES_PER_PASS = 7
"""Rules that share a forward pass and whose gradients are in memory at the same time."""
MAX_GRADIENT_BYTES = 2**31
"""Limit for the gradients in memory; a larger model keeps a random subset of its coordinates."""
CHUNK_SIZE = 2**16
Advance = Callable[[], None]


@dataclass(frozen=True)
class SampledBatch:
    """All sampled groups in one batch, in the form that a weight rule reads."""

    groups: Sequence[SampledGroup]
    tagged: TaggedBatch
    collisions_BT: Tensor

    @classmethod
    def from_groups(
        cls,
        groups: Sequence[SampledGroup],
        model: Any,
        tokenizer: Any,
        tool_format: str,
        progress: float = 0.0,
        advance: Advance = lambda: None,
    ) -> SampledBatch:
        """Build the batch. One forward pass per group gives the entropy and 1 - sum_v p_v² of every token."""
        responses = [response for group in groups for response in group.responses]
        ids_BT, _ = pad_responses([response.ids for response in responses], tokenizer.pad_token_id)
        mask_BT = pad_sampled_masks(responses)
        regions_BT, _ = pad_responses([response.regions for response in responses], Region.OTHER)
        entropies_BT, collisions_BT = torch.zeros(2, *ids_BT.shape, dtype=torch.float64)
        for rows, group in zip(slice_groups(groups), groups, strict=True):
            found = compute_token_statistics(model, group.prompt_ids, [response.ids for response in group.responses])
            width = found.entropies_BT.shape[1]
            entropies_BT[rows, :width], collisions_BT[rows, :width] = found.entropies_BT, found.collisions_BT
            advance()
        step = authors_step(progress)
        return cls(
            groups, TaggedBatch(ids_BT, mask_BT, regions_BT, tokenizer, tool_format, step, entropies_BT), collisions_BT
        )

    @cached_property
    def statistics(self) -> RegionStatistics:
        """Region statistics of all sampled tokens, as training computes them from a batch."""
        own = self.tagged
        assert own.entropies_BT is not None
        sums_R, counts_R = region_sums(own.entropies_BT, own.regions_BT, own.mask_BT)
        collisions_R = region_means(self.collisions_BT, own.regions_BT, own.mask_BT)
        return RegionStatistics(counts_R, sums_R / counts_R, collisions_R)

    @cached_property
    def tokens(self) -> SampledTokens:
        """All sampled tokens, without padding and what an environment said."""
        own = self.tagged
        assert own.entropies_BT is not None
        lengths = [sum(sum(response.sampled) for response in group.responses) for group in self.groups]
        return SampledTokens(
            len(self.groups),
            np.repeat(np.arange(len(self.groups)), lengths),
            *(values_BT[own.mask_BT].numpy() for values_BT in (own.regions_BT, own.entropies_BT, self.collisions_BT)),
        )

    def mean_weights(self, weights_BT: Tensor) -> dict[str, float]:
        """Return the mean weight of each region's tokens, as training logs it; omit regions without tokens."""
        means_R = region_means(weights_BT, self.tagged.regions_BT, self.tagged.mask_BT)
        return {region.label: float(means_R[region]) for region in Region if self.statistics.counts_R[region]}

    def region_weight_range(self, rule: WeightRule, progress: float) -> tuple[float, float]:
        """Return the smallest and largest region weight before normalization; NaN for a rule without region weights."""
        weights_R = get_region_weights(rule, self.statistics, progress)
        if weights_R is None:
            return math.nan, math.nan
        sampled_R = weights_R[self.statistics.counts_R > 0]
        return float(sampled_R.min()), float(sampled_R.max())


class MeasuredGradients(NamedTuple):
    """Products of the prompts' gradients (by region, and of the expected reward); each rule's effect on one step."""

    gram_KMKM: np.ndarray
    rules: tuple[RuleSeries, ...]
    coordinates: Coordinates


def measure_gradients(
    model: Any,
    sampled: SampledBatch,
    rules: Mapping[str, WeightRule],
    progress: float,
    *,
    prompts_per_step: int,
    batch_size: int = 128,
    seed: int = 0,
    cap: float = 0.0,
    advance: Advance = lambda: None,
) -> MeasuredGradients:
    """Measure the gradients of every region, of the expected reward and of every rule.

    The objective is on-policy GRPO: advantages standardized within a group (with credit per turn in an environment,
    the credits), mean over the tokens of each response. The first of `rules` must be uniform. `cap` limits the gradient
    norm of a prompt to a multiple of the median norm (0: no limit). `count_progress_steps` tells how often `advance` is
    called.
    """
    # Region gradients are needed only as inner products: their Gram matrix replaces (R + 1) M N floats. The rules
    # follow in rounds of `RULES_PER_PASS`; each round adds its figures and drops its vectors, so memory stays at
    # (R + RULES_PER_PASS) M N floats for any number of rules.
    count = len(sampled.groups)
    coordinates = Coordinates.choose(
        model, max(1, MAX_GRADIENT_BYTES // (4 * count * (NUM_REGIONS + RULES_PER_PASS))), seed
    )

    def vectors(weights_KBT: Tensor) -> Tensor:
        return compute_gradients(model, sampled, weights_KBT, coordinates, batch_size, advance)

    parts_KMN = vectors(compute_region_and_true_weights(sampled.groups))
    true_MN, uniform_MN = parts_KMN[-1].clone(), parts_KMN[:-1].sum(0)
    scales_M = compute_norm_scales(uniform_MN, cap) if cap else torch.ones(count, dtype=torch.float64)
    # Scaling the vectors of prompt m by s_m scales <a_m, b_n> by s_m s_n: no scaled copies are needed.
    scales_MM = torch.outer(scales_M, scales_M).numpy()
    gram_KMKM = compute_gram(parts_KMN, coordinates.scale) * scales_MM[:, None, :]
    del parts_KMN

    def series(name: str, weights_BT: Tensor, bounds: tuple[float, float], vectors_MN: Tensor) -> RuleSeries:
        figures = compute_gradient_series(
            vectors_MN, true_MN, batch=prompts_per_step, blocks=choose_num_blocks(count), scales_M=scales_M
        )
        return RuleSeries(name, sampled.mean_weights(weights_BT), bounds, figures)

    own_BT = compute_grpo_weights(sampled.groups)
    found = [series(UNIFORM, torch.ones_like(own_BT), (1.0, 1.0), uniform_MN)]
    for names in batch_names([name for name in rules if name != UNIFORM]):
        weights_KBT = torch.stack(
            [apply_weight_rule(rules[name], sampled.tagged, sampled.statistics, progress) for name in names]
        )
        for name, weights_BT, vectors_MN in zip(names, weights_KBT, vectors(weights_KBT * own_BT), strict=True):
            found.append(series(name, weights_BT, sampled.region_weight_range(rules[name], progress), vectors_MN))
    return MeasuredGradients(gram_KMKM, tuple(found), coordinates)


def count_progress_steps(groups: int, rules: int) -> int:
    """Return how often `measure_gradients` calls `advance` for these numbers of groups and rules."""
    return groups * (1 + -(-(rules - 1) // RULES_PER_PASS))


def batch_names(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the names of rules in batches, each of which shares a forward pass."""
    for first in range(0, len(names), RULES_PER_PASS):
        yield names[first : first + RULES_PER_PASS]


def slice_groups(groups: Sequence[SampledGroup]) -> list[slice]:
    """Return, for each group, the slice of the batch that contains its responses."""
    return [slice(*ends) for ends in pairwise(accumulate((len(group.responses) for group in groups), initial=0))]


def pad_sampled_masks(responses: Sequence[SampledResponse]) -> Tensor:
    """Return whether the policy sampled each token, padded with False. Shape (B, T), bool."""
    return pad_responses([response.sampled for response in responses])[0].bool()


def compute_grpo_weights(groups: Sequence[SampledGroup]) -> Tensor:
    """Return the factor of each token in the GRPO objective: advantage / group size / response length. Shape (B, T).

    Tokens that the policy did not sample have no weight and do not count in the length.
    """
    responses = [response for group in groups for response in group.responses]
    mask_BT = pad_sampled_masks(responses)
    sizes_B = torch.tensor([len(group.responses) for group in groups for _ in group.responses])
    lengths_B = sizes_B * mask_BT.sum(-1).clamp_min(1)
    return compute_token_advantages(groups) / lengths_B[:, None] * mask_BT


def compute_token_advantages(groups: Sequence[SampledGroup]) -> Tensor:
    """Return the advantages of the tokens. Shape (B, T), or (B, 1) if those of a response are equal."""
    credits = [response.credits for group in groups for response in group.responses]
    if any(own is None for own in credits):
        return torch.cat([group.advantages("grpo") for group in groups])[:, None]
    return pad_sequence([torch.tensor(own, dtype=torch.float64) for own in credits], batch_first=True)


def compute_region_and_true_weights(groups: Sequence[SampledGroup]) -> Tensor:
    """Return `compute_grpo_weights` split by region, then the weights of the true gradient. Shape (R + 1, B, T).

    The true gradient is the gradient of the expected reward. REINFORCE estimates it without bias: a sum over tokens,
    with the mean reward of the group's other responses as the baseline.
    """
    # (R_i - mean_-i) / G = (R_i - mean) / (G - 1), where mean_-i is the mean reward of the other responses.
    responses = [response for group in groups for response in group.responses]
    regions_BT, _ = pad_responses([response.regions for response in responses], Region.OTHER)
    own_BT, mask_BT = compute_grpo_weights(groups), pad_sampled_masks(responses)
    true_B = torch.cat([group.advantages("dr_grpo") / max(1, group.num_scored - 1) for group in groups])
    return torch.stack([*(own_BT * (regions_BT == region) for region in Region), true_B[:, None] * mask_BT])


def compute_gradients(
    model: Any, sampled: SampledBatch, weights_KBT: Tensor, coordinates: Coordinates, batch_size: int, advance: Advance
) -> Tensor:
    """Return the gradients of K weightings for each of M groups, with N kept entries. Shape (K, M, N), float32."""
    vectors_KMN = torch.zeros(len(weights_KBT), len(sampled.groups), coordinates.size)
    for m, (rows, group) in enumerate(zip(slice_groups(sampled.groups), sampled.groups, strict=True)):
        group_KGT, ids = weights_KBT[:, rows], [response.ids for response in group.responses]
        for first in range(0, len(ids) if group_KGT.any() else 0, batch_size):
            part = ids[first : first + batch_size]
            own_KBT = group_KGT[:, first : first + batch_size, : max(map(len, part))]
            vectors_KMN[:, m] += compute_weighted_gradients(model, group.prompt_ids, part, own_KBT, coordinates)
        advance()
    return vectors_KMN


def compute_gram(vectors_KMN: Tensor, scale: float) -> np.ndarray:
    """Return the inner products of all pairs of vectors, multiplied by `scale`. Shape (K, M, K, M)."""
    # The products of a chunk are float32 (one BLAS call); adding the chunks in float64 keeps the rounding error small
    # over millions of coordinates.
    weightings, prompts, size = vectors_KMN.shape
    flat_XN = vectors_KMN.reshape(weightings * prompts, size)
    gram_XX = torch.zeros(len(flat_XN), len(flat_XN), dtype=torch.float64)
    for chunk_XN in flat_XN.split(CHUNK_SIZE, dim=1):
        gram_XX += chunk_XN @ chunk_XN.T
    return scale * gram_XX.reshape(weightings, prompts, weightings, prompts).numpy()
