"""What a probe takes from the model: the statistics of sampled tokens, and gradients by region and by weight rule.

Shapes: M prompts, G responses each, T tokens of the longest, R regions, K weightings, N kept coordinates, J blocks of
prompts. The rules follow each other in rounds, so that memory holds the gradients of a few of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rest_rl.formats import ToolFormat
from rest_rl.presets import Preset, token_weights
from rest_rl.probe.figures import GroupTokens, RuleSeries
from rest_rl.probe.gradients import Coordinates, padded, token_statistics, weighted_gradients
from rest_rl.probe.rules import UNIFORM
from rest_rl.probe.sample import Group
from rest_rl.probe.variance import blocks_for, gradient_series, norm_cap
from rest_rl.response import NUM_REGIONS, Region
from rest_rl.weights import (
    RegionStatistics,
    WeightConfig,
    apply_curriculum,
    assign_weights,
    keep_top_entropy,
    normalise,
    region_weights,
)

ROUND = 3
"""Rules whose gradients are in memory at a time."""
MEMORY = 2**31
"""Bytes of gradients in memory; beyond it a random subset of the coordinates is kept."""
CHUNK = 2**16
Advance = Callable[[], None]


class ProbeGradients(NamedTuple):
    """Inner products of gradients, which is all that a probe needs of them."""

    gram_KMKM: np.ndarray
    """Of the regions' gradients and, last, that of the expected reward; K = R + 1."""
    rules: tuple[RuleSeries, ...]
    coordinates: Coordinates


def sampled_tokens(groups: Sequence[Group], model: Any, pad_id: int, advance: Advance) -> list[GroupTokens]:
    """Entropy and collision mass of every sampled token, group by group."""
    tokens = []
    for group in groups:
        found = token_statistics(model, group.prompt_ids, [response.ids for response in group.responses], pad_id)
        mask_BT = padded([response.ids for response in group.responses])[1]
        regions = [region for response in group.responses for region in response.regions]
        tokens.append(
            GroupTokens(
                np.array(regions, dtype=np.int64),
                found.entropies_BT[mask_BT].numpy(),
                found.collisions_BT[mask_BT].numpy(),
            )
        )
        advance()
    return tokens


def region_statistics(tokens: Sequence[GroupTokens]) -> RegionStatistics:
    """Counts and means by region over all sampled tokens, as training takes them over a batch."""
    regions_T = np.concatenate([group.regions_T for group in tokens])
    counts_R = np.bincount(regions_T, minlength=NUM_REGIONS).astype(float)
    sums = [
        np.bincount(regions_T, weights=np.concatenate(values), minlength=NUM_REGIONS)
        for values in ([group.entropies_T for group in tokens], [group.collisions_T for group in tokens])
    ]
    with np.errstate(invalid="ignore"):
        entropies_R, collisions_R = (torch.from_numpy(sums_R / counts_R) for sums_R in sums)
    return RegionStatistics(torch.from_numpy(counts_R), entropies_R, collisions_R)


