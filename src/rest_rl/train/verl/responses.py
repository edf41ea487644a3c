"""Weight and record a batch of responses in verl's layout. This module does not import verl.

Shapes: B responses, T completion tokens. verl reorders responses to balance the devices, so the rows of a group are not
consecutive. It stores responses as jagged tensors and may append padding rows, whose mask is 0.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rest_rl.config import RunConfig, RunTable
from rest_rl.credit import AdvantageKind, group_advantages
from rest_rl.evaluate.generate import has_ended
from rest_rl.formats import ToolFormat, get_format
from rest_rl.presets import Preset
from rest_rl.response import NUM_REGIONS, Turn
from rest_rl.runlog import Row, RunLog
from rest_rl.train.record import WeightedBatch, make_response_row
from rest_rl.train.reward import SCORE_METRICS, ResponseScore, collect_by_turn, parse_gold
from rest_rl.train.weighing import (
    NUM_SURPRISE_SUMS,
    EntropyTracker,
    TokenWeighter,
    compute_region_metrics,
    compute_surprise_metrics,
    sum_by_region,
    sum_surprise,
)
from rest_rl.weights import get_statistics_batches

# The module that registers the trainer and the advantage estimator.
PLUGIN = "rest_rl.train.verl.plugin"
# The names under which trainer, advantage estimator and agent loop are registered.
TRAINER, ESTIMATOR, LOOP = "rest", "rest_group", "rendered_prompt"
# Files of a checkpoint: the moving sums of the region statistics, and the position in the data, which verl writes last.
STATISTICS_FILE, DATA_STATE_FILE = "rest.json", "data.pt"
# The number of responses of a step that verl could not generate or score.
FAILED_METRIC = "completions/failed"
# verl's names of the per-token fields that are known before a batch is trained on.
PER_TOKEN = ("responses", "response_mask", "entropy", "old_log_probs", "advantages")
# The number of responses that are weighted at a time, to bound memory. The weights do not depend on this number.
CHUNK_SIZE = 4096
# TRL's name for each of these verl metrics; all others keep verl's name.
TRL_METRIC_NAMES: Mapping[str, str] = {
    "actor/pg_loss": "loss",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "learning_rate",
    "actor/pg_clipfrac": "clip_ratio/region_mean",
}
# Prefixes of metrics that are recorded under another name or elsewhere.
DUPLICATE_PREFIXES = ("critic/", "response_length", "response/", "prompt_length/", "num_turns/", "val-")
# Prefixes of metrics that differ from run to run.
TIMING_PREFIXES = ("timing", "perf/", "throughput")


def parse_run(text: str) -> tuple[RunTable, Preset, ToolFormat, EntropyTracker]:
    """Return `[run]`, method, format and a new entropy tracker from the text of a run file, for verl's trainer."""
    config = RunConfig.from_toml(text)
    rest = config.rest
    method = rest.resolve()
    tracker = EntropyTracker(rest.entropy_decay, get_statistics_batches(method.weights))
    return config.run, method, get_format(rest.format), tracker


