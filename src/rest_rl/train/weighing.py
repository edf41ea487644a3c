"""Tag, weight and summarize a batch of sampled responses; all engines share this code.

Shapes: B responses, T completion tokens, R regions. All of it runs on the CPU, because tagging is Python code and the
sums are float64, which not every device supports.
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

# Rows of the (3, R) sums.
COUNTS, ENTROPIES, COLLISIONS = range(3)


class EntropyTracker(TrainerCallback, ExportableState):
    """Sums of token counts, entropies and collision estimates by region; their ratios are averages over steps.

    Each optimizer step updates the sums to decay * old + new, where "new" is summed over all micro-batches and
    processes of the step. With sums instead of means, a region with few tokens changes its average little, a region
    without tokens keeps it, and the first step needs no bias correction.

    If `first_batches` is above 0, the sums are those of the first so many batches of responses, without decay, and then
    stay fixed. A region without tokens in these batches is measured in the first step in which it has some.
    """

    def __init__(self, decay: float, first_batches: int = 0) -> None:
        self.decay, self.first_batches = decay, first_batches
        self.totals_3R = torch.zeros(3, NUM_REGIONS, dtype=torch.float64)

    def update(self, sums_3R: Tensor, batch: int) -> None:
        """Add one optimizer step, summed over all processes; sums that are not finite are ignored.

        `batch` is the number of batches of responses before that of this step.
        """
        if not torch.isfinite(sums_3R).all():
            return
        if not self.first_batches:
            self.totals_3R = self.decay * self.totals_3R + sums_3R.cpu()
            return
        is_measured_R = (self.totals_3R[COUNTS] > 0) & (batch >= self.first_batches)
        self.totals_3R = self.totals_3R + sums_3R.cpu().masked_fill(is_measured_R, 0.0)

    def statistics(self) -> RegionStatistics | None:
        """Return the statistics of all steps so far, NaN for regions without tokens; None before the first step."""
        counts_R = self.totals_3R[COUNTS].clone()  # a user's rule may write to its argument
        if not counts_R.any():
            return None
        return RegionStatistics(
            counts_R=counts_R,
            entropies_R=self.totals_3R[ENTROPIES] / counts_R,
            collisions_R=self.totals_3R[COLLISIONS] / counts_R,
        )

    @property
    def table(self) -> list[list[float]]:
        """The moving sums as nested lists for JSON, which preserves their values exactly."""
        return self.totals_3R.tolist()

    @table.setter
    def table(self, rows: list[list[float]]) -> None:
        self.totals_3R = torch.tensor(rows, dtype=torch.float64)

    def state(self) -> dict[str, Any]:
        """Return the state that `Trainer` writes to trainer_state.json."""
        return {
            "args": {"decay": self.decay, "first_batches": self.first_batches},
            "attributes": {"table": self.table},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the moving sums from the checkpoint of a resumed run."""
        # transformers restores callbacks itself only with `restore_callback_states_from_checkpoint`.
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if isinstance(saved, dict):
            self.table = saved["attributes"]["table"]


# Length of `sum_surprise`'s result.
NUM_SURPRISE_SUMS = 4


