"""The held-out splits of the tool world as a benchmark: exact match, greedy, for any checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rest_rl.data.samples import ToolSample
from rest_rl.data.tool_world import SPLITS, Decision, tool_world
from rest_rl.evaluate.conversation import Benchmark, SingleTurn
from rest_rl.formats import ToolFormat
from rest_rl.response import ParsedResponse
from rest_rl.rewards import judge_parsed


class ToolWorldTasks(Benchmark):
    """The first prompts of each held-out split, those that a training run measures by default."""

    name = "tool_world"

    def __init__(self, *, seed: int, prompts: int, decision: Decision = "reasoning") -> None:
        """`prompts` per split, as `[eval]` of a run counts them."""
        decided = "" if decision == "reasoning" else f", decided in the {decision}"
        self.pin = f"tool world (seed {seed}, {prompts} prompts per split{decided})"
        self.samples: dict[str, ToolSample] = {}
        for split in SPLITS[1:]:
            for index, sample in enumerate(tool_world(seed, prompts, split, decision=decision)):
                self.samples[f"{split}/{index}"] = replace(sample, id=f"{split}/{index}")
        self.groups = {identity: identity.partition("/")[0] for identity in self.samples}

    def start(self, identity: str, tool_format: ToolFormat) -> SingleTurn:
        sample = self.samples[identity]
        return SingleTurn(sample, tool_format, lambda _, parsed: verdict(parsed, sample))


def verdict(parsed: ParsedResponse, sample: ToolSample) -> Mapping[str, Any]:
    """Exact match, and what cost the response its score."""
    judgement = judge_parsed(parsed, sample.gold)
    return {
        "kind": sample.kind,
        "correct": judgement.exact_match,
        "reason": "; ".join(finding.message for finding in judgement.explanation)[:300],
    }
