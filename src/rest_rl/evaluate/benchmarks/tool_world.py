"""The held-out splits of the tool world as a benchmark: exact match, greedy, for any checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rest_rl.data.samples import ToolSample
from rest_rl.data.tool_world import SPLITS, Decision, tool_world
from rest_rl.evaluate.conversation import SingleTurn
from rest_rl.formats import ToolFormat
from rest_rl.response import ParsedResponse
from rest_rl.rewards import exact_match, score


class ToolWorldTasks:
    """The first prompts of each held-out split, those that a training run measures by default."""

    name = "tool_world"
    metrics = ("correct",)
    group_field = "category"

    def __init__(self, *, seed: int, prompts: int, decision: Decision = "reasoning") -> None:
        """`prompts` per split, as `[eval]` of a run counts them."""
        self.seed, self.prompts, self.decision = seed, prompts, decision
        self.samples: dict[str, ToolSample] = {}
        self.groups: dict[str, str | int] = {}
        for split in SPLITS:
            drawn = tool_world(seed, prompts, split, decision=decision) if split != "train" else ()
            for index, sample in enumerate(drawn):
                identity = f"{split}/{index}"
                self.samples[identity], self.groups[identity] = replace(sample, id=identity), split

    @property
    def pin(self) -> str:
        """What the prompts are drawn with."""
        decided = "" if self.decision == "reasoning" else f", decided in the {self.decision}"
        return f"tool world (seed {self.seed}, {self.prompts} prompts per split{decided})"

    def start(self, identity: str, tool_format: ToolFormat) -> SingleTurn:
        """Begin a sample."""
        sample = self.samples[identity]
        return SingleTurn(sample, tool_format, lambda _, parsed: verdict(parsed, sample))

    def extras(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Nothing besides the groups."""
        del rows
        return {}

    def close(self) -> None:
        """Nothing is held."""


def verdict(parsed: ParsedResponse, sample: ToolSample) -> Mapping[str, Any]:
    """Exact match, and what cost the response its score."""
    findings = score(parsed, sample.gold).explanation
    return {
        "kind": sample.kind,
        "correct": exact_match(parsed, sample.gold),
        "reason": "; ".join(finding.message for finding in findings)[:300],
    }
