"""Region weights from region statistics, their curriculum over training, and their assignment to tokens.

Shapes: B responses, T completion tokens, R regions (the order of `Region`). Entropies are in nats at the sampling
temperature; `progress` (nu in the paper) runs from 0 at the first step to 1 at the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Literal, get_args

import torch
from torch import Tensor

from rest_rl.errors import UserError
from rest_rl.response import NUM_REGIONS, Region

Rule = Literal["one_minus_exp", "inverse", "collision", "constant", "uniform", "inverted", "top_entropy", "permuted"]

REGIONS = tuple(region.label for region in Region)
AUTHORS_CONSTANTS: Mapping[str, float] = {
    "format": 1.0,
    "name": 1.2,
    "arguments": 0.6,
    "reasoning": 0.6,
    "answer": 0.6,
    "other": 0.6,
}
"""The published code's weights at step 0; it gives `answer` and `other` no weight at all, we give them its lowest."""


@dataclass(frozen=True)
class WeightConfig:
    """How region statistics become region weights; every default that is not the paper's is ours and marked so."""

    rule: Rule = "one_minus_exp"
    """one_minus_exp 1/(1-exp(-H)), inverse 1/H, collision 1/mean(1-sum p^2), constant, uniform (GRPO); rivals: inverted
    (1-exp(-H)), top_entropy (only the most uncertain tokens), permuted (one_minus_exp dealt to shuffled regions)."""
    strength: float = 1.0
    """Exponent of the rule in [0, 1]: 0 is GRPO, 1 the rule itself (ours)."""
    w_min: float = 0.2
    """Lower clip of a region weight after division by the token mean (ours)."""
    w_max: float = 5.0
    """Upper clip of a region weight (ours)."""
    decay_format: float = 0.0
    """Curriculum: how much FORMAT has lost at progress 1 (a_f)."""
    gain_arguments: float = 0.0
    """Curriculum: how much ARGUMENTS has gained at progress 1 (a_p)."""
    gain_reasoning: float = 0.0
    """Curriculum: how much REASONING and ANSWER have gained at progress 1 (a_t)."""
    constants: Mapping[str, float] = field(default_factory=lambda: dict(AUTHORS_CONSTANTS))
    """Region weights of the rule `constant`, by region label."""
    quantile: float = 0.2
    """Share of tokens that the rule `top_entropy` keeps (arXiv 2506.01939)."""
    seed: int = 0
    """Shuffle of the rule `permuted`."""
    scope: tuple[str, ...] = REGIONS
    """Labels of the regions that the rule weighs; the others weigh 1 (ours)."""
    dropped: tuple[str, ...] = ()
    """Labels of regions whose tokens get no gradient, whatever the rule (an ablation of the paper: no reasoning)."""
    uncertainty_floor: float = 1e-3
    """Smallest H, 1-exp(-H) or collision mass that a rule divides by (ours): a region that has become deterministic
    would otherwise weigh infinitely much."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"got rule {self.rule!r}, expected one of {', '.join(get_args(Rule))}")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"got strength {self.strength}, expected a number in [0, 1]")
        if not 0 < self.w_min <= 1 <= self.w_max < float("inf"):
            raise ValueError(f"got w_min {self.w_min} and w_max {self.w_max}, expected 0 < w_min <= 1 <= w_max")
        if not 0 < self.quantile <= 1:
            raise ValueError(f"got quantile {self.quantile}, expected a number in (0, 1]")
        if not self.uncertainty_floor > 0:
            raise ValueError(f"got uncertainty_floor {self.uncertainty_floor}, expected a positive number")
        self._check_regions()
        numbers = self.constants.values()
        known = set(self.constants) == set(REGIONS)
        if not known or not all(0 <= value < float("inf") for value in numbers) or not any(numbers):
            raise ValueError(
                f"got constants {dict(self.constants)}, expected a finite number >= 0, not all of them 0, for each of "
                f"{', '.join(REGIONS)}"
            )

    def _check_regions(self) -> None:
        for name in ("scope", "dropped"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # TOML and JSON have lists
            if unknown := sorted(set(getattr(self, name)) - set(REGIONS)):
                raise UserError(f"{name} {unknown}", f"some of {', '.join(REGIONS)}", "mend the label")
        if set(self.dropped) == set(REGIONS):
            raise UserError("every region in dropped", "one to learn from", "leave one out")
        if self.dropped and self.rule == "top_entropy":
            raise ValueError(
                f"got dropped {list(self.dropped)} with the rule 'top_entropy', which weighs tokens and no regions; "
                "remove one of them"
            )

    @property
    def needs_statistics(self) -> bool:
        """Whether the rule reads entropies or collision mass at all."""
        return self.rule not in ("constant", "uniform") and self.strength > 0


@dataclass(frozen=True)
class RegionStatistics:
    """What is known about each region: float64 (R,) each; NaN where a region has not been seen.

    `counts_R` weigh the token mean by which the rule's weights are divided; any common factor cancels.
    `collisions_R` is the mean of 1 - sum_v p_v^2, needed by the rule `collision` alone.
    """

    counts_R: Tensor
    entropies_R: Tensor
    collisions_R: Tensor | None = None


def region_weights(statistics: RegionStatistics | None, config: WeightConfig) -> Tensor:
    """The rule's weight of each region, before the curriculum: float64 (R,), within [w_min, w_max] but for `constant`.

    rule(region) ** strength, divided by its token mean, clipped (ResT's region weights; Lemma 2: the second moment of a
    token's score is 1 - sum p^2 <= 1 - exp(-H)). A region out of scope or without finite statistics weighs 1, and so do
    all of them when `statistics` is None: nothing has been measured yet. Equal statistics give equal weights. The
    numbers of the rule `constant` are taken as they stand, in every region.
    """
    if config.rule == "constant":
        constants_R = torch.tensor([config.constants[region.label] for region in Region], dtype=torch.float64)
        return constants_R**config.strength if config.strength > 0 else torch.ones_like(constants_R)
    if config.rule in ("uniform", "top_entropy") or statistics is None:
        return torch.ones(NUM_REGIONS, dtype=torch.float64)
    uncertainty_R = _uncertainty(statistics, config).clamp_min(config.uncertainty_floor)
    exponent = config.strength if config.rule == "inverted" else -config.strength
    raw_R = uncertainty_R**exponent
    scope_R = torch.tensor([label in config.scope for label in REGIONS])
    seen_R = scope_R & torch.isfinite(uncertainty_R) & torch.isfinite(raw_R) & (statistics.counts_R > 0)
    if not seen_R.any():
        return torch.ones(NUM_REGIONS, dtype=torch.float64)
    mean = (raw_R * statistics.counts_R)[seen_R].sum() / statistics.counts_R[seen_R].sum()
    weights_R = torch.where(seen_R, raw_R / mean, torch.ones_like(raw_R)).clamp(config.w_min, config.w_max)
    return weights_R[_dealing(config)] if config.rule == "permuted" else weights_R


def _dealing(config: WeightConfig) -> Tensor:
    """Which region's weight each region gets under the rule `permuted`: int64 (R,).

    The four regions of a call are dealt so that none keeps its own weight; nine seeds give all nine ways. ANSWER and
    OTHER, of which there may be few tokens, keep theirs.
    """
    shuffled = (Region.FORMAT, Region.NAME, Region.ARGUMENTS, Region.REASONING)
    ways = [way for way in permutations(shuffled) if all(new != own for new, own in zip(way, shuffled, strict=True))]
    dealing_R = torch.arange(NUM_REGIONS)
    dealing_R[list(shuffled)] = torch.tensor([int(region) for region in ways[4 * config.seed % len(ways)]])
    return dealing_R


def _uncertainty(statistics: RegionStatistics, config: WeightConfig) -> Tensor:
    if config.rule == "inverse":
        return statistics.entropies_R.double()
    if config.rule == "collision":
        if statistics.collisions_R is None:
            raise ValueError("the rule 'collision' got no collision mass; pass collisions, or use 'one_minus_exp'")
        return statistics.collisions_R.double()
    return -torch.expm1(-statistics.entropies_R.double())


def apply_curriculum(weights_R: Tensor, progress: float, config: WeightConfig) -> Tensor:
    """Move weight from structure to reasoning as training goes on (ResT's curriculum): float64 (R,).

    NAME and OTHER constant; FORMAT max(w_min, w - a_f nu); ARGUMENTS min(w_max, w + a_p nu); REASONING and ANSWER
    min(w_max, w + a_t nu). The shifts are scaled by `strength`, so that strength 0 is GRPO throughout; the rule
    `permuted` deals them as it deals the weights. Regions in `dropped` then weigh 0. ValueError for a progress outside
    [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"got progress {progress}, expected a number in [0, 1]: step / (total steps - 1)")
    weights_R = weights_R.clone()
    lowest = torch.minimum(weights_R, torch.tensor(config.w_min, dtype=weights_R.dtype))
    highest = torch.maximum(weights_R, torch.tensor(config.w_max, dtype=weights_R.dtype))
    shift_R = torch.zeros_like(weights_R)
    shift_R[Region.FORMAT] = -config.decay_format * progress
    shift_R[Region.ARGUMENTS] = config.gain_arguments * progress
    shift_R[Region.REASONING] = shift_R[Region.ANSWER] = config.gain_reasoning * progress
    if config.rule == "permuted":
        shift_R = shift_R[_dealing(config)]
    weights_R = torch.minimum(torch.maximum(weights_R + config.strength * shift_R, lowest), highest)
    weights_R[[region for region in Region if region.label in config.dropped]] = 0.0
    return weights_R


def assign_weights(weights_R: Tensor, regions_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Give each token its region's weight, normalised per response: float32 (B, T), 0 where masked.

    w_t / mean_t w_t over the unmasked tokens of the response (ResT's normalisation), so every response's mean is 1.
    """
    return normalise(weights_R.to(regions_BT.device)[regions_BT], mask_BT)


def normalise(weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Divide each response's weights by their mean over its unmasked tokens: float32 (B, T), 0 where masked.

    A response without unmasked tokens, or whose weights are all 0, stays 0.
    """
    if weights_BT.shape != mask_BT.shape:
        raise ValueError(f"got weights {tuple(weights_BT.shape)} and mask {tuple(mask_BT.shape)}, expected one shape")
    mask_BT = mask_BT.to(device=weights_BT.device, dtype=torch.float64)
    weights_BT = weights_BT.double() * mask_BT
    means_B1 = weights_BT.sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp_min(1)
    return (weights_BT / torch.where(means_B1 > 0, means_B1, 1.0)).float()


def keep_top_entropy(entropies_BT: Tensor, mask_BT: Tensor, quantile: float) -> Tensor:
    """1 for the `quantile` most uncertain tokens of the batch and 0 elsewhere (arXiv 2506.01939): float64 (B, T).

    A response below the batch's threshold throughout keeps its own most uncertain token, so that it has a gradient.
    """
    mask_BT = mask_BT.bool()
    if entropies_BT.shape != mask_BT.shape:
        raise ValueError(
            f"got entropies {tuple(entropies_BT.shape)} and mask {tuple(mask_BT.shape)}, expected one shape"
        )
    values_BT = entropies_BT.double().nan_to_num().masked_fill(~mask_BT, -1.0)
    if not mask_BT.any():
        return torch.zeros_like(values_BT)
    ordered = values_BT[mask_BT].sort(descending=True).values
    threshold = ordered[max(0, round(quantile * len(ordered)) - 1)]
    own_B1 = values_BT.max(-1, keepdim=True).values
    return ((values_BT >= torch.minimum(threshold, own_B1)) & mask_BT).double()
