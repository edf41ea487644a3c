"""ResT: region-weighted policy gradients for language models that call tools.

Public names are imported when they are first used; `import rest_rl` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rest_rl.compare.collect import ComparisonReport
    from rest_rl.compare.run import compare
    from rest_rl.config import RunConfig
    from rest_rl.credit import CreditConfig, StageCredits, stage_credits
    from rest_rl.data.check import DataReport
    from rest_rl.data.load import check_data, load_dataset
    from rest_rl.data.samples import ToolSample
    from rest_rl.data.shapes import RowShape
    from rest_rl.envs.demonstrate import write_demonstrations
    from rest_rl.envs.load import load_environment
    from rest_rl.envs.session import Environment, Result, ToolSession
    from rest_rl.errors import UserError
    from rest_rl.evaluate.conversation import Benchmark
    from rest_rl.evaluate.run import EvalResult, evaluate
    from rest_rl.formats import FORMATS, ToolFormat, get_format
    from rest_rl.presets import PRESETS, Preset, compute_token_weights
    from rest_rl.probe.report import ProbeReport
    from rest_rl.probe.run import probe
    from rest_rl.regions import tag_regions
    from rest_rl.response import Gold, ParsedResponse, Region, Span, ToolCall
    from rest_rl.rewards import Judgement, RewardRule, judge
    from rest_rl.runlog import Observer
    from rest_rl.train.prompts import build_training_dataset
    from rest_rl.train.run import RunResult, train
    from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
    from rest_rl.weights import RegionStatistics, TaggedBatch, WeightRule

__version__ = "0.1.0"

_HOMES = {
    "compare.collect": ("ComparisonReport",),
    "config": ("RunConfig",),
    "credit": ("CreditConfig", "StageCredits", "stage_credits"),
    "data.check": ("DataReport",),
    "data.load": ("check_data", "load_dataset"),
    "data.samples": ("ToolSample",),
    "data.shapes": ("RowShape",),
    "envs.demonstrate": ("write_demonstrations",),
    "envs.load": ("load_environment",),
    "envs.session": ("Environment", "Result", "ToolSession"),
    "errors": ("UserError",),
    "evaluate.conversation": ("Benchmark",),
    "evaluate.run": ("EvalResult",),
    "formats": ("FORMATS", "ToolFormat", "get_format"),
    "presets": ("PRESETS", "Preset", "compute_token_weights"),
    "probe.report": ("ProbeReport",),
    "regions": ("tag_regions",),
    "response": ("Gold", "ParsedResponse", "Region", "Span", "ToolCall"),
    "rewards": ("Judgement", "RewardRule", "judge"),
    "runlog": ("Observer",),
    "train.prompts": ("build_training_dataset",),
    "train.run": ("RunResult",),
    "train.trl.trainer": ("ResTConfig", "ResTTrainer"),
    "weights": ("RegionStatistics", "TaggedBatch", "WeightRule"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_RENAMED = {"token_weights": "compute_token_weights", "training_dataset": "build_training_dataset"}
# Packages that can be called like functions (`rest_rl.objects.make_package_callable`).
_WORKFLOWS = ("compare", "evaluate", "probe", "train")

__all__ = [
    "FORMATS",
    "PRESETS",
    "Benchmark",
    "ComparisonReport",
    "CreditConfig",
    "DataReport",
    "Environment",
    "EvalResult",
    "Gold",
    "Judgement",
    "Observer",
    "ParsedResponse",
    "Preset",
    "ProbeReport",
    "Region",
    "RegionStatistics",
    "ResTConfig",
    "ResTTrainer",
    "Result",
    "RewardRule",
    "RowShape",
    "RunConfig",
    "RunResult",
    "Span",
    "StageCredits",
    "TaggedBatch",
    "ToolCall",
    "ToolFormat",
    "ToolSample",
    "ToolSession",
    "UserError",
    "WeightRule",
    "build_training_dataset",
    "check_data",
    "compare",
    "compute_token_weights",
    "evaluate",
    "get_format",
    "judge",
    "load_dataset",
    "load_environment",
    "probe",
    "stage_credits",
    "tag_regions",
    "train",
    "write_demonstrations",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"rest_rl.{_HOME_OF[name]}"), name)
    if name in _WORKFLOWS:
        return importlib.import_module(f"rest_rl.{name}")
    if name in _RENAMED:
        from rest_rl.errors import warn_renamed

        warn_renamed(f"rest_rl.{name}", f"rest_rl.{_RENAMED[name]}")
        return __getattr__(_RENAMED[name])
    raise AttributeError(f"module 'rest_rl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
