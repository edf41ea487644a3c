"""Weight rules: token weights from regions, region statistics and the curriculum progress.

Shapes: B responses, T completion tokens, R regions in the order of `Region`. Entropies are in nats at the sampling
temperature. `progress` (nu in the paper) goes from 0 at the first step to 1 at the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from rest_rl.errors import UserError, warn_renamed
from rest_rl.objects import display_name
from rest_rl.response import NUM_REGIONS, Region, check_progress

if TYPE_CHECKING:  # torch is imported inside the functions: presets and run files are read without it
    from torch import Tensor

RuleName = Literal[
    "one_minus_exp", "inverse", "collision", "constant", "uniform", "inverted", "top_entropy", "permuted"
]

Normalization = Literal["response", "turn", "batch"]

REGION_LABELS = tuple(region.label for region in Region)
# The published code's weights at step 0. It gives `answer` and `other` no weight; we give them its lowest weight.
AUTHORS_CONSTANTS: Mapping[str, float] = {
    "format": 1.0,
    "name": 1.2,
    "arguments": 0.6,
    "reasoning": 0.6,
    "answer": 0.6,
    "other": 0.6,
}


@dataclass(frozen=True)
class RegionStatistics:
    """Mean statistics of each region, NaN for regions without tokens so far. Shape (R,), float64.

    `counts_R` are numbers of tokens; only their ratios matter. `collisions_R` is the mean of 1 - sum_v p_v^2 (p: the
    policy), which only the rule `collision` needs.
    """

    counts_R: Tensor
    entropies_R: Tensor
    collisions_R: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TaggedBatch:
    """A batch of sampled responses, on the CPU: the input of a weight rule."""

    ids_BT: Tensor
    mask_BT: Tensor
    """1 for sampled tokens, 0 for padding and tool results."""
    regions_BT: Tensor
    """`Region` of every token, int64; OTHER where masked."""
    tokenizer: Any
    format: str
    """Name of the tool-call format."""
    step: float = 1
    """Number of the batch, counted from 1."""
    entropies_BT: Tensor | None = None
    """Policy entropy of each token in nats, for rules with `needs_entropies`."""
    entropies_N: Tensor | None = None
    """Entropies of all unmasked tokens of the global batch, if this batch is only a part of it."""
    counts_R: Tensor | None = None
    """Number of unmasked tokens of each region in the global batch, if this batch is only a part of it."""


class WeightRule(Protocol):
    """Computes token weights; you can pass your own function or object wherever a name is accepted.

    Return weights >= 0 of shape (B, T); `apply_weight_rule` divides them by their mean. `statistics` describe the
    previous steps and are None in the first one; `progress` is nu in [0, 1]. Do not modify the batch.

    Optional attributes (defaults in parentheses):

    * `needs_entropies` (False): the rule reads `batch.entropies_BT` and therefore runs after the forward pass.
    * `is_uniform` (False): the weights of all tokens of a response are always equal.
    * `is_normalized` (False): the weights are used as returned.
    * `normalization` ("response"): the tokens over which the weights are divided by their mean: those of a "response",
      of each "turn" of it, or of the "batch" (for your own rule: of the micro-batch that it gets).
    * `statistics_batches` (0): 0 for moving averages over all previous steps; n > 0 for the plain mean over the first n
      batches of responses, which then stays fixed.
    * `region_weights(statistics, progress)`: the weight of each region before normalization, float64 (R,), for logs and
      plots; None if the rule does not weight regions by measured statistics.
    * `check(format, truncates)`: raises `UserError` if the rule does not support this format, or responses sampled with
      top-p, top-k or min-p (`truncates`).
    """

    def __call__(self, batch: TaggedBatch, statistics: RegionStatistics | None, progress: float) -> Tensor: ...


def apply_weight_rule(
    rule: WeightRule, batch: TaggedBatch, statistics: RegionStatistics | None, progress: float
) -> Tensor:
    """Return the rule's weights, 0 where masked: mean 1 over each response, turn or the batch. Shape (B, T), float32.

    Raises:
        UserError: The rule did not return finite weights >= 0 of shape (B, T), or has an unknown `normalization`.
    """
    import torch

    weights_BT = rule(batch, statistics, progress)
    if not isinstance(weights_BT, torch.Tensor) or weights_BT.shape != batch.mask_BT.shape:
        is_tensor = isinstance(weights_BT, torch.Tensor)
        returned = f"shape {tuple(weights_BT.shape)}" if is_tensor else f"a value of type {type(weights_BT).__name__}"
        raise UserError(
            f"the weight rule {display_name(rule)} returned {returned}",
            f"a tensor of the shape of batch.mask_BT, {tuple(batch.mask_BT.shape)}",
            "return one weight per token",
        )
    weights_BT = weights_BT.detach().cpu().masked_fill(~batch.mask_BT.bool(), 0.0)
    if not (torch.isfinite(weights_BT).all() and (weights_BT >= 0).all()):
        raise UserError(
            f"the weight rule {display_name(rule)} returned negative, infinite or NaN weights",
            "finite numbers, at least 0",
            "handle regions without tokens (NaN statistics) and the first step (statistics is None)",
        )
    old_name = getattr(rule, "is_normalised", None)
    if old_name is not None:
        warn_renamed("the attribute is_normalised of weight rules", "is_normalized")
    if getattr(rule, "is_normalized", old_name):
        return weights_BT.float()
    kind = get_normalization(rule)
    if kind == "turn":
        return normalize_by_turn(weights_BT, batch.mask_BT)
    if kind == "batch":
        return scale_to_mean_one(weights_BT, batch.mask_BT, _global_mean(rule, batch, statistics, progress))
    return normalize_weights(weights_BT, batch.mask_BT)


def _global_mean(
    rule: WeightRule, batch: TaggedBatch, statistics: RegionStatistics | None, progress: float
) -> float | None:
    # The mean weight over the global batch, of which `batch` may be a part; None if it is the mean over `batch`.
    if batch.counts_R is None or not isinstance(rule, WeightConfig) or rule.needs_entropies:
        return None
    weights_R = rule.weights_by_region(statistics, progress)
    return float((weights_R * batch.counts_R).sum() / batch.counts_R.sum().clamp_min(1))


def get_region_weights(rule: WeightRule, statistics: RegionStatistics | None, progress: float) -> Tensor | None:
    """Return the rule's region weights, or None if it has none."""
    method = getattr(rule, "region_weights", None)
    return None if method is None else method(statistics, progress)


