"""What every engine does with a batch of sampled responses: find regions, weigh tokens, sum up, name the figures.

Shapes: B responses, T completion tokens, R regions. Everything is on the CPU: the tagging runs there, and sums in
float64 are not to be had on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from rest_rl.errors import UserError
from rest_rl.formats import ToolFormat
from rest_rl.objects import display_name, wrap_user_errors
from rest_rl.regions import region_sums, tag_regions
from rest_rl.response import NUM_REGIONS, Region, ToolCall
from rest_rl.weights import (
    RegionStatistics,
    TaggedBatch,
    WeightRule,
    apply_weight_rule,
    get_region_weights,
    needs_entropies,
)

COUNTS, ENTROPIES, COLLISIONS = range(3)


class EntropyTracker(TrainerCallback, ExportableState):
    """Moving sums S <- decay * S + s over optimizer steps; the quotient of two of them is a region's mean.

    s are the sums over the global batch of a step (all micro-batches, all processes), so the averages are the same on
    every process. Sums instead of means: a region with few tokens in a step moves its average little, one with none
    keeps it, and the first step needs no correction for a start at 0.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.totals_3R = torch.zeros(3, NUM_REGIONS, dtype=torch.float64)

    def update(self, sums_3R: Tensor) -> None:
        """Take in the global sums of one optimizer step; sums that are not finite are left out."""
        if torch.isfinite(sums_3R).all():
            self.totals_3R = self.decay * self.totals_3R + sums_3R.cpu()

    def statistics(self) -> RegionStatistics | None:
        """Counts and means by region, NaN for a region never seen; None before the first step."""
        counts_R = self.totals_3R[COUNTS].clone()  # a rule may change what it is given
        if not counts_R.any():
            return None
        return RegionStatistics(
            counts_R=counts_R,
            entropies_R=self.totals_3R[ENTROPIES] / counts_R,
            collisions_R=self.totals_3R[COLLISIONS] / counts_R,
        )

    @property
    def table(self) -> list[list[float]]:
        """The totals as JSON numbers; Python writes and reads a double without loss."""
        return self.totals_3R.tolist()

    @table.setter
    def table(self, rows: list[list[float]]) -> None:
        self.totals_3R = torch.tensor(rows, dtype=torch.float64)

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into trainer_state.json."""
        return {"args": {"decay": self.decay}, "attributes": {"table": self.table}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the checkpoint: `Trainer` restores callbacks only if `restore_callback_states_from_checkpoint`."""
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if isinstance(saved, dict):
            self.table = saved["attributes"]["table"]


NUM_SURPRISE_SUMS = 4
"""Numbers that `sum_surprise` returns; they add up over micro-batches and processes."""


