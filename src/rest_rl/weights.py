"""Weight rules: what the gradient of each sampled token weighs, from regions, their statistics and the progress.

Shapes: B responses, T completion tokens, R regions (the order of `Region`). Entropies are in nats at the sampling
temperature; `progress` (nu in the paper) runs from 0 at the first step to 1 at the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from rest_rl.errors import UserError
from rest_rl.objects import display_name
from rest_rl.response import NUM_REGIONS, Region, check_progress

if TYPE_CHECKING:  # torch is imported inside the functions: presets and run files are read without it
    from torch import Tensor

RuleName = Literal[
    "one_minus_exp", "inverse", "collision", "constant", "uniform", "inverted", "top_entropy", "permuted"
]

REGION_LABELS = tuple(region.label for region in Region)
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
class RegionStatistics:
    """What is known about each region: float64 (R,) each; NaN where a region has not been seen.

    `counts_R` weigh the token mean by which the rule's weights are divided; any common factor cancels.
    `collisions_R` is the mean of 1 - sum_v p_v^2, needed by the rule `collision` only.
    """

    counts_R: Tensor
    entropies_R: Tensor
    collisions_R: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TaggedBatch:
    """Sampled responses as a weight rule sees them, on the CPU."""

    ids_BT: Tensor
    mask_BT: Tensor
    """1 for tokens that the policy sampled, 0 for padding and tool results."""
    regions_BT: Tensor
    """`Region` of every token, int64; OTHER where masked."""
    tokenizer: Any
    format: str
    """Name of the tool-call format."""
    step: float = 1
    """Number of the batch of responses, counted from 1."""
    entropies_BT: Tensor | None = None
    """Policy entropy of every token in nats, for rules that set `needs_entropies`."""
    entropies_N: Tensor | None = None
    """Entropies of all unmasked tokens of the global batch, where this one is a part of it."""


class WeightRule(Protocol):
    """What each token's gradient weighs; pass your own function or object wherever a name is accepted.

    Returns weights >= 0 of shape (B, T), which `apply_weight_rule` divides by their mean over each response.
    `statistics` are the region means of the steps before, None in the first step; `progress` is nu in [0, 1]. Leave the
    batch as it is.

    A rule may also have these attributes (defaults in parentheses):

    * `needs_entropies` (False): `batch.entropies_BT` is read, so the rule waits for the forward pass.
    * `is_uniform` (False): all tokens of a response always weigh the same.
    * `is_normalised` (False): the weights stay as they are returned.
    * `region_weights(statistics, progress)`: the weight of each region before responses are normalised, float64 (R,),
      for figures and plots; None where the rule weighs no regions by what was measured.
    * `check(format, truncates)`: raises `UserError` if the rule cannot weigh responses in that format, or sampled by
      top-p, top-k or min-p.
    """

    def __call__(self, batch: TaggedBatch, statistics: RegionStatistics | None, progress: float) -> Tensor: ...


def apply_weight_rule(
    rule: WeightRule, batch: TaggedBatch, statistics: RegionStatistics | None, progress: float
) -> Tensor:
    """The rule's weights, of mean 1 over each response's unmasked tokens: float32 (B, T), 0 where masked.

    Raises:
        UserError: the rule returned something else than finite weights >= 0 of shape (B, T).
    """
    import torch

    weights_BT = rule(batch, statistics, progress)
    if not isinstance(weights_BT, torch.Tensor) or weights_BT.shape != batch.mask_BT.shape:
        got = tuple(weights_BT.shape) if isinstance(weights_BT, torch.Tensor) else type(weights_BT).__name__
        raise UserError(
            f"{got} from the weight rule {display_name(rule)}",
            f"a tensor of weights of shape {tuple(batch.mask_BT.shape)}, as batch.mask_BT has",
            "return one weight for every token",
        )
    weights_BT = weights_BT.detach().cpu().masked_fill(~batch.mask_BT.bool(), 0.0)
    if not (torch.isfinite(weights_BT).all() and (weights_BT >= 0).all()):
        raise UserError(
            f"negative, infinite or NaN weights from the weight rule {display_name(rule)}",
            "finite numbers >= 0",
            "guard the rule against regions that have not been seen (statistics is None in the first step)",
        )
    if getattr(rule, "is_normalised", False):
        return weights_BT.float()
    return normalise_weights(weights_BT, batch.mask_BT)


def get_region_weights(rule: WeightRule, statistics: RegionStatistics | None, progress: float) -> Tensor | None:
    """The rule's `region_weights`, None for a rule without them."""
    method = getattr(rule, "region_weights", None)
    return None if method is None else method(statistics, progress)


