"""The held-out splits of the tool world as a benchmark: exact match, greedy, for any checkpoint.

Turns that call and turns that answer are scored apart as well: any answer without a call is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rest_rl.data.samples import ToolSample
from rest_rl.data.tool_world import SPLITS, Decision, tool_world
from rest_rl.evaluate.conversation import Benchmark, Reply, SingleTurn
from rest_rl.evaluate.harness import score_group
from rest_rl.formats import ToolFormat
from rest_rl.response import TURNS, ParsedResponse
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
        return SingleTurn(sample, tool_format, lambda reply, parsed: judge_response(reply, parsed, sample))

    def extras(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The scores of turns that call and of turns that answer, under `turns`."""
        turns = {identity: sample.gold.turn for identity, sample in self.samples.items()}
        sizes = Counter(turns.values())
        own = {turn: [dict(row) for row in rows if turns[row["id"]] == turn] for turn in TURNS}
        return {"turns": {turn: score_group(own[turn], self.metrics, sizes[turn]) for turn in TURNS if own[turn]}}


def judge_response(reply: Reply, parsed: ParsedResponse, sample: ToolSample) -> Mapping[str, Any]:
    """Exact match, and what cost the response its score."""
    judgement = judge_parsed(parsed, sample.gold, truncated=reply.is_truncated)
    return {
        "kind": sample.kind,
        "turn": sample.gold.turn,
        "correct": judgement.exact_match,
        "reason": "; ".join(finding.message for finding in judgement.explanation)[:300],
    }
