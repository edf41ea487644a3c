"""The method put together: the named presets, and one call that weighs the tokens of a batch for any engine.

Shapes: B responses, T completion tokens, R regions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rest_rl.authors_code import authors_normalise, authors_weights
from rest_rl.credit import AdvantageKind
from rest_rl.formats import ToolFormat, get_format
from rest_rl.regions import region_means, region_sums, tag_regions, token_bytes, turns
from rest_rl.response import NUM_REGIONS, Region
from rest_rl.rewards import RewardConfig
from rest_rl.scoring import PRESET_REWARDS, authors_step
from rest_rl.weights import (
    RegionStatistics,
    WeightConfig,
    apply_curriculum,
    assign_weights,
    keep_top_entropy,
    normalise,
    region_weights,
)


@dataclass(frozen=True)
class Preset:
    """A training method: how tokens are weighed, how responses are rewarded and compared, where ratios are clipped.

    `weights` is None where the published code's own token weights apply, `reward` where its own reward does.
    """

    name: str
    weights: WeightConfig | None
    reward: RewardConfig | None
    advantage: AdvantageKind = "grpo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2


_UNIFORM = WeightConfig(rule="uniform")
# No schedule: the weights follow the running entropies. The strength is gentle because twice as much costs accuracy
# where the reasoning decides (docs/results.md).
_REST = WeightConfig(strength=0.25, w_min=0.25, w_max=4.0)
# a_f = a_p = a_t = 0.3: the published code moves its weights by 0.002 a step over a schedule of 150 steps
_PAPER = WeightConfig(w_min=0.001, w_max=8.0, decay_format=0.3, gain_arguments=0.3, gain_reasoning=0.3)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("rest", _REST, PRESET_REWARDS["rest"]),
        Preset("paper", _PAPER, PRESET_REWARDS["paper"]),
        Preset("authors-code", None, PRESET_REWARDS["authors-code"]),
        Preset("grpo", _UNIFORM, PRESET_REWARDS["grpo"]),
        Preset("dr_grpo", _UNIFORM, PRESET_REWARDS["dr_grpo"], advantage="dr_grpo"),
        Preset("dapo", _UNIFORM, PRESET_REWARDS["dapo"], advantage="dapo", epsilon_high=0.28),
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
    """The preset of that name, or the object itself; ValueError for an unknown name."""
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise ValueError(
            f"got preset {preset!r}, expected one of {', '.join(PRESETS)} (for training also {', '.join(SUPERVISED)}), "
            "or a Preset object"
        )
    return PRESETS[preset]


def token_weights(
    ids_BT: Tensor,
    mask_BT: Tensor,
    tokenizer: Any,
    *,
    format: str | ToolFormat = "toolrl",
    preset: str | Preset = "rest",
    progress: float = 0.0,
    step: float | None = None,
    entropies: Tensor | Mapping[str, float] | RegionStatistics | None = None,
    collisions: Tensor | Mapping[str, float] | None = None,
) -> Tensor:
    """The gradient weight of every sampled token: float32 (B, T), mean 1 over each response, 0 where masked.

    Multiply them into the advantages (`rest_rl.credit.reshape`) and leave the engine's loss as it is.

    Args:
        ids_BT: sampled token ids of the completions, end-of-sequence token included.
        mask_BT: 1 for tokens that take part in the loss, 0 for padding and tool results; each run of ones is one turn.
        tokenizer: a transformers fast tokenizer or a `tokenizers.Tokenizer`.
        format: "toolrl", "hermes" or a `ToolFormat` object.
        preset: a name out of `PRESETS` or a `Preset` of your own.
        progress: training progress nu in [0, 1]. The preset authors-code reads it as step / 150.
        step: absolute training step, for the preset authors-code alone, instead of progress.
        entropies: policy entropies in nats: one per token (B, T), from which the region means are taken; a mapping from
            region label to its mean ("format", "name", ...), where a region that is left out weighs 1; or whole
            `RegionStatistics`, such as those of the global batch, so that every micro-batch is weighed alike.
        collisions: 1 - sum_v p_v^2 in the same two forms, for the rule `collision`.

    Raises:
        ValueError: the shapes differ, a name is unknown, progress is out of range, or the rule reads entropies and got
            none.
    """
    preset, tool_format, device = get_preset(preset), get_format(format), ids_BT.device
    ids_BT, mask_BT = ids_BT.cpu(), mask_BT.cpu()  # tagging runs there, and not every device has float64
    entropies = entropies.cpu() if isinstance(entropies, Tensor) else entropies
    collisions = collisions.cpu() if isinstance(collisions, Tensor) else collisions
    if step is not None and (preset.weights is not None or not 0 <= step < float("inf")):
        raise ValueError(f"got step {step} for preset {preset.name!r}; expected step >= 0, and for authors-code alone")
    if preset.weights is None:
        return _authors_token_weights(
            ids_BT, mask_BT, tokenizer, tool_format, authors_step(progress) if step is None else step
        ).to(device)
    regions_BT = tag_regions(ids_BT, mask_BT, tokenizer, lambda text: tool_format.parse(text).spans, tool_format.tags)
    return _weigh_regions(regions_BT, mask_BT, preset, progress, entropies, collisions).to(device)


def _weigh_regions(
    regions_BT: Tensor,
    mask_BT: Tensor,
    preset: Preset,
    progress: float,
    entropies: Tensor | Mapping[str, float] | RegionStatistics | None,
    collisions: Tensor | Mapping[str, float] | None,
) -> Tensor:
    config = preset.weights
    assert config is not None
    if config.rule == "top_entropy":
        if not isinstance(entropies, Tensor):
            raise ValueError("the rule 'top_entropy' chooses single tokens; pass entropies as a (B, T) tensor")
        return normalise(keep_top_entropy(entropies, mask_BT, config.quantile), mask_BT)
    statistics = None
    if config.needs_statistics:
        if entropies is None and (config.rule != "collision" or collisions is None):
            raise ValueError(
                f"the rule {config.rule!r} of preset {preset.name!r} needs entropies; pass a (B, T) tensor or region "
                "means, or choose a preset that measures nothing (grpo, dr_grpo, dapo, authors-code)"
            )
        if isinstance(entropies, RegionStatistics):
            statistics = entropies
        else:
            statistics = _statistics(regions_BT, mask_BT, entropies, collisions)
    weights_R = apply_curriculum(region_weights(statistics, config), progress, config)
    return assign_weights(weights_R, regions_BT, mask_BT)


def _statistics(
    regions_BT: Tensor,
    mask_BT: Tensor,
    entropies: Tensor | Mapping[str, float] | None,
    collisions: Tensor | Mapping[str, float] | None,
) -> RegionStatistics:
    _, counts_R = region_sums(torch.zeros(regions_BT.shape), regions_BT, mask_BT)
    collisions_R = None if collisions is None else _means(collisions, regions_BT, mask_BT)
    return RegionStatistics(counts_R, _means(entropies, regions_BT, mask_BT), collisions_R)


def _means(values: Tensor | Mapping[str, float] | None, regions_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Region means of per-token values, or the given ones in the order of `Region`: float64 (R,), NaN where unknown."""
    if values is None:
        return torch.full((NUM_REGIONS,), float("nan"), dtype=torch.float64)
    if isinstance(values, Tensor):
        return region_means(values, regions_BT, mask_BT)
    labels = [region.label for region in Region]
    unknown = set(values) - set(labels)
    if unknown:
        raise ValueError(f"got values for the regions {sorted(unknown)}, expected some of {', '.join(labels)}")
    return torch.tensor([float(values.get(label, float("nan"))) for label in labels], dtype=torch.float64)


def _authors_token_weights(
    ids_BT: Tensor, mask_BT: Tensor, tokenizer: Any, tool_format: ToolFormat, step: float
) -> Tensor:
    """The published code's weights, which know the tags of one format, turn by turn: float32 (B, T)."""
    if tool_format.name not in ("toolrl", "hermes"):
        raise ValueError(f"preset 'authors-code' got format {tool_format.name!r}, expected toolrl or hermes")
    table = token_bytes(tokenizer)
    mask, raw = mask_BT.bool().numpy(), np.zeros(ids_BT.shape, dtype=np.float32)
    for row, start, end in zip(*turns(mask), strict=True):
        pieces = table.text_pieces(ids_BT[row, start:end].tolist())
        raw[row, start:end] = authors_weights(pieces, step, trim_spaces=table.trims_offsets)
    for row in range(len(raw)):
        raw[row] = authors_normalise(raw[row], mask[row])
    return torch.from_numpy(raw)