def needs_entropies(rule: WeightRule) -> bool:
    """Whether the rule reads the entropies of the batch that it weighs."""
    return bool(getattr(rule, "needs_entropies", False))


def is_uniform(rule: WeightRule) -> bool:
    """Whether the rule never gives two tokens of a response different weights."""
    return bool(getattr(rule, "is_uniform", False))


@dataclass(frozen=True)
class WeightConfig:
    """The package's own weight rules: by region from its statistics, or by token (`top_entropy`).

    Every default that is not the paper's is ours and marked so.
    """

    rule: RuleName = "one_minus_exp"
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
    scope: tuple[str, ...] = REGION_LABELS
    """Labels of the regions that the rule weighs; the others weigh 1 (ours)."""
    dropped: tuple[str, ...] = ()
    """Labels of regions whose tokens get no gradient, whatever the rule (an ablation of the paper: no reasoning)."""
    uncertainty_floor: float = 1e-3
    """Smallest H, 1-exp(-H) or collision mass that a rule divides by (ours): a region that has become deterministic
    would otherwise weigh infinitely much."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(RuleName):
            raise UserError(f"rule {self.rule!r}", f"one of {', '.join(get_args(RuleName))}", "choose one of them")
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength {self.strength}", "a number in [0, 1]", "change it")
        if not 0 < self.w_min <= 1 <= self.w_max < float("inf"):
            raise UserError(
                f"w_min {self.w_min} and w_max {self.w_max}", "0 < w_min <= 1 <= w_max", "change one of them"
            )
        if not 0 < self.quantile <= 1:
            raise UserError(f"quantile {self.quantile}", "a number in (0, 1]", "change it")
        if not self.uncertainty_floor > 0:
            raise UserError(f"uncertainty_floor {self.uncertainty_floor}", "a positive number", "change it")
        self._check_regions()
        numbers = self.constants.values()
        known = set(self.constants) == set(REGION_LABELS)
        if not known or not all(0 <= value < float("inf") for value in numbers) or not any(numbers):
            raise UserError(
                f"constants {dict(self.constants)}",
                f"a finite number >= 0, not all of them 0, for each of {', '.join(REGION_LABELS)}",
                "give every region one",
            )

    def _check_regions(self) -> None:
        for name in ("scope", "dropped"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # TOML and JSON have lists
            if unknown := sorted(set(getattr(self, name)) - set(REGION_LABELS)):
                raise UserError(f"{name} {unknown}", f"some of {', '.join(REGION_LABELS)}", "correct the label")
        if set(self.dropped) == set(REGION_LABELS):
            raise UserError("every region in dropped", "one to learn from", "leave one out")
        if self.dropped and self.rule == "top_entropy":
            raise UserError(
                f"dropped {list(self.dropped)} with the rule 'top_entropy', which weighs tokens and no regions",
                "one of the two",
                "remove the other",
            )

    @property
    def needs_statistics(self) -> bool:
        """Whether the rule reads region statistics at all."""
        return self.rule not in ("constant", "uniform", "top_entropy") and self.strength > 0

    @property
    def needs_entropies(self) -> bool:
        return self.rule == "top_entropy"

    @property
    def is_uniform(self) -> bool:
        moves = self.decay_format != 0 or self.gain_arguments != 0 or self.gain_reasoning != 0
        weighs = self.strength > 0 and (self.rule != "uniform" or moves)
        return not (weighs or self.dropped or self.needs_entropies)

    def check(self, format: str, truncates: bool) -> None:
        if self.rule == "collision" and truncates:
            raise UserError(
                "the rule 'collision' with top_p, top_k or min_p",
                "tokens sampled from the whole distribution, which its estimate needs",
                "leave these at their defaults, or use the rule 'one_minus_exp'",
            )

    def region_weights(self, statistics: RegionStatistics | None, progress: float) -> Tensor | None:
        return self._weights_by_region(statistics, progress) if self.needs_statistics else None

    def __call__(self, batch: TaggedBatch, statistics: RegionStatistics | None, progress: float) -> Tensor:
        if not self.needs_entropies:
            return self._weights_by_region(statistics, progress)[batch.regions_BT]
        if batch.entropies_BT is None:
            raise UserError(
                "the rule 'top_entropy' without the entropies of the batch",
                "one for every token, because it chooses single tokens",
                "pass entropies as a (B, T) tensor",
            )
        return top_entropy_mask(batch.entropies_BT, batch.mask_BT, self.quantile, batch.entropies_N)

    def _weights_by_region(self, statistics: RegionStatistics | None, progress: float) -> Tensor:
        return apply_curriculum(region_weights(statistics, self), progress, self)


@dataclass(frozen=True)
class AuthorsWeights:
    """The published code's token weights, gaps and normalisation included; they know the tags of two formats."""

    rule: Literal["authors-code"] = "authors-code"
    is_normalised = True

    def check(self, format: str, truncates: bool) -> None:
        if format not in ("toolrl", "hermes"):
            raise UserError(
                f"format {format!r} with the weights of 'authors-code', whose published code knows two formats",
                "toolrl or hermes",
                "choose one of them, or another preset",
            )

    def __call__(self, batch: TaggedBatch, statistics: RegionStatistics | None, progress: float) -> Tensor:
        """The weights of the published code at step `batch.step`: found turn by turn, normalised over the response."""
        import numpy as np
        import torch

        from rest_rl.authors_code import authors_normalise, authors_weights
        from rest_rl.regions import find_turns, get_token_bytes

        self.check(batch.format, truncates=False)
        table, mask = get_token_bytes(batch.tokenizer), batch.mask_BT.numpy().astype(bool)
        weights = np.zeros(mask.shape, dtype=np.float32)
        for row, start, end in zip(*find_turns(mask), strict=True):
            pieces = table.text_pieces(batch.ids_BT[row, start:end].tolist())
            weights[row, start:end] = authors_weights(pieces, batch.step, trim_spaces=table.trims_offsets)
        for row in range(len(weights)):
            weights[row] = authors_normalise(weights[row], mask[row])
        return torch.from_numpy(weights)


