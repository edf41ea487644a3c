"""The method put together: the named presets, and one call that weighs the tokens of a batch for any engine.

Shapes: B responses, T completion tokens, R regions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from rest_rl.authors_code import authors_step
from rest_rl.credit import AdvantageKind
from rest_rl.errors import UserError
from rest_rl.formats import ToolFormat, get_format
from rest_rl.response import Gold, Region
from rest_rl.rewards import AuthorsReward, Reward, RewardConfig, RewardRule, apply_reward, judge
from rest_rl.weights import (
    AuthorsWeights,
    RegionStatistics,
    RuleName,
    TaggedBatch,
    WeightConfig,
    WeightRule,
    apply_weight_rule,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Preset:
    """A training method: how tokens are weighed, how responses are rewarded and compared, where ratios are clipped."""

    name: str
    weights: WeightRule
    reward: RewardRule
    advantage: AdvantageKind = "grpo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2


WEIGHT_RULES: Mapping[str, type] = {**dict.fromkeys(get_args(RuleName), WeightConfig), "authors-code": AuthorsWeights}
"""The package's weight rules by name: `rule` in `[rest.weights]`."""
REWARD_RULES: Mapping[str, type] = {"rescaled": RewardConfig, "authors-code": AuthorsReward}
"""The package's rewards by name: `rule` in `[rest.reward]`."""

_UNIFORM = WeightConfig(rule="uniform")
# No schedule: the weights follow the running entropies. The strength is gentle because twice as much costs accuracy
# where the reasoning decides (docs/results.md).
_REST = WeightConfig(strength=0.25, w_min=0.25, w_max=4.0)
# a_f = a_p = a_t = 0.3: the published code moves its weights by 0.002 a step over a schedule of 150 steps
_PAPER = WeightConfig(w_min=0.001, w_max=8.0, decay_format=0.3, gain_arguments=0.3, gain_reasoning=0.3)
# The baselines share the reward of `rest`, so that a comparison with them is one of token weights only.
_REWARD = RewardConfig()

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("rest", _REST, _REWARD),
        Preset("paper", _PAPER, RewardConfig(accuracy_share_start=0.0, accuracy_share_end=1.0)),
        Preset("authors-code", AuthorsWeights(), AuthorsReward()),
        Preset("grpo", _UNIFORM, _REWARD),
        Preset("dr_grpo", _UNIFORM, _REWARD, advantage="dr_grpo"),
        Preset("dapo", _UNIFORM, _REWARD, advantage="dapo", epsilon_high=0.28),
    )
}

SUPERVISED: dict[str, dict[str, float]] = {
    "sft": {},
    "tsft": {"format": 2.0, "name": 2.0, "arguments": 2.0},
    "rsft": {"reasoning": 2.0},
}
"""The supervised baselines: loss weight by region, 1 where absent, of mean 1 over each response.

The factor of tsft is that of ms-swift's loss scale `hermes` on call blocks (https://github.com/modelscope/ms-swift),
which the published code carries; that of rsft is ours.
"""


def get_preset(preset: str | Preset) -> Preset:
    """The preset of that name, or the object itself; UserError for an unknown name."""
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise UserError(
            f"preset {preset!r}",
            f"one of {', '.join(PRESETS)} (for training also {', '.join(SUPERVISED)})",
            "choose one of them, or pass a Preset object",
        )
    return PRESETS[preset]


def score_response(
    text: str,
    gold: Gold,
    *,
    format: str | ToolFormat = "toolrl",
    preset: str | Preset = "rest",
    progress: float = 0.0,
    step: float | None = None,
    truncated: bool = False,
) -> Reward:
    """Reward a response as the preset does at training progress in [0, 1]; malformed text scores low and never raises.

    For the preset `authors-code` the schedule counts absolute steps: `step`, or progress * 150. `truncated`: the
    response was cut off before its end, which leaves it without S_format.
    """
    judgement = judge(text, gold, format, truncated=truncated)
    return apply_reward(get_preset(preset).reward, judgement, progress, step)