def needs_entropies(rule: WeightRule) -> bool:
    """Whether the rule reads the entropies of the batch that it weights."""
    return bool(getattr(rule, "needs_entropies", False))


def get_normalization(rule: WeightRule) -> Normalization:
    """Return the tokens over which the rule's weights have mean 1; UserError for an unknown value."""
    kind: Normalization = getattr(rule, "normalization", "response")
    if kind not in get_args(Normalization):
        problem = f"the weight rule {display_name(rule)} has normalization {kind!r}"
        raise UserError(problem, "response, turn or batch", "correct it")
    return kind


def get_statistics_batches(rule: WeightRule) -> int:
    """Return the number of first batches over which the rule's statistics are measured; 0 for moving averages."""
    return int(getattr(rule, "statistics_batches", 0))


def is_uniform(rule: WeightRule) -> bool:
    """Whether the weights of all tokens of a response are always equal."""
    return bool(getattr(rule, "is_uniform", False))


@dataclass(frozen=True)
class WeightConfig:
    """The package's weight rules, which weight a token by its region's statistics, or by its entropy (`top_entropy`).

    Defaults that the paper does not specify are marked "ours".
    """

    rule: RuleName = "one_minus_exp"
    """one_minus_exp 1/(1-exp(-H)), inverse 1/H, collision 1/mean(1-sum p^2), constant, uniform (GRPO). Alternatives for
    comparison: inverted (1-exp(-H)), top_entropy (only the most uncertain tokens), permuted (one_minus_exp with the
    weights permuted between regions)."""
    strength: float = 1.0
    """Exponent in [0, 1] (ours): 0 is GRPO, 1 the full rule."""
    entropies: Literal["running", "initial"] = "running"
    """The measured entropies: `initial` is the mean over the first `initial_batches` batches of responses, which then
    stays fixed (the paper); `running` is a moving average over all previous steps (ours)."""
    initial_batches: int = 5
    """Number of batches over which `initial` entropies are measured (ours)."""
    normalization: Normalization = "response"
    """Weights have mean 1 over each `response` (the paper), over each `turn` of it, or over the `batch`. The options
    differ only if responses have several turns or different shares of the regions."""
    w_min: float = 0.2
    """Lower bound of a region weight after division by the token mean (ours)."""
    w_max: float = 5.0
    """Upper bound of a region weight (ours)."""
    decay_format: float = 0.0
    """Curriculum: decrease of FORMAT's weight at progress 1 (a_f)."""
    gain_arguments: float = 0.0
    """Curriculum: increase of ARGUMENTS' weight at progress 1 (a_p)."""
    gain_reasoning: float = 0.0
    """Curriculum: increase of the weights of REASONING and ANSWER at progress 1 (a_t)."""
    constants: Mapping[str, float] = field(default_factory=lambda: dict(AUTHORS_CONSTANTS))
    """Region weights of the rule `constant`."""
    quantile: float = 0.2
    """Fraction of tokens that the rule `top_entropy` keeps (arXiv 2506.01939)."""
    seed: int = 0
    """Chooses the permutation of the rule `permuted`."""
    scope: tuple[str, ...] = REGION_LABELS
    """Regions that the rule weights; the others have weight 1 (ours)."""
    dropped: tuple[str, ...] = ()
    """Regions whose tokens get no gradient under any rule (the paper's ablation drops reasoning)."""
    uncertainty_floor: float = 1e-3
    """Lower bound of H, 1-exp(-H) or the collision mass (ours), so that a deterministic region's weight is finite."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(RuleName):
            raise UserError(f"rule is {self.rule!r}", f"one of {', '.join(get_args(RuleName))}", "change it")
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength is {self.strength}", "a number in [0, 1]", "change it")
        if not 0 < self.w_min <= 1 <= self.w_max < float("inf"):
            problem = f"w_min is {self.w_min} and w_max is {self.w_max}"
            raise UserError(problem, "0 < w_min <= 1 <= w_max", "change one of them")
        if not 0 < self.quantile <= 1:
            raise UserError(f"quantile is {self.quantile}", "a number in (0, 1]", "change it")
        if self.initial_batches < 1:
            raise UserError(f"initial_batches is {self.initial_batches}", "at least 1", "change it")
        for name, known in (("entropies", ("running", "initial")), ("normalization", get_args(Normalization))):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} is {value!r}", f"one of {', '.join(known)}", "change it")
        if not self.uncertainty_floor > 0:
            raise UserError(f"uncertainty_floor is {self.uncertainty_floor}", "a number above 0", "change it")
        self._check_regions()
        numbers = self.constants.values()
        known = set(self.constants) == set(REGION_LABELS)
        if not known or not all(0 <= value < float("inf") for value in numbers) or not any(numbers):
            raise UserError(
                f"constants are {dict(self.constants)}",
                f"one finite number, at least 0, for each of {', '.join(REGION_LABELS)}, and not all 0",
                "correct them",
            )

    def _check_regions(self) -> None:
        for name in ("scope", "dropped"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # TOML and JSON have no tuples
            if unknown := sorted(set(getattr(self, name)) - set(REGION_LABELS)):
                raise UserError(f"{name} contains {unknown}", f"some of {', '.join(REGION_LABELS)}", "correct them")
        if set(self.dropped) == set(REGION_LABELS):
            raise UserError("dropped contains every region", remedy="keep one to train on")
        if self.dropped and self.rule == "top_entropy":
            raise UserError(
                f"dropped is {list(self.dropped)}, but the rule 'top_entropy' weights tokens, not regions",
                remedy="set only one of the two",
            )

    @property
    def needs_statistics(self) -> bool:
        """Whether the rule reads region statistics."""
        return self.rule not in ("constant", "uniform", "top_entropy") and self.strength > 0

    @property
    def needs_entropies(self) -> bool:
        return self.rule == "top_entropy"

    @property
    def statistics_batches(self) -> int:
        return self.initial_batches if self.entropies == "initial" else 0

    @property
    def is_uniform(self) -> bool:
        moves = self.decay_format != 0 or self.gain_arguments != 0 or self.gain_reasoning != 0
        has_weights = self.strength > 0 and (self.rule != "uniform" or moves)
        return not (has_weights or self.dropped or self.needs_entropies)

    def check(self, format: str, truncates: bool) -> None:
        if self.rule == "collision" and truncates:
            raise UserError(
                "the rule 'collision' cannot estimate the collision mass of tokens sampled with top_p, top_k or min_p",
                remedy="remove these settings, or use the rule 'one_minus_exp'",
            )

    def region_weights(self, statistics: RegionStatistics | None, progress: float) -> Tensor | None:
        return self.weights_by_region(statistics, progress) if self.needs_statistics else None

    def __call__(self, batch: TaggedBatch, statistics: RegionStatistics | None, progress: float) -> Tensor:
        if not self.needs_entropies:
            return self.weights_by_region(statistics, progress)[batch.regions_BT]
        if batch.entropies_BT is None:
            raise UserError(
                "the rule 'top_entropy' selects single tokens, but there is no entropy for each token",
                remedy="pass entropies as a (B, T) tensor",
            )
        return top_entropy_mask(batch.entropies_BT, batch.mask_BT, self.quantile, batch.entropies_N)

    def weights_by_region(self, statistics: RegionStatistics | None, progress: float) -> Tensor:
        """Return the weight of each region before normalization, for every rule but `top_entropy`. Shape (R,)."""
        return apply_curriculum(region_weights(statistics, self), progress, self)


@dataclass(frozen=True)
class AuthorsWeights:
    """The token weights of the ResT authors' published code, for the formats `toolrl` and `hermes`.

    Uses the normalization of the published code; tokens to which that code assigns no weight get 0.
    """

    rule: Literal["authors-code"] = "authors-code"
    is_normalized = True

    def check(self, format: str, truncates: bool) -> None:
        if format not in ("toolrl", "hermes"):
            raise UserError(
                f"the weights of 'authors-code' do not support format {format!r}",
                "toolrl or hermes",
                "choose one of them, or another preset",
            )

    def __call__(self, batch: TaggedBatch, statistics: RegionStatistics | None, progress: float) -> Tensor:
        """Return the published code's weights at step `batch.step`, computed per turn and normalized per response."""
        import numpy as np
        import torch

        from rest_rl.authors_code import authors_normalize, authors_weights
        from rest_rl.regions import find_turns, get_token_bytes

        self.check(batch.format, truncates=False)
        table, mask = get_token_bytes(batch.tokenizer), batch.mask_BT.numpy().astype(bool)
        weights = np.zeros(mask.shape, dtype=np.float32)
        for row, start, end in zip(*find_turns(mask), strict=True):
            pieces = table.text_pieces(batch.ids_BT[row, start:end].tolist())
            weights[row, start:end] = authors_weights(pieces, batch.step, trim_spaces=table.trims_offsets)
        for row in range(len(weights)):
            weights[row] = authors_normalize(weights[row], mask[row])
        return torch.from_numpy(weights)