def region_weights(statistics: RegionStatistics | None, config: WeightConfig) -> Tensor:
    """The rule's weight of each region, before the curriculum: float64 (R,), within [w_min, w_max] but for `constant`.

    rule(region) ** strength, divided by its token mean, clipped (ResT's region weights; Lemma 2: the second moment of a
    token's score is 1 - sum p^2 <= 1 - exp(-H)). A region out of scope or without finite statistics weighs 1, and so do
    all of them when `statistics` is None: nothing has been measured yet. Equal statistics give equal weights. The
    numbers of the rule `constant` are taken as they stand, in every region.
    """
    import torch

    if config.rule == "constant":
        constants_R = torch.tensor([config.constants[region.label] for region in Region], dtype=torch.float64)
        return constants_R**config.strength if config.strength > 0 else torch.ones_like(constants_R)
    if config.rule in ("uniform", "top_entropy") or statistics is None:
        return torch.ones(NUM_REGIONS, dtype=torch.float64)
    uncertainty_R = _uncertainty(statistics, config).clamp_min(config.uncertainty_floor)
    exponent = config.strength if config.rule == "inverted" else -config.strength
    raw_R = uncertainty_R**exponent
    scope_R = torch.tensor([label in config.scope for label in REGION_LABELS])
    seen_R = scope_R & torch.isfinite(uncertainty_R) & torch.isfinite(raw_R) & (statistics.counts_R > 0)
    if not seen_R.any():
        return torch.ones(NUM_REGIONS, dtype=torch.float64)
    mean = (raw_R * statistics.counts_R)[seen_R].sum() / statistics.counts_R[seen_R].sum()
    weights_R = torch.where(seen_R, raw_R / mean, torch.ones_like(raw_R)).clamp(config.w_min, config.w_max)
    return weights_R[_permutation(config)] if config.rule == "permuted" else weights_R


def _permutation(config: WeightConfig) -> Tensor:
    """Which region's weight each region gets under the rule `permuted`: int64 (R,).

    The four regions of a call are dealt so that none keeps its own weight; nine seeds give all nine ways. ANSWER and
    OTHER, of which there may be few tokens, keep theirs.
    """
    import torch

    shuffled = (Region.FORMAT, Region.NAME, Region.ARGUMENTS, Region.REASONING)
    ways = [way for way in permutations(shuffled) if all(new != own for new, own in zip(way, shuffled, strict=True))]
    dealing_R = torch.arange(NUM_REGIONS)
    dealing_R[list(shuffled)] = torch.tensor([int(region) for region in ways[4 * config.seed % len(ways)]])
    return dealing_R