def sum_surprise(logps_BT: Tensor, entropies_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Tokens, entropy, excess surprise -log p - H, and the excess of each response squared, summed: float64 (4,)."""
    mask_BT = mask_BT.to(torch.float64)
    entropies_BT = entropies_BT.double().where(mask_BT > 0, 0.0)
    excess_B = (-logps_BT.double()).where(mask_BT > 0, 0.0).sum(-1) - entropies_BT.sum(-1)
    return torch.stack([mask_BT.sum(), entropies_BT.sum(), excess_B.sum(), excess_B.square().sum()])


def compute_surprise_metrics(sums_4: Tensor) -> dict[str, float]:
    """Excess surprise per token with its standard error, and the entropy it was measured over; empty without tokens.

    The standard error is sqrt(sum_i D_i^2) / tokens, D_i the excess of response i: its mean under agreement is known.
    `nats` says how much chance was seen: of 10 nats hardly any token can have been surprising.
    """
    tokens, nats, excess, squares = sums_4.tolist()
    if tokens == 0:
        return {}
    return {
        "rest/surprise/excess": excess / tokens,
        "rest/surprise/error": math.sqrt(squares) / tokens if squares >= 0 else math.nan,
        "rest/surprise/nats": nats,
    }


def check_weight_rule(rule: WeightRule, tool_format: str, entropy_decay: float, *, truncates: bool) -> None:
    """Refuse a weight rule that could not weigh, whatever the engine.

    `truncates`: tokens are sampled by top-p, top-k or min-p.
    """
    if not 0 <= entropy_decay < 1:
        raise UserError(f"entropy_decay {entropy_decay}", "a number in [0, 1)", "change it")
    if check := getattr(rule, "check", None):
        check(tool_format, truncates)


def try_weight_rule(rule: WeightRule, tokenizer: Any, tool_format: ToolFormat) -> None:
    """UserError for a rule of the user's that fails on a short batch, before and after regions have been measured."""
    weighter = TokenWeighter(tokenizer, tool_format, rule)
    ids = tokenizer(tool_format.render(None, [ToolCall("f", {"a": 1})], None), add_special_tokens=False)["input_ids"]
    ids_BT = torch.tensor([ids, ids])
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, len(ids) // 2 :] = 0
    halves_R = torch.full((NUM_REGIONS,), 0.5, dtype=torch.float64)
    for statistics, progress in ((None, 0.0), (RegionStatistics(100 * halves_R, halves_R, halves_R), 1.0)):
        regions_BT, entropies_BT = weighter.tag(ids_BT, mask_BT), torch.full(ids_BT.shape, 0.5)
        known = {"entropies_BT": entropies_BT} if needs_entropies(rule) else {}
        with wrap_user_errors(
            f"weight rule {display_name(rule)}", "rule(batch, statistics, progress) -> weights (docs/method.md)"
        ):
            weights_R = weighter.weight(ids_BT, mask_BT, regions_BT, statistics, progress, 1, **known).rule_weights_R
        if weights_R is not None and tuple(weights_R.shape) != (NUM_REGIONS,):
            got = f"region_weights of shape {tuple(weights_R.shape)} from the weight rule {display_name(rule)}"
            raise UserError(got, f"{NUM_REGIONS} numbers, one for each region", "correct it")


class WeightedTokens(NamedTuple):
    """The weights of one batch and where they come from."""

    regions_BT: Tensor
    weights_BT: Tensor
    """float32, mean 1 over each response's unmasked tokens."""
    rule_weights_R: Tensor | None
    """Region weights before responses are normalised; None where the rule measures nothing."""


@dataclass(frozen=True)
class TokenWeighter:
    """A weight rule bound to a tokenizer and a format."""

    tokenizer: Any
    format: ToolFormat
    rule: WeightRule

    def tag(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The region of every token, int64 (B, T); each run of ones in the mask is a turn of its own."""
        return tag_regions(ids_BT, mask_BT, self.tokenizer, self.format)

    def weight(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor,
        regions_BT: Tensor,
        statistics: RegionStatistics | None,
        progress: float,
        step: int,
        entropies_BT: Tensor | None = None,
        entropies_N: Tensor | None = None,
    ) -> WeightedTokens:
        """Weigh the tokens of a batch; `statistics` are those of the steps before, None in the first.

        `step` is the number of the batch of responses, counted from 1. The entropies of this batch, and in a part of a
        global batch those of all its tokens, are for rules that need them.
        """
        batch = TaggedBatch(
            ids_BT, mask_BT, regions_BT, self.tokenizer, self.format.name, step, entropies_BT, entropies_N
        )
        weights_BT = apply_weight_rule(self.rule, batch, statistics, progress)
        return WeightedTokens(regions_BT, weights_BT, get_region_weights(self.rule, statistics, progress))


def sum_by_region(weighted: WeightedTokens, mask_BT: Tensor, entropies_BT: Tensor, logps_BT: Tensor) -> Tensor:
    """Tokens, entropies, collision estimates and weights, summed by region: float64 (4, R); they add up over batches.

    E[1 - p(sampled token)] = 1 - sum_v p_v^2 for tokens sampled from p itself.
    """
    quantities = (entropies_BT, -torch.expm1(logps_BT), weighted.weights_BT)
    sums = [region_sums(values_BT, weighted.regions_BT, mask_BT) for values_BT in quantities]
    return torch.stack([sums[0][1], *(sums_R for sums_R, _ in sums)])


def compute_region_metrics(sums_4R: Tensor, rule_weights_R: Tensor | None) -> dict[str, float]:
    """A step's figures by name from its `sum_by_region`: means over a region's tokens, NaN for a region without any.

    rest/entropy/<region>, rest/collision/<region>, rest/weight/<region>, rest/share/<region> (of all tokens), and
    rest/rule_weight/<region> where the rule measures something.
    """
    counts_R = sums_4R[0]
    rows = {
        "entropy": sums_4R[1] / counts_R,
        "collision": sums_4R[2] / counts_R,
        "weight": sums_4R[3] / counts_R,
        "share": counts_R / counts_R.sum().clamp_min(1),
    }
    if rule_weights_R is not None:
        rows["rule_weight"] = rule_weights_R
    return {
        f"rest/{quantity}/{region.label}": value
        for quantity, values_R in rows.items()
        for region, value in zip(Region, values_R.tolist(), strict=True)
    }