def region_weights(statistics: RegionStatistics | None, config: WeightConfig) -> Tensor:
    """Return the rule's weight of each region, without the curriculum's shifts. Shape (R,), float64.

    The weight is the value of the rule's formula (`WeightConfig.rule`) ** strength, divided by its mean over tokens and
    clipped to [w_min, w_max] (ResT's region weights; by its Lemma 2 the second moment of a token's score function is
    1 - sum p^2 <= 1 - exp(-H)). The rule `constant` neither divides nor clips. Weights are 1 for regions out of `scope`
    or without finite statistics, and for all regions before the first measurement (`statistics` is None).
    """
    # Dividing by the mean over tokens, not over regions, keeps the average weight of a token near 1, so that a rule
    # changes how the gradient is distributed and not its size. `measured_R` leaves NaN regions out of this mean;
    # otherwise one region without tokens would make all weights NaN.
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
    measured_R = scope_R & torch.isfinite(uncertainty_R) & torch.isfinite(raw_R) & (statistics.counts_R > 0)
    if not measured_R.any():
        return torch.ones(NUM_REGIONS, dtype=torch.float64)
    mean = (raw_R * statistics.counts_R)[measured_R].sum() / statistics.counts_R[measured_R].sum()
    weights_R = torch.where(measured_R, raw_R / mean, torch.ones_like(raw_R)).clamp(config.w_min, config.w_max)
    return weights_R[_permutation(config)] if config.rule == "permuted" else weights_R


