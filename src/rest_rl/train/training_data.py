"""What a run learns from and is measured on, and an account of the rows that were left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rest_rl.config import EMBEDDED, RunConfig
from rest_rl.data.samples import ToolSample, load_samples
from rest_rl.data.tool_world import SPLITS, tool_world
from rest_rl.train.prompts import PromptLayout


@dataclass
class TrainingData:
    """Training samples, held-out samples with the name of their split, and what was left out of the former."""

    samples: list[ToolSample]
    held_out: list[tuple[str, ToolSample]]
    report: dict[str, Any] = field(default_factory=dict)
    """Of the training file, as `rest-rl data check --json` prints it; empty for the tool world."""
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def refuse(self, sample: ToolSample, error: ValueError) -> None:
        """Leave out a sample that the model's format or chat template cannot hold."""
        self.rejected.append({"sample": sample.id, "reason": str(error)})


def read_data(config: RunConfig, layout: PromptLayout, say: Callable[[str], Any]) -> TrainingData:
    """The data of a run; ValueError if there is nothing to learn from. What was left out is said aloud."""
    data, number = config.data, config.eval.prompts
    if data.path == EMBEDDED:
        unseen = {split: tool_world(config.eval.seed, number, split) for split in SPLITS if split != "train"}
        held_out = [(split, sample) for split, group in unseen.items() for sample in group]
        return TrainingData(tool_world(data.seed, data.samples), held_out)
    held_out = load_samples(data.held_out)[:number] if data.held_out else []
    return TrainingData(load_samples(data.path), [("held out", sample) for sample in held_out])