def compute_token_weights(
    ids_BT: Tensor,
    mask_BT: Tensor,
    tokenizer: Any,
    *,
    format: str | ToolFormat = "toolrl",
    preset: str | Preset = "rest",
    rule: WeightRule | None = None,
    progress: float = 0.0,
    step: float | None = None,
    entropies: Tensor | Mapping[str, float] | RegionStatistics | None = None,
    collisions: Tensor | Mapping[str, float] | None = None,
    regions_BT: Tensor | None = None,
) -> Tensor:
    """The gradient weight of every sampled token: float32 (B, T), mean 1 over each response, 0 where masked.

    Multiply them into the advantages (`rest_rl.credit.weight_advantages`) and leave the engine's loss as it is.

    Args:
        ids_BT: sampled token ids of the completions, end-of-sequence token included.
        mask_BT: 1 for tokens that take part in the loss, 0 for padding and tool results.
        tokenizer: transformers' or a `tokenizers.Tokenizer`.
        format: a name or a `ToolFormat` object.
        preset: a name or a `Preset` object.
        rule: a weight rule instead of the preset's.
        progress: training progress nu in [0, 1]. The preset authors-code reads it as step / 150.
        step: absolute training step, for authors-code only, instead of progress.
        entropies: policy entropies in nats: one per token (B, T); a mapping from region label to mean, where a region
            that is left out weighs 1; or `RegionStatistics`, such as those of the global batch for each micro-batch.
        collisions: 1 - sum_v p_v^2 in the same two forms, for the rule `collision`.
        regions_BT: what `tag_regions` found, if it has been called.

    Raises:
        UserError: an unknown name, a progress out of range, a rule that got no entropies; ValueError: other shapes.
    """
    import torch

    from rest_rl.regions import tag_regions

    preset, tool_format, device = get_preset(preset), get_format(format), ids_BT.device
    chosen = preset.weights if rule is None else rule
    ids_BT, mask_BT = ids_BT.cpu(), mask_BT.cpu()  # tagging runs there, and not every device has float64
    entropies = entropies.cpu() if isinstance(entropies, torch.Tensor) else entropies
    collisions = collisions.cpu() if isinstance(collisions, torch.Tensor) else collisions
    is_published = isinstance(chosen, AuthorsWeights)
    if step is not None and not (is_published and 0 <= step < float("inf")):
        raise UserError(f"step {step} for preset {preset.name!r}", "step >= 0, and for authors-code only", "remove it")
    if is_published and step is None:
        step = authors_step(progress)
    batch = TaggedBatch(
        ids_BT,
        mask_BT,
        tag_regions(ids_BT, mask_BT, tokenizer, tool_format) if regions_BT is None else regions_BT.cpu(),
        tokenizer,
        tool_format.name,
        step=1 if step is None else step,
        entropies_BT=entropies if isinstance(entropies, torch.Tensor) else None,
    )
    statistics = _resolve_statistics(batch, chosen, entropies, collisions)
    return apply_weight_rule(chosen, batch, statistics, progress).to(device)


def _resolve_statistics(
    batch: TaggedBatch,
    rule: WeightRule,
    entropies: Tensor | Mapping[str, float] | RegionStatistics | None,
    collisions: Tensor | Mapping[str, float] | None,
) -> RegionStatistics | None:
    """Region statistics from what the caller knows; UserError where a rule of the package needs more."""
    import torch

    from rest_rl.regions import region_sums

    if isinstance(entropies, RegionStatistics):
        return entropies
    if isinstance(rule, WeightConfig) and rule.needs_statistics:
        known = entropies is not None or (rule.rule == "collision" and collisions is not None)
        if not known:
            raise UserError(
                f"no entropies, which the rule {rule.rule!r} needs",
                "a (B, T) tensor or region means",
                "pass them, or choose a preset that measures nothing (grpo, dr_grpo, dapo, authors-code)",
            )
    if entropies is None and collisions is None:
        return None
    _, counts_R = region_sums(torch.zeros(batch.regions_BT.shape), batch.regions_BT, batch.mask_BT)
    collisions_R = None if collisions is None else _means(collisions, batch)
    return RegionStatistics(counts_R, _means(entropies, batch), collisions_R)


def _means(values: Tensor | Mapping[str, float] | None, batch: TaggedBatch) -> Tensor:
    """Region means of per-token values, or the given ones in the order of `Region`: float64 (R,), NaN where unknown."""
    import torch

    from rest_rl.regions import region_means

    if isinstance(values, torch.Tensor):
        return region_means(values, batch.regions_BT, batch.mask_BT)
    given, labels = dict(values or {}), [region.label for region in Region]
    if unknown := sorted(set(given) - set(labels)):
        raise UserError(f"values for the regions {unknown}", f"some of {', '.join(labels)}", "correct the label")
    return torch.tensor([float(given.get(label, float("nan"))) for label in labels], dtype=torch.float64)