def _permutation(config: WeightConfig) -> Tensor:
    # The region whose weight each region gets: int64 (R,). Of the nine derangements of the four regions of a call, the
    # seed selects one; its stride is coprime to 9, so nine seeds give all of them. ANSWER and OTHER keep their
    # weights, because they may have few tokens.
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
            raise UserError("the rule 'collision' needs the collision mass of each region", remedy="pass collisions")
        return statistics.collisions_R.double()
    return -torch.expm1(-statistics.entropies_R.double())


def apply_curriculum(weights_R: Tensor, progress: float, config: WeightConfig) -> Tensor:
    """Shift weight from structure to reasoning with the progress (ResT's curriculum). Shape (R,), float64.

    The weight of FORMAT decreases by `decay_format` * progress, down to w_min. The weights of ARGUMENTS, REASONING and
    ANSWER increase by `gain_arguments` or `gain_reasoning` * progress, up to w_max. The shifts are multiplied by
    `strength`, and permuted like the weights by the rule `permuted`. Regions in `dropped` get weight 0.

    Raises:
        UserError: The progress is outside [0, 1].
    """
    import torch

    check_progress(progress)
    weights_R = weights_R.clone()
    # A weight that is already outside [w_min, w_max] (the rule `constant` is not clipped) only bounds its own shift.
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
    """Return each token's region weight: mean 1 over its response, 0 where masked. Shape (B, T), float32."""
    return normalize_weights(weights_R.to(regions_BT.device)[regions_BT], mask_BT)


