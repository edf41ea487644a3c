"""A batch of verl's as tensors, and what is computed from it; imports no verl.

Shapes: B responses in verl's order (balanced over devices, groups are not consecutive), T completion tokens. verl keeps
responses as jagged tensors and may append rows that are padding: their mask is 0 throughout.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rest_rl.config import RunConfig, RunTable
from rest_rl.credit import AdvantageKind, group_advantages
from rest_rl.formats import ToolFormat, get_format
from rest_rl.presets import Preset
from rest_rl.response import NUM_REGIONS
from rest_rl.runlog import Row
from rest_rl.train.record import WeighedBatch, has_ended, response_row
from rest_rl.train.reward import Scored
from rest_rl.train.weighing import (
    SUMS,
    EntropyTracker,
    Weigher,
    region_metrics,
    sums_by_region,
    surprise_metrics,
    surprise_sums,
)

PER_TOKEN = ("responses", "response_mask", "entropy", "old_log_probs", "advantages")
"""verl's names of what a `TokenBatch` is made of."""


class PluginRun(NamedTuple):
    """What verl's trainer needs of a run."""

    run: RunTable
    method: Preset
    format: ToolFormat
    tracker: EntropyTracker

    @classmethod
    def from_toml(cls, text: str) -> PluginRun:
        """Read the run file that verl's configuration carries; a wrong key or value is a ValueError."""
        config = RunConfig.from_toml(text)
        rest = config.rest
        return cls(config.run, rest.resolve(), get_format(rest.format), EntropyTracker(rest.entropy_decay))


PART = 4096
"""Responses that are weighed at a time. The weights do not depend on it: they come from the steps before."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """What verl knows of every token of some responses before it learns from them: each (B, T), padded with 0."""

    ids_BT: Tensor
    mask_BT: Tensor
    entropies_BT: Tensor
    logps_BT: Tensor
    advantages_BT: Tensor

    @classmethod
    def of(cls, rows: Mapping[str, Sequence[Tensor]]) -> TokenBatch:
        """From the rows of verl's fields `PER_TOKEN`."""
        ids, mask, entropies, logps, advantages = (
            torch.nn.utils.rnn.pad_sequence(list(rows[name]), batch_first=True).cpu() for name in PER_TOKEN
        )
        return cls(ids, mask, entropies.float(), logps.float(), advantages)


class Reshaped(NamedTuple):
    """What became of a batch."""

    advantages: Tensor
    """Of each token, weighed; jagged, with the row lengths of the batch."""
    figures: dict[str, float]
    tokens: dict[int, Row]
    """By place, the recorded fields of the responses that were asked for."""


def reshape_batch(
    data: Mapping[str, Tensor],
    weigher: Weigher,
    tracker: EntropyTracker,
    progress: float,
    step: int,
    watched: Collection[int] = (),
) -> Reshaped:
    """Weigh a batch's advantages by what `tracker` knows of the steps before, then let it take in this one.

    `data` holds verl's fields `PER_TOKEN`, jagged or dense; `step` is counted from 1; `watched` are places of responses
    whose tokens are to be recorded.
    """
    rows = {name: data[name].unbind() for name in PER_TOKEN}
    size, statistics, rule_weights_R = len(rows["responses"]), tracker.statistics(), None
    sums_4R, surprise_4 = torch.zeros(4, NUM_REGIONS, dtype=torch.float64), torch.zeros(SUMS, dtype=torch.float64)
    advantages: list[Tensor] = []
    recorded: dict[int, Row] = {}
    part = size if weigher.looks_at_all_tokens else PART
    for first in range(0, size, part):
        mine = {name: rows[name][first : first + part] for name in PER_TOKEN}
        lengths, batch = [len(row) for row in mine["responses"]], TokenBatch.of(mine)
        weighed = weigher.weigh(batch.ids_BT, batch.mask_BT, batch.entropies_BT, statistics, progress, step)
        rule_weights_R = weighed.rule_weights_R
        sums_4R += sums_by_region(weighed, batch.mask_BT, batch.entropies_BT, batch.logps_BT)
        surprise_4 += surprise_sums(batch.logps_BT, batch.entropies_BT, batch.mask_BT)
        reshaped_BT = batch.advantages_BT * weighed.weights_BT
        advantages += [reshaped_BT[row, :length] for row, length in enumerate(lengths)]
        kept = (weighed.regions_BT, weighed.weights_BT, batch.entropies_BT, batch.logps_BT, batch.advantages_BT[:, 0])
        seen = WeighedBatch(torch.arange(first, first + len(lengths)), *kept)
        recorded |= {at: seen.tokens_of(at - first, lengths[at - first]) for at in watched if 0 <= at - first < part}
    tracker.update(sums_4R[:3])
    figures = region_metrics(sums_4R, rule_weights_R) | surprise_metrics(surprise_4)
    figures["entropy"] = float(sums_4R[1].sum() / sums_4R[0].sum())
    return Reshaped(torch.nested.as_nested_tensor(advantages, layout=torch.jagged), figures, recorded)