def _uncertainty(statistics: RegionStatistics, config: WeightConfig) -> Tensor:
    import torch

    if config.rule == "inverse":
        return statistics.entropies_R.double()
    if config.rule == "collision":
        if statistics.collisions_R is None:
            raise UserError(
                "no collision mass with the rule 'collision'", "the mass of every region", "pass collisions"
            )
        return statistics.collisions_R.double()
    return -torch.expm1(-statistics.entropies_R.double())


def apply_curriculum(weights_R: Tensor, progress: float, config: WeightConfig) -> Tensor:
    """Move weight from structure to reasoning as training goes on (ResT's curriculum): float64 (R,).

    NAME and OTHER constant; FORMAT max(w_min, w - a_f nu); ARGUMENTS min(w_max, w + a_p nu); REASONING and ANSWER
    min(w_max, w + a_t nu). The shifts are scaled by `strength`, so that strength 0 is GRPO throughout; the rule
    `permuted` deals them as it deals the weights. Regions in `dropped` then weigh 0. ValueError for a progress outside
    [0, 1].
    """
    import torch

    check_progress(progress)
    weights_R = weights_R.clone()
    lowest = torch.minimum(weights_R, torch.tensor(config.w_min, dtype=weights_R.dtype))
    highest = torch.maximum(weights_R, torch.tensor(config.w_max, dtype=weights_R.dtype))
    shift_R = torch.zeros_like(weights_R)
    shift_R[Region.FORMAT] = -config.decay_format * progress
    shift_R[Region.ARGUMENTS] = config.gain_arguments * progress
    shift_R[Region.REASONING] = shift_R[Region.ANSWER] = config.gain_reasoning * progress
    if config.rule == "permuted":
        shift_R = shift_R[_permutation(config)]
    weights_R = torch.minimum(torch.maximum(weights_R + config.strength * shift_R, lowest), highest)
    weights_R[[region for region in Region if region.label in config.dropped]] = 0.0
    return weights_R


def assign_weights(weights_R: Tensor, regions_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Give each token its region's weight, normalised per response: float32 (B, T), 0 where masked.

    w_t / mean_t w_t over the unmasked tokens of the response (ResT's normalisation), so every response's mean is 1.
    """
    return normalise_weights(weights_R.to(regions_BT.device)[regions_BT], mask_BT)


def normalise_weights(weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Divide each response's weights by their mean over its unmasked tokens: float32 (B, T), 0 where masked.

    A response without unmasked tokens, or whose weights are all 0, stays 0.
    """
    import torch

    if weights_BT.shape != mask_BT.shape:
        raise ValueError(f"got weights {tuple(weights_BT.shape)} and mask {tuple(mask_BT.shape)}, expected one shape")
    mask_BT = mask_BT.to(device=weights_BT.device, dtype=torch.float64)
    weights_BT = weights_BT.double() * mask_BT
    means_B1 = weights_BT.sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp_min(1)
    return (weights_BT / torch.where(means_B1 > 0, means_B1, 1.0)).float()


def top_entropy_mask(
    entropies_BT: Tensor, mask_BT: Tensor, quantile: float, entropies_N: Tensor | None = None
) -> Tensor:
    """1 for the `quantile` most uncertain tokens of the batch and 0 elsewhere (arXiv 2506.01939): float64 (B, T).

    `entropies_N` are those of all unmasked tokens of the global batch, if this is a part of it. A response below the
    threshold throughout keeps its own most uncertain token, so that it has a gradient.
    """
    import torch

    mask_BT = mask_BT.bool()
    if entropies_BT.shape != mask_BT.shape:
        raise ValueError(
            f"got entropies {tuple(entropies_BT.shape)} and mask {tuple(mask_BT.shape)}, expected one shape"
        )
    values_BT = entropies_BT.double().nan_to_num().masked_fill(~mask_BT, -1.0)
    if not mask_BT.any():
        return torch.zeros_like(values_BT)
    found_N = values_BT[mask_BT] if entropies_N is None else entropies_N.double().nan_to_num()
    ordered = found_N.sort(descending=True).values
    threshold = ordered[max(0, round(quantile * len(ordered)) - 1)]
    own_B1 = values_BT.max(-1, keepdim=True).values
    return ((values_BT >= torch.minimum(threshold, own_B1)) & mask_BT).double()