def normalize_weights(weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Divide each response's weights by their mean over its unmasked tokens; 0 where masked. Shape (B, T), float32.

    This is ResT's normalization, w_t / mean_t w_t. Responses without unmasked tokens or positive weights stay 0.
    """
    # Summed in float64, so that long responses lose no accuracy; the result is rounded to float32 once.
    import torch

    if weights_BT.shape != mask_BT.shape:
        shapes = f"{tuple(weights_BT.shape)} and {tuple(mask_BT.shape)}"
        raise ValueError(f"weights and mask have shapes {shapes}, expected (B, T) for both")
    mask_BT = mask_BT.to(device=weights_BT.device, dtype=torch.float64)
    weights_BT = weights_BT.double() * mask_BT
    means_B1 = weights_BT.sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp_min(1)
    return (weights_BT / torch.where(means_B1 > 0, means_B1, 1.0)).float()


def normalize_by_turn(weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Divide the weights of each turn, a run of unmasked tokens, by their mean. Shape (B, T), float32.

    Unlike `normalize_weights`, this leaves each turn its share of the response's tokens, whatever its regions are.
    """
    import torch

    from rest_rl.regions import find_turns

    result_BT = torch.zeros(weights_BT.shape)
    for row, start, end in zip(*find_turns(mask_BT.cpu().numpy().astype(bool)), strict=True):
        turn = (slice(row, row + 1), slice(start, end))
        result_BT[turn] = normalize_weights(weights_BT[turn], mask_BT[turn])
    return result_BT


def scale_to_mean_one(weights_BT: Tensor, mask_BT: Tensor, mean: float | None = None) -> Tensor:
    """Divide all weights by one number: their mean over the unmasked tokens, or `mean`. Shape (B, T), float32.

    With a loss that averages over tokens, this is the weighted token mean sum w l / sum w.
    """
    weights_BT = weights_BT.double() * mask_BT
    mean = float(weights_BT.sum() / mask_BT.sum().clamp_min(1)) if mean is None else mean
    return (weights_BT / mean if mean > 0 else weights_BT).float()


def top_entropy_mask(
    entropies_BT: Tensor, mask_BT: Tensor, quantile: float, entropies_N: Tensor | None = None
) -> Tensor:
    # 1 for the most uncertain tokens of the batch and 0 for the others (arXiv 2506.01939): float64 (B, T). The
    # threshold is that of the global batch (`entropies_N`) if given. A response without any such token
    # keeps its most uncertain one, so that it has a gradient. Masked tokens get -1, which is below every entropy.
    import torch

    mask_BT = mask_BT.bool()
    if entropies_BT.shape != mask_BT.shape:
        shapes = f"{tuple(entropies_BT.shape)} and {tuple(mask_BT.shape)}"
        raise ValueError(f"entropies and mask have shapes {shapes}, expected (B, T) for both")
    values_BT = entropies_BT.double().nan_to_num().masked_fill(~mask_BT, -1.0)
    if not mask_BT.any():
        return torch.zeros_like(values_BT)
    all_N = values_BT[mask_BT] if entropies_N is None else entropies_N.double().nan_to_num()
    ordered = all_N.sort(descending=True).values
    threshold = ordered[max(0, round(quantile * len(ordered)) - 1)]
    highest_B1 = values_BT.max(-1, keepdim=True).values  # for a response below the threshold, its own maximum decides
    return ((values_BT >= torch.minimum(threshold, highest_B1)) & mask_BT).double()
