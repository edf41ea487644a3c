"""A batch of verl's as tensors, and what is computed from it; imports no verl.

Shapes: B responses in verl's order (balanced over devices, groups are not consecutive), T completion tokens. verl keeps
responses as jagged tensors and may append rows that are padding: their mask is 0 throughout.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rest_rl.advantages import AdvantageKind, group_advantages
from rest_rl.formats import ToolFormat
from rest_rl.runlog import Row
from rest_rl.train.entropy_tracker import EntropyTracker
from rest_rl.train.response_record import WeighedBatch, has_ended, response_row
from rest_rl.train.surprise import surprise_metrics, surprise_sums
from rest_rl.train.tool_reward import Scored
from rest_rl.train.weighing import Weigher, region_metrics, sums_by_region

PER_TOKEN = ("responses", "response_mask", "entropy", "old_log_probs", "advantages")
"""verl's names of what a `TokenBatch` is made of."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """What verl knows of every token of a batch of responses before it learns from them: each (B, T)."""

    ids_BT: Tensor
    mask_BT: Tensor
    entropies_BT: Tensor
    logps_BT: Tensor
    advantages_BT: Tensor

    @classmethod
    def of(cls, data: Mapping[str, Tensor]) -> TokenBatch:
        """From verl's fields `PER_TOKEN`, jagged or dense."""
        ids, mask, entropies, logps, advantages = (dense(data[name]).cpu() for name in PER_TOKEN)
        return cls(ids, mask, entropies.float(), logps.float(), advantages)

    def response(self, row: int) -> list[int]:
        """The ids of one response."""
        return self.ids_BT[row, : int(self.mask_BT[row].sum())].tolist()

    def reshape(
        self, weigher: Weigher, tracker: EntropyTracker, progress: float, step: int
    ) -> tuple[WeighedBatch, dict[str, float]]:
        """Weigh the tokens by what `tracker` knows of the steps before, then let it take in this one.

        `step` is counted from 1. Returns the weights and where they come from, and the step's figures.
        """
        weighed = weigher.weigh(self.ids_BT, self.mask_BT, self.entropies_BT, tracker.statistics(), progress, step)
        sums_4R = sums_by_region(weighed, self.mask_BT, self.entropies_BT, self.logps_BT)
        tracker.update(sums_4R[:3])
        figures = region_metrics(sums_4R, weighed.rule_weights_R)
        figures |= surprise_metrics(surprise_sums(self.logps_BT, self.entropies_BT, self.mask_BT))
        figures["entropy"] = float(sums_4R[1].sum() / sums_4R[0].sum())
        places_B, advantages_B = torch.arange(len(self.ids_BT)), self.advantages_BT[:, 0]
        kept = (weighed.regions_BT, weighed.weights_BT, self.entropies_BT, self.logps_BT)
        return WeighedBatch(places_B, *kept, advantages_B), figures


def dense(values: Tensor, padding: float = 0.0) -> Tensor:
    """A jagged tensor as (B, T), padded on the right; a dense one as it is."""
    return values.to_padded_tensor(padding) if values.is_nested else values


def jagged_like(values_BT: Tensor, model: Tensor) -> Tensor:
    """`values_BT` with the row lengths of the jagged tensor `model`."""
    lengths = cast(Any, model).offsets().diff().tolist()  # a method of nested tensors alone
    rows = [values_BT[row, :length] for row, length in enumerate(lengths)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


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
    ids: Sequence[Sequence[int]]
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
        ended_B = torch.tensor([has_ended(ids, self.tokenizer) for ids in self.ids])
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

    def rows(self, weighed: WeighedBatch, step: int, progress: float, limit: int) -> list[Row]:
        """The first `limit` responses in the order of the data, as responses.jsonl holds them."""
        order = sorted(range(len(self.places)), key=lambda i: (self.origins[i]["index"], str(self.groups[i])))
        rows: list[Row] = []
        for i in order[:limit]:
            row: Row = {"step": step, "progress": progress, "id": self.origins[i]["id"]}
            if not rows or rows[-1]["id"] != row["id"]:  # a group shares its prompt
                row["prompt"] = self.prompts[i]
            gold, reward = json.loads(self.golds[i]), float(self.rewards_B[i])
            row |= response_row(self.ids[i], gold, reward, self.tokenizer, self.tool_format)
            rows.append(row | weighed.tokens_of(self.places[i], len(self.ids[i])))
        return rows
