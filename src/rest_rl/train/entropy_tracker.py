"""What is known about each region's uncertainty from the steps so far: a moving average that survives a checkpoint.

Shapes: R regions; the three rows of a table are token counts, sums of entropies (nats) and sums of collision estimates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from rest_rl.response import NUM_REGIONS
from rest_rl.weights import RegionStatistics

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
        counts_R = self.totals_3R[COUNTS]
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
