"""The held-out splits of a world (a generator of dialogues) as a benchmark that scores exact match, for any model.

Call turns and answer turns are also scored separately. In an answer turn any response without a call is correct.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rest_rl.config import EMBEDDED, WORLDS
from rest_rl.data.samples import ToolSample
from rest_rl.data.tool_world import Decision
from rest_rl.data.worlds import open_world
from rest_rl.evaluate.conversation import Benchmark, Reply, SingleTurn
from rest_rl.evaluate.harness import score_group
from rest_rl.formats import ToolFormat
from rest_rl.response import TURNS, ParsedResponse
from rest_rl.rewards import judge_parsed


class WorldTasks(Benchmark):
    """The first `prompts` prompts of each held-out split; by default, a training run evaluates the same prompts.

    `world` is a value of `data.path`, one of `config.WORLDS`.
    """

    def __init__(self, world: str = EMBEDDED, *, seed: int, prompts: int, decision: Decision = "reasoning") -> None:
        # `prompts` is the number per split, as in [eval] of a run file
        title = WORLDS[world].replace("-", " ")
        self.name = title.replace(" ", "_")
        decided = "" if decision == "reasoning" else f", decided in the {decision}"
        self.pin = f"{title} (seed {seed}, {prompts} prompts per split{decided})"
        self.samples: dict[str, ToolSample] = {}
        drawn = open_world(world, decision)
        for split in drawn.held_out:
            for index, sample in enumerate(drawn.draw(seed, prompts, split)):
                self.samples[f"{split}/{index}"] = replace(sample, id=f"{split}/{index}")
        self.groups = {identity: identity.partition("/")[0] for identity in self.samples}

    def start(self, identity: str, tool_format: ToolFormat) -> SingleTurn:
        sample = self.samples[identity]
        return SingleTurn(sample, tool_format, lambda reply, parsed: judge_response(reply, parsed, sample))

    def extras(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return `turns`, the separate scores of call turns and answer turns."""
        turns = {identity: sample.gold.turn for identity, sample in self.samples.items()}
        sizes = Counter(turns.values())
        own = {turn: [dict(row) for row in rows if turns[row["id"]] == turn] for turn in TURNS}
        return {"turns": {turn: score_group(own[turn], self.metrics, sizes[turn]) for turn in TURNS if own[turn]}}


def judge_response(reply: Reply, parsed: ParsedResponse, sample: ToolSample) -> Mapping[str, Any]:
    """Return exact match as `correct`, the mistakes of the response as `reason`, and the sample's `kind` and `turn`."""
    judgement = judge_parsed(parsed, sample.gold, truncated=reply.is_truncated)
    return {
        "kind": sample.kind,
        "turn": sample.gold.turn,
        "correct": judgement.exact_match,
        "reason": "; ".join(finding.message for finding in judgement.explanation)[:300],
    }