def weight_batch(
    data: Mapping[str, Tensor],
    weighter: TokenWeighter,
    tracker: EntropyTracker,
    progress: float,
    step: int,
    watched: Collection[int] = (),
    advantage: AdvantageKind = "grpo",
) -> tuple[Tensor, dict[str, float], dict[int, Row]]:
    """Weight a batch's advantages with the statistics of earlier steps, then add this step's sums to `tracker`.

    `data` contains the fields of `PER_TOKEN`, jagged or dense; `step` counts from 1. Returns the weighted advantages of
    all tokens (jagged, with the batch's row lengths), the step's metrics, and a mapping from each index in `watched` to
    the token fields of that response for responses.jsonl. For the `advantage` "weighted_token_mean", all weighted
    advantages are divided by the batch's mean weight.
    """
    rows = [data[name].unbind() for name in PER_TOKEN]
    size, statistics, rule_weights_R = len(rows[0]), tracker.statistics(), None
    sums_4R = torch.zeros(4, NUM_REGIONS, dtype=torch.float64)
    surprise_4 = torch.zeros(NUM_SURPRISE_SUMS, dtype=torch.float64)
    advantages: list[Tensor] = []
    recorded: dict[int, Row] = {}
    entropies_N = torch.cat([row[mask.bool()] for row, mask in zip(rows[2], rows[1], strict=True)]).float().cpu()
    regions, counts_R = tag_chunks(rows[0], rows[1], weighter)
    for first in range(0, size, CHUNK_SIZE):
        chunks = [row[first : first + CHUNK_SIZE] for row in rows]
        ids_BT, mask_BT, entropies_BT, logps_BT, advantages_BT = map(pad_rows, chunks)
        lengths = [len(row) for row in chunks[0]]
        known = (statistics, progress, step, entropies_BT, entropies_N, counts_R)
        weighted = weighter.weight(ids_BT, mask_BT, regions[first // CHUNK_SIZE], *known)
        rule_weights_R = weighted.rule_weights_R
        sums_4R += sum_by_region(weighted, mask_BT, entropies_BT, logps_BT)
        surprise_4 += sum_surprise(logps_BT, entropies_BT, mask_BT)
        weighted_advantages_BT = advantages_BT * weighted.weights_BT
        advantages += [weighted_advantages_BT[row, :length] for row, length in enumerate(lengths)]
        kept = (weighted.regions_BT, weighted.weights_BT, entropies_BT, logps_BT, advantages_BT[:, 0])
        chunk = WeightedBatch(torch.arange(first, first + len(lengths)), *kept)
        local = {at: at - first for at in watched if first <= at < first + CHUNK_SIZE}
        recorded |= {at: chunk.token_fields(row, lengths[row]) for at, row in local.items()}
    tracker.update(sums_4R[:3], step - 1)
    if advantage == "weighted_token_mean" and sums_4R[3].sum() > 0:
        factor = float(sums_4R[0].sum() / sums_4R[3].sum())
        advantages = [row * factor for row in advantages]
    figures = compute_region_metrics(sums_4R, rule_weights_R) | compute_surprise_metrics(surprise_4)
    figures["entropy"] = float(sums_4R[1].sum() / sums_4R[0].sum())
    return torch.nested.as_nested_tensor(advantages, layout=torch.jagged), figures, recorded


# The regions (B, T) of each chunk, and the number of tokens of each region in all of them.
def tag_chunks(ids: Sequence[Tensor], masks: Sequence[Tensor], weighter: TokenWeighter) -> tuple[list[Tensor], Tensor]:
    chunks, counts_R = [], torch.zeros(NUM_REGIONS, dtype=torch.float64)
    for first in range(0, len(ids), CHUNK_SIZE):
        ids_BT, mask_BT = (pad_rows(rows[first : first + CHUNK_SIZE]) for rows in (ids, masks))
        chunks.append(weighter.tag(ids_BT, mask_BT))
        counts_R += torch.bincount(chunks[-1][mask_BT.bool()], minlength=NUM_REGIONS)
    return chunks, counts_R


# (B, T) on the CPU, padded with 0; 16-bit numbers become float32.
def pad_rows(rows: Sequence[Tensor]) -> Tensor:
    values_BT = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).cpu()
    return values_BT.float() if values_BT.is_floating_point() else values_BT


def group_rows(groups: Sequence[Hashable]) -> list[list[int]]:
    """Return a list of row numbers for each group; `groups` contains the name of every row's group."""
    rows: dict[Hashable, list[int]] = {}
    for row, name in enumerate(groups):
        rows.setdefault(str(name), []).append(row)
    return list(rows.values())


def compute_group_advantages(rewards_B: Tensor, groups: Sequence[Hashable], kind: AdvantageKind) -> Tensor:
    """Return `group_advantages`, shape (B,), for groups of different sizes whose rows need not be consecutive."""
    advantages_B = torch.zeros_like(rewards_B)
    for rows in group_rows(groups):
        advantages_B[rows] = group_advantages(rewards_B[rows], len(rows), kind)
    return advantages_B


@dataclass(frozen=True, eq=False)
class Responses:
    """The responses of a batch without padding rows; `indices` are their row numbers in verl's batch."""

    indices: Sequence[int]
    ids: Sequence[Tensor]
    rewards_B: Tensor
    groups: Sequence[Hashable]
    golds: Sequence[str]  # JSON text
    origins: Sequence[Mapping[str, Any]]  # `index` and `id` of each response's sample
    scores: Sequence[Mapping[str, Any]]
    prompts: Sequence[str]
    tokenizer: Any
    tool_format: ToolFormat
    ends: Collection[int]  # the stop tokens

    def compute_metrics(self) -> dict[str, float]:
        """Return the metrics of rewards, scores and lengths under their names in TRL and `ResTTrainer`."""
        rewards_B = self.rewards_B.double()
        lengths_B = torch.tensor([len(ids) for ids in self.ids], dtype=torch.float64)
        ended_B = torch.tensor([has_ended(ids[-1:].tolist(), self.ends) for ids in self.ids])
        alike = [bool((rewards_B[rows] == rewards_B[rows[0]]).all()) for rows in group_rows(self.groups)]
        figures = {
            "reward": float(rewards_B.mean()),
            "reward_std": float(rewards_B.std()) if len(rewards_B) > 1 else 0.0,
            "frac_reward_zero_std": sum(alike) / len(alike),
            "completions/clipped_ratio": 1 - float(ended_B.double().mean()),
        }
        for name in SCORE_METRICS:
            figures[f"rest/{name}"] = sum(float(row[name]) for row in self.scores) / len(self.scores)
        turns: list[Turn] = [parse_gold(gold).turn for gold in self.golds]
        scored = (ResponseScore(reward, *(float(row[name]) for name in SCORE_METRICS))
                  for reward, row in zip(rewards_B.tolist(), self.scores, strict=True))  # fmt: skip
        for name, values in collect_by_turn(zip(turns, scored, strict=True)).items():
            figures[name] = sum(values) / len(values)
        for name, chosen_B in (("", lengths_B), ("_terminated", lengths_B[ended_B])):
            if len(chosen_B):
                least, most = float(chosen_B.min()), float(chosen_B.max())
                figures[f"completions/mean{name}_length"] = float(chosen_B.mean())
                figures |= {f"completions/min{name}_length": least, f"completions/max{name}_length": most}
        return figures

    def select_first(self, limit: int) -> list[int]:
        """Return the positions of the first `limit` responses, sorted by the position of their prompts in the data."""
        order = sorted(range(len(self.indices)), key=lambda i: (self.origins[i]["index"], str(self.groups[i])))
        return order[:limit]

    def make_rows(self, chosen: Sequence[int], tokens: Mapping[int, Row], step: int, progress: float) -> list[Row]:
        """Return the responses at these positions as rows of responses.jsonl; `tokens` are from `weight_batch`."""
        rows: list[Row] = []
        for i in chosen:
            row: Row = {"step": step, "progress": progress, "id": self.origins[i]["id"]}
            if not rows or rows[-1]["id"] != row["id"]:  # once per group
                row["prompt"] = self.prompts[i]
            gold, reward = json.loads(self.golds[i]), float(self.rewards_B[i])
            row |= make_response_row(self.ids[i].tolist(), gold, reward, self.tokenizer, self.tool_format, self.ends)
            rows.append(row | tokens[self.indices[i]])
        return rows


def make_metrics_row(step: int, metrics: Mapping[str, Any]) -> Row:
    """Return a row of metrics.jsonl: verl's metrics without times and duplicates, under TRL's names."""
    left_out = TIMING_PREFIXES + DUPLICATE_PREFIXES
    kept = {name: value for name, value in select_scalars(metrics).items() if not name.startswith(left_out)}
    return {"step": step, **{TRL_METRIC_NAMES.get(name, name): value for name, value in kept.items()}}


def make_timing_row(step: int, metrics: Mapping[str, Any]) -> Row:
    """Return a row of timing.jsonl with the times among verl's metrics."""
    return {"step": step, **{k: value for k, value in select_scalars(metrics).items() if k.startswith(TIMING_PREFIXES)}}


# Returns the metrics whose value is a single number, whether Python's, NumPy's or torch's.
def select_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in metrics.items():
        if isinstance(value, (bool, str, bytes)) or value is None:
            continue
        with suppress(TypeError, ValueError, RuntimeError):
            found[name] = float(value)
    return found


def write_outcomes(log: RunLog, step: int, total: int, scores: Row) -> None:
    """Write scores to the summary (before the first and after the last of `total` steps) or to evaluations.jsonl."""
    if 0 < step < total:
        log.add_evaluation({"step": step, **scores})
    else:
        log.update_summary(**{"before" if step == 0 else "after": scores})