class Weigher:
    """The weights that each rule gives to the tokens of the sampled groups."""

    def __init__(
        self, groups: Sequence[Group], tokens: Sequence[GroupTokens], tokenizer: Any, tool_format: ToolFormat,
        progress: float,
    ) -> None:  # fmt: skip
        """All groups together are the batch that region statistics are taken over."""
        self.groups, self.tokens, self.progress = groups, tokens, progress
        self.tokenizer, self.format = tokenizer, tool_format
        self.statistics = region_statistics(tokens)

    def weights(self, preset: Preset) -> list[Tensor]:
        """Of each group, as training would weigh it: float32 (G, T), mean 1 over each response."""
        config = preset.weights
        if not isinstance(config, WeightConfig):
            return [self._published(preset, group) for group in self.groups]
        if config.rule == "top_entropy":
            return self._top_entropy(config)
        weights_R = self._region_weights(config)
        return [assign_weights(weights_R, *regions_of(group)) for group in self.groups]

    def bounds(self, preset: Preset) -> tuple[float, float]:
        """The least and the greatest weight of a region that has tokens, before normalisation; NaN without such."""
        config = preset.weights
        if not isinstance(config, WeightConfig) or config.rule == "top_entropy":
            return math.nan, math.nan
        weights_R = self._region_weights(config)
        seen = weights_R[self.statistics.counts_R > 0]
        return float(seen.min()), float(seen.max())

    def _region_weights(self, config: WeightConfig) -> Tensor:
        return apply_curriculum(region_weights(self.statistics, config), self.progress, config)

    def _published(self, preset: Preset, group: Group) -> Tensor:
        ids_BT, mask_BT = padded([response.ids for response in group.responses])
        return token_weights(ids_BT, mask_BT, self.tokenizer, format=self.format, preset=preset, progress=self.progress)

    def _top_entropy(self, config: WeightConfig) -> list[Tensor]:
        lengths = [len(response.ids) for group in self.groups for response in group.responses]
        mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        entropies_BT = torch.zeros(mask_BT.shape, dtype=torch.float64)
        entropies_BT[mask_BT] = torch.from_numpy(np.concatenate([group.entropies_T for group in self.tokens]))
        chosen_BT = normalise(keep_top_entropy(entropies_BT, mask_BT, config.quantile), mask_BT)
        sizes = [len(group.responses) for group in self.groups]
        widths = [max(len(response.ids) for response in group.responses) for group in self.groups]
        return [part[:, :width] for part, width in zip(chosen_BT.split(sizes), widths, strict=True)]


def regions_of(group: Group) -> tuple[Tensor, Tensor]:
    """The (regions_BT, mask_BT) of a group's tokens, right padded."""
    return padded([response.regions for response in group.responses], Region.OTHER)


def mean_weights(weights: Sequence[Tensor], groups: Sequence[Group]) -> dict[str, float]:
    """Mean weight of each region's tokens, as training logs it; regions without tokens are left out."""
    sums_R, counts_R = np.zeros(NUM_REGIONS), np.zeros(NUM_REGIONS)
    for weights_BT, group in zip(weights, groups, strict=True):
        regions_BT, mask_BT = regions_of(group)
        regions_T = regions_BT[mask_BT].numpy()
        sums_R += np.bincount(regions_T, weights=weights_BT[mask_BT].double().numpy(), minlength=NUM_REGIONS)
        counts_R += np.bincount(regions_T, minlength=NUM_REGIONS)
    return {region.label: float(sums_R[region] / counts_R[region]) for region in Region if counts_R[region]}


