"""ResT: token-level policy gradients, reshaped by region, for language models that call tools.

Public names load their module when first used; `import rest_rl` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rest_rl.credit import group_advantages, weight_advantages
    from rest_rl.data.samples import Dialogue, ToolSample, decompose
    from rest_rl.formats import FORMATS, ToolFormat, get_format
    from rest_rl.loss import clipped_surrogate, token_entropy
    from rest_rl.presets import PRESETS, Preset, get_preset, score_response, token_weights
    from rest_rl.regions import tag_regions
    from rest_rl.response import Gold, ParsedResponse, Region, Span, ToolCall
    from rest_rl.rewards import Judgement, Reward, RewardConfig, RewardRule, judge
    from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
    from rest_rl.weights import RegionStatistics, TaggedBatch, WeightConfig, WeightRule

__version__ = "0.1.0"

_HOMES = {
    "credit": ("group_advantages", "weight_advantages"),
    "data.samples": ("Dialogue", "ToolSample", "decompose"),
    "formats": ("FORMATS", "ToolFormat", "get_format"),
    "loss": ("clipped_surrogate", "token_entropy"),
    "presets": ("PRESETS", "Preset", "get_preset", "score_response", "token_weights"),
    "regions": ("tag_regions",),
    "response": ("Gold", "ParsedResponse", "Region", "Span", "ToolCall"),
    "rewards": ("Judgement", "Reward", "RewardConfig", "RewardRule", "judge"),
    "train.trl.trainer": ("ResTConfig", "ResTTrainer"),
    "weights": ("RegionStatistics", "TaggedBatch", "WeightConfig", "WeightRule"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "FORMATS",
    "PRESETS",
    "Dialogue",
    "Gold",
    "Judgement",
    "ParsedResponse",
    "Preset",
    "Region",
    "RegionStatistics",
    "ResTConfig",
    "ResTTrainer",
    "Reward",
    "RewardConfig",
    "RewardRule",
    "Span",
    "TaggedBatch",
    "ToolCall",
    "ToolFormat",
    "ToolSample",
    "WeightConfig",
    "WeightRule",
    "clipped_surrogate",
    "decompose",
    "get_format",
    "get_preset",
    "group_advantages",
    "judge",
    "score_response",
    "tag_regions",
    "token_entropy",
    "token_weights",
    "weight_advantages",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"rest_rl.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'rest_rl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
