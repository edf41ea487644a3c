"""The presets (named combinations of weights, reward and advantages), and token weights for any engine.

Shapes: B responses, T completion tokens, R regions.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from rest_rl.authors_code import authors_step
from rest_rl.credit import AdvantageKind
from rest_rl.errors import UserError, warn_renamed
from rest_rl.formats import ToolFormat, get_format
from rest_rl.response import Gold, Region
from rest_rl.rewards import (
    AuthorsReward,
    Reward,
    RewardConfig,
    RewardRule,
    apply_reward,
    check_reward_rule,
    judge,
)
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
    """A training method: weight rule, reward rule, advantages, and the bounds of the clipped ratio."""

    name: str
    weights: WeightRule
    reward: RewardRule
    advantage: AdvantageKind = "grpo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    """Upper bound of the ratio for negative advantages (dual clip, arXiv 1912.09729); None for no bound."""
    origin: str = field(default="", compare=False)
    """One sentence: what the preset is and where it comes from."""


# The package's weight rules by name: `rule` in `[rest.weights]`.
WEIGHT_RULES: Mapping[str, type] = {**dict.fromkeys(get_args(RuleName), WeightConfig), "authors-code": AuthorsWeights}
# The package's rewards by name: `rule` in `[rest.reward]`.
REWARD_RULES: Mapping[str, type] = {"rescaled": RewardConfig, "authors-code": AuthorsReward}

_UNIFORM = WeightConfig(rule="uniform")
# The paper gives the equations but not their constants, so every number here is ours. They follow the published code in
# relative terms: its weights are within a factor of 2 of each other at the start (0.6 to 1.2), and its curriculum
# raises the lowest of them by half (0.6 to 0.9). Its absolute numbers belong to another scale than Eq. 9.
_REST = WeightConfig(
    entropies="initial",
    w_min=0.7,  # not published; ours
    w_max=1.4,  # not published; ours
    decay_format=0.35,  # a_f: not published; ours
    gain_arguments=0.35,  # a_p: not published; ours
    gain_reasoning=0.35,  # a_t: not published; ours
)
# No schedule: the weights follow the moving averages of the entropies. The strength is low, because in an earlier study
# twice the strength scored lower at temperature 1 where the reasoning determines the calls (docs/results.md).
_REST_LIVE = WeightConfig(strength=0.25, w_min=0.25, w_max=4.0)
# The baselines use the same reward as `rest`, so that a comparison with them isolates the token weights.
_REWARD = RewardConfig()

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "rest",
            _REST,
            _REWARD,
            origin="ResT by the paper's equations (arXiv 2509.21826); its constants are not published, these are ours",
        ),
        Preset(
            "rest_live",
            _REST_LIVE,
            _REWARD,
            origin="ours, not in the paper: gentle weights from running entropies, without a curriculum",
        ),
        Preset(
            "authors-code",
            AuthorsWeights(),
            AuthorsReward(),
            advantage="weighted_token_mean",
            delta=3.0,
            origin="the ResT authors' published code: constant weights with a schedule, its reward, loss and dual clip",
        ),
        Preset(
            "grpo",
            _UNIFORM,
            _REWARD,
            origin="GRPO (arXiv 2402.03300) without KL, with the reward of rest; that of the paper's GRPO is static",
        ),
        Preset(
            "dr_grpo",
            _UNIFORM,
            _REWARD,
            advantage="dr_grpo",
            origin="Dr. GRPO (arXiv 2503.20783): no division by the spread, constant length; with the reward of rest",
        ),
        Preset(
            "dapo",
            _UNIFORM,
            _REWARD,
            advantage="dapo",
            epsilon_high=0.28,
            origin="DAPO (arXiv 2503.14476): mean over tokens and a higher upper clip bound; with the reward of rest",
        ),
    )
}
# Deprecated names of presets.
RENAMED_PRESETS = {"paper": "rest"}

# The supervised baselines: loss weight by region (default 1), normalized to mean 1 over each response.
# tsft's factor is that of ms-swift's loss scale `hermes` for call blocks (https://github.com/modelscope/ms-swift),
# which the published code includes. rsft's factor is ours.
SUPERVISED: dict[str, dict[str, float]] = {
    "sft": {},
    "tsft": {"format": 2.0, "name": 2.0, "arguments": 2.0},
    "rsft": {"reasoning": 2.0},
}
SUPERVISED_ORIGINS: dict[str, str] = {
    "sft": "supervised fine-tuning on the gold turns",
    "tsft": "SFT with the loss doubled on calls; the factor is that of ms-swift, the paper's is not published",
    "rsft": "SFT with the loss doubled on reasoning; the factor is ours, the paper's is not published",
}


def get_origin(preset: str) -> str:
    """Return one sentence that says what a preset is and where it comes from; empty for an unknown name."""
    known = PRESETS.get(preset)
    return SUPERVISED_ORIGINS.get(preset, "") if known is None else known.origin


def get_preset(preset: str | Preset) -> Preset:
    """Return the preset of this name, or the object itself; UserError for an unknown name."""
    if isinstance(preset, Preset):
        return preset
    if preset in RENAMED_PRESETS:
        warn_renamed(f"the preset {preset}", RENAMED_PRESETS[preset])
        preset = RENAMED_PRESETS[preset]
    if preset not in PRESETS:
        expected = f"one of {', '.join(PRESETS)} (for training also {', '.join(SUPERVISED)})"
        near = difflib.get_close_matches(preset, [*PRESETS, *SUPERVISED], n=1)
        remedy = f"did you mean {near[0]}?" if near else "choose one of them"
        raise UserError(f"unknown preset {preset!r}", expected, remedy)
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
    """Return the preset's reward for a response at a progress in [0, 1]; malformed text scores low and never raises.

    `step` is the absolute training step for `authors-code`, by default progress * 150. Set `truncated` for a
    response that was cut off; its format score is then 0.
    """
    reward, tool_format = get_preset(preset).reward, get_format(format)
    check_reward_rule(reward, tool_format)
    return apply_reward(reward, judge(text, gold, tool_format, truncated=truncated), progress, step)


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
    """Return the weight of every sampled token, 0 where masked. Shape (B, T), float32.

    The mean is 1 over each response, or over each turn or the batch if the rule's `normalization` says so.

    Multiply the advantages by these weights (`rest_rl.credit.weight_advantages`); your engine's loss stays unchanged.

    Args:
        ids_BT: Sampled token ids, including the end-of-sequence token.
        mask_BT: 1 for tokens in the loss, 0 for padding and tool results.
        tokenizer: A transformers fast tokenizer or a `tokenizers.Tokenizer`.
        format: A format's name or a `ToolFormat`.
        preset: A preset's name or a `Preset`.
        rule: A weight rule to use instead of the preset's.
        progress: Curriculum progress nu in [0, 1]; step / 150 for `authors-code`.
        step: Absolute training step instead of the progress, for `authors-code` only.
        entropies: Policy entropies in nats: one per token (B, T), the mean of each region by label (regions that are
            missing get weight 1), or `RegionStatistics`; for micro-batches, pass the statistics of the global batch.
        collisions: 1 - sum_v p_v^2 (p: the policy) per token or per region, for the rule `collision`.
        regions_BT: Result of `tag_regions`, if you already have it.
    """
    import torch

    from rest_rl.regions import tag_regions

    preset, tool_format, device = get_preset(preset), get_format(format), ids_BT.device
    chosen = preset.weights if rule is None else rule
    ids_BT, mask_BT = ids_BT.cpu(), mask_BT.cpu()  # tagging needs NumPy, and MPS has no float64
    entropies = entropies.cpu() if isinstance(entropies, torch.Tensor) else entropies
    collisions = collisions.cpu() if isinstance(collisions, torch.Tensor) else collisions
    is_published = isinstance(chosen, AuthorsWeights)
    if step is not None and not (is_published and 0 <= step < float("inf")):
        problem = f"step is {step} with preset {preset.name!r}"
        raise UserError(problem, "a step of at least 0, and only with authors-code", "pass progress instead")
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
    import torch

    from rest_rl.regions import region_sums

    if isinstance(entropies, RegionStatistics):
        return entropies
    if isinstance(rule, WeightConfig) and rule.needs_statistics:
        known = entropies is not None or (rule.rule == "collision" and collisions is not None)
        if not known:
            raise UserError(
                f"the rule {rule.rule!r} needs entropies",
                "a (B, T) tensor or the mean of each region",
                "pass entropies, or choose a preset that needs none (grpo, dr_grpo, dapo, authors-code)",
            )
    if entropies is None and collisions is None:
        return None
    _, counts_R = region_sums(torch.zeros(batch.regions_BT.shape), batch.regions_BT, batch.mask_BT)
    collisions_R = None if collisions is None else _means(collisions, batch)
    return RegionStatistics(counts_R, _means(entropies, batch), collisions_R)


def _means(values: Tensor | Mapping[str, float] | None, batch: TaggedBatch) -> Tensor:
    # float64 (R,) in the order of `Region`, NaN where unknown.
    import torch

    from rest_rl.regions import region_means

    if isinstance(values, torch.Tensor):
        return region_means(values, batch.regions_BT, batch.mask_BT)
    given, labels = dict(values or {}), [region.label for region in Region]
    if unknown := sorted(set(given) - set(labels)):
        raise UserError(f"unknown regions {unknown}", f"some of {', '.join(labels)}", "correct them")
    return torch.tensor([float(given.get(label, float("nan"))) for label in labels], dtype=torch.float64)