def probe_gradients(
    model: Any,
    weigher: Weigher,
    rules: Mapping[str, Preset],
    *,
    prompts_per_step: int,
    pad_id: int = 0,
    batch_size: int = 128,
    seed: int = 0,
    cap: float = 0.0,
    advance: Advance = lambda: None,
) -> ProbeGradients:
    """Gradients of every region, of the expected reward and of every rule; `advance` is called per group and round.

    Of the GRPO objective on-policy: responses have their group's standardised advantage and their own mean over
    tokens. `batch_size` responses share a forward pass. The first of `rules` is uniform.
    """
    groups = weigher.groups
    limit = max(1, MEMORY // (4 * len(groups) * (NUM_REGIONS + ROUND)))
    coordinates = Coordinates.choose(model, limit, seed)

    def vectors(weights: Sequence[Tensor]) -> Tensor:
        return gradients_of(model, groups, weights, coordinates, pad_id, batch_size, advance)

    parts_KMN = vectors([region_and_true_weights(group) for group in groups])
    true_MN, uniform_MN = parts_KMN[-1].clone(), parts_KMN[:-1].sum(0)
    scales_M = norm_cap(uniform_MN, cap) if cap else torch.ones(len(groups), dtype=torch.float64)
    gram_KMKM = (
        gram_of(parts_KMN, coordinates.scale) * np.multiply.outer(scales_M.numpy(), scales_M.numpy())[:, None, :]
    )
    del parts_KMN
    judge = Judge(true_MN, scales_M, prompts_per_step)
    described = (mean_weights(weigher.weights(rules[UNIFORM]), groups), (1.0, 1.0))
    found = [judge.series(UNIFORM, *described, uniform_MN)]
    for names in rounds([name for name in rules if name != UNIFORM]):
        weights = {name: weigher.weights(rules[name]) for name in names}
        scaled = [
            torch.stack([weights[name][m] * grpo_weights(group) for name in names]) for m, group in enumerate(groups)
        ]
        for name, vectors_MN in zip(names, vectors(scaled), strict=True):
            described = (mean_weights(weights[name], groups), weigher.bounds(rules[name]))
            found.append(judge.series(name, *described, vectors_MN))
    return ProbeGradients(gram_KMKM, tuple(found), coordinates)


def passes(groups: int, rules: int) -> int:
    """How often `probe_gradients` calls `advance`."""
    return groups * (1 + -(-(rules - 1) // ROUND))


def rounds(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """The rules that share a forward pass."""
    for first in range(0, len(names), ROUND):
        yield names[first : first + ROUND]


def grpo_weights(group: Group) -> Tensor:
    """What multiplies each token's log-probability in the GRPO objective: A_i / (G T_i), float64 (G, T)."""
    _, mask_BT = regions_of(group)
    lengths_B = mask_BT.sum(-1).clamp_min(1)
    return (group.advantages("grpo") / (len(mask_BT) * lengths_B))[:, None] * mask_BT


def region_and_true_weights(group: Group) -> Tensor:
    """As `grpo_weights` by region, then those of the gradient of the expected reward: float64 (R + 1, G, T).

    The latter (REINFORCE) sums over tokens, with the mean reward of the group's other responses as its baseline, which
    leaves it unbiased: (R_i - mean_-i) / G = (R_i - mean) / (G - 1).
    """
    regions_BT, mask_BT = regions_of(group)
    own_BT = grpo_weights(group)
    by_region = [own_BT * (regions_BT == region) for region in Region]
    true_BT = (group.advantages("dr_grpo") / max(1, len(mask_BT) - 1))[:, None] * mask_BT
    return torch.stack([*by_region, true_BT])


def gradients_of(
    model: Any,
    groups: Sequence[Group],
    weights: Sequence[Tensor],
    coordinates: Coordinates,
    pad_id: int,
    batch_size: int,
    advance: Advance,
) -> Tensor:
    """The gradient of each weighting and group: float32 (K, M, N)."""
    vectors_KMN = torch.zeros(len(weights[0]), len(groups), coordinates.size)
    for m, (group, weights_KBT) in enumerate(zip(groups, weights, strict=True)):
        ids = [response.ids for response in group.responses]
        for first in range(0, len(ids) if weights_KBT.any() else 0, batch_size):
            part = ids[first : first + batch_size]
            own_KBT = weights_KBT[:, first : first + batch_size, : max(map(len, part))]
            vectors_KMN[:, m] += weighted_gradients(model, group.prompt_ids, part, own_KBT, coordinates, pad_id)
        advance()
    return vectors_KMN


def gram_of(vectors_KMN: Tensor, scale: float) -> np.ndarray:
    """Inner products of all pairs, summed in double precision over chunks of coordinates: (K, M, K, M)."""
    weightings, prompts, size = vectors_KMN.shape
    flat_XN = vectors_KMN.reshape(weightings * prompts, size)
    gram_XX = torch.zeros(len(flat_XN), len(flat_XN), dtype=torch.float64)
    for chunk_XN in flat_XN.split(CHUNK, dim=1):
        gram_XX += chunk_XN @ chunk_XN.T
    return scale * gram_XX.reshape(weightings, prompts, weightings, prompts).numpy()


class Judge(NamedTuple):
    """What the gradients of all rules are judged by."""

    true_MN: Tensor
    scales_M: Tensor
    prompts_per_step: int

    def series(
        self, name: str, weights: Mapping[str, float], bounds: tuple[float, float], vectors_MN: Tensor
    ) -> RuleSeries:
        """A rule's figures, from all prompts and with each block of them left out."""
        series = gradient_series(
            vectors_MN, self.true_MN, batch=self.prompts_per_step, blocks=blocks_for(len(vectors_MN)),
            scales_M=self.scales_M,
        )  # fmt: skip
        return RuleSeries(name, weights, bounds, series)