def sum_surprise(logps_BT: Tensor, entropies_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return float64 sums: tokens, entropies H, excess surprise -log p - H, squares of each response's total excess."""
    mask_BT = mask_BT.to(torch.float64)
    entropies_BT = entropies_BT.double().where(mask_BT > 0, 0.0)
    excess_B = (-logps_BT.double()).where(mask_BT > 0, 0.0).sum(-1) - entropies_BT.sum(-1)
    return torch.stack([mask_BT.sum(), entropies_BT.sum(), excess_B.sum(), excess_B.square().sum()])


def compute_surprise_metrics(sums_4: Tensor) -> dict[str, float]:
    """Return the mean excess surprise per token, its standard error and the total entropy from `sum_surprise`.

    They show whether sampler and loss use the same probabilities: then the excess D_i of response i has expectation 0,
    and the standard error is sqrt(sum_i D_i^2) / tokens. A small total entropy (in nats) makes the check unreliable.
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
    """Raise UserError for a rule that cannot be used with the format, or with top-p, top-k or min-p (`truncates`)."""
    if not 0 <= entropy_decay < 1:
        raise UserError(f"rest.entropy_decay is {entropy_decay}", "a number in [0, 1)", "change it")
    if check := getattr(rule, "check", None):
        check(tool_format, truncates)


def try_weight_rule(rule: WeightRule, tokenizer: Any, tool_format: ToolFormat) -> None:
    """Test a user's rule on a short batch, without and with region statistics; UserError if it fails."""
    weighter = TokenWeighter(tokenizer, tool_format, rule)
    ids = tokenizer(tool_format.render(None, [ToolCall("f", {"a": 1})], None), add_special_tokens=False)["input_ids"]
    ids_BT = torch.tensor([ids, ids])
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, len(ids) // 2 :] = 0
    halves_R = torch.full((NUM_REGIONS,), 0.5, dtype=torch.float64)
    for statistics, progress in ((None, 0.0), (RegionStatistics(100 * halves_R, halves_R, halves_R), 1.0)):
        regions_BT, entropies_BT = weighter.tag(ids_BT, mask_BT), torch.full(ids_BT.shape, 0.5)
        known = {"entropies_BT": entropies_BT} if needs_entropies(rule) else {}
        signature = "rule(batch, statistics, progress) -> weights (docs/method.md)"
        with wrap_user_errors(f"weight rule {display_name(rule)}", signature):
            weights_R = weighter.weight(ids_BT, mask_BT, regions_BT, statistics, progress, 1, **known).rule_weights_R
        if weights_R is not None and tuple(weights_R.shape) != (NUM_REGIONS,):
            problem = f"the weight rule {display_name(rule)} has region_weights of shape {tuple(weights_R.shape)}"
            raise UserError(problem, f"{NUM_REGIONS} numbers, one for each region", "correct it")


class WeightedTokens(NamedTuple):
    """The token weights of one batch, and the regions of the tokens."""

    regions_BT: Tensor
    weights_BT: Tensor
    """float32, with mean 1 over what the rule normalizes: by default each response's unmasked tokens."""
    rule_weights_R: Tensor | None
    """The region weights before normalization; None if the rule has no region weights."""


@dataclass(frozen=True)
class TokenWeighter:
    """Tags and weights tokens with a fixed tokenizer, format and weight rule."""

    tokenizer: Any
    format: ToolFormat
    rule: WeightRule

    def tag(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the region of every token, int64 (B, T); see `tag_regions`."""
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
        counts_R: Tensor | None = None,
    ) -> WeightedTokens:
        """Weight the tokens of a batch.

        `statistics` are the region statistics of earlier steps, None in the first step; `step` is the number of the
        generation batch, from 1. Rules that need entropies get those of this batch, `entropies_BT`, and those of all N
        tokens of the global batch, `entropies_N`. `counts_R` are the global batch's tokens by region.
        """
        known = (self.tokenizer, self.format.name, step, entropies_BT, entropies_N, counts_R)
        batch = TaggedBatch(ids_BT, mask_BT, regions_BT, *known)
        weights_BT = apply_weight_rule(self.rule, batch, statistics, progress)
        return WeightedTokens(regions_BT, weights_BT, get_region_weights(self.rule, statistics, progress))


def sum_by_region(weighted: WeightedTokens, mask_BT: Tensor, entropies_BT: Tensor, logps_BT: Tensor) -> Tensor:
    """Return four sums by region, float64 (4, R): tokens, entropies, collision estimates and weights.

    The collision estimate of a token is 1 - p(token), whose expectation is 1 - sum_v p_v^2 for tokens sampled from p.
    """
    quantities = (entropies_BT, -torch.expm1(logps_BT), weighted.weights_BT)
    sums = [region_sums(values_BT, weighted.regions_BT, mask_BT) for values_BT in quantities]
    return torch.stack([sums[0][1], *(sums_R for sums_R, _ in sums)])


def compute_region_metrics(sums_4R: Tensor, rule_weights_R: Tensor | None) -> dict[str, float]:
    """Return a step's metrics by region from the total of its `sum_by_region` sums; NaN for regions without tokens.

    rest/entropy, rest/collision and rest/weight are means over the region's tokens, rest/share is the region's share of
    all tokens, and rest/rule_weight is `rule_weights_R`. The region's label follows each name (rest/weight/<region>).
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