def advantages_of_groups(rewards_B: Tensor, groups: Sequence[Hashable], kind: AdvantageKind) -> Tensor:
    """`group_advantages` of responses whose groups, named by `groups`, lie scattered and may differ in size: (B,)."""
    _, index_B = np.unique(np.asarray([str(name) for name in groups]), return_inverse=True)
    order_B = np.argsort(index_B, kind="stable")
    sizes_B = np.bincount(index_B)[index_B[order_B]]
    advantages_B = torch.zeros_like(rewards_B)
    for size in np.unique(sizes_B):
        rows = torch.from_numpy(order_B[sizes_B == size])
        advantages_B[rows] = group_advantages(rewards_B[rows], int(size), kind)
    return advantages_B


def share_without_spread(rewards_B: Tensor, groups: Sequence[Hashable]) -> float:
    """The share of groups whose responses all have one reward; NaN without responses."""
    names, index_B = np.unique(np.asarray([str(name) for name in groups]), return_inverse=True)
    rewards = rewards_B.double().numpy()
    least, most = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    np.minimum.at(least, index_B, rewards)
    np.maximum.at(most, index_B, rewards)
    return float((least == most).mean()) if len(names) else float("nan")


@dataclass(frozen=True, eq=False)
class Responses:
    """The responses of a batch, each with its place in it: rewards, prompts, gold."""

    places: Sequence[int]
    ids: Sequence[Tensor]
    rewards_B: Tensor
    groups: Sequence[Hashable]
    golds: Sequence[str]
    """JSON text."""
    origins: Sequence[Mapping[str, Any]]
    """Of each response the `index` and `id` of its sample."""
    scores: Sequence[Mapping[str, Any]]
    prompts: Sequence[str]
    tokenizer: Any
    tool_format: ToolFormat

    def figures(self) -> dict[str, float]:
        """Means over the responses, under the names that they have on TRL."""
        rewards_B = self.rewards_B.double()
        lengths_B = torch.tensor([len(ids) for ids in self.ids], dtype=torch.float64)
        ended_B = torch.tensor([has_ended(ids[-1:].tolist(), self.tokenizer) for ids in self.ids])
        figures = {
            "reward": float(rewards_B.mean()),
            "reward_std": float(rewards_B.std()) if len(rewards_B) > 1 else 0.0,
            "frac_reward_zero_std": share_without_spread(self.rewards_B, self.groups),
            "completions/clipped_ratio": 1 - float(ended_B.double().mean()),
        }
        for name in Scored._fields[1:]:
            figures[f"rest/{name}"] = sum(float(row[name]) for row in self.scores) / len(self.scores)
        for name, chosen_B in (("", lengths_B), ("_terminated", lengths_B[ended_B])):
            if len(chosen_B):
                least, most = float(chosen_B.min()), float(chosen_B.max())
                figures[f"completions/mean{name}_length"] = float(chosen_B.mean())
                figures |= {f"completions/min{name}_length": least, f"completions/max{name}_length": most}
        return figures

    def first(self, limit: int) -> list[int]:
        """The first `limit` responses in the order of the data, as indices into the fields of this object."""
        order = sorted(range(len(self.places)), key=lambda i: (self.origins[i]["index"], str(self.groups[i])))
        return order[:limit]

    def rows(self, chosen: Sequence[int], tokens: Mapping[int, Row], step: int, progress: float) -> list[Row]:
        """The `chosen` responses as responses.jsonl holds them; `tokens` are the recorded fields by place."""
        rows: list[Row] = []
        for i in chosen:
            row: Row = {"step": step, "progress": progress, "id": self.origins[i]["id"]}
            if not rows or rows[-1]["id"] != row["id"]:  # a group shares its prompt
                row["prompt"] = self.prompts[i]
            gold, reward = json.loads(self.golds[i]), float(self.rewards_B[i])
            row |= response_row(self.ids[i].tolist(), gold, reward, self.tokenizer, self.tool_format)
            rows.append(row | tokens[self.places[i]])
        return rows
