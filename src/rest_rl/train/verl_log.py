"""What a run on verl writes into its run folder: verl's figures under the names they have on TRL; imports no verl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rest_rl.outcomes import Outcome, summarise
from rest_rl.runlog import Row, RunLog

RENAMED: Mapping[str, str] = {
    "actor/pg_loss": "loss",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "learning_rate",
    "actor/pg_clipfrac": "clip_ratio/region_mean",
    "training/epoch": "epoch",
}
"""verl's name of a figure and ours; all others keep verl's."""
REPEATED = ("critic/", "response_length", "response/", "prompt_length/", "num_turns/", "training/num_turns", "val-")
"""Beginnings of names of what is recorded under another name, or elsewhere."""
WALL_CLOCK = ("timing", "perf/", "throughput")
"""Beginnings of names of what differs from run to run."""


class VerlLog:
    """Writes each step of a run on verl to its folder, which its driver has made."""

    def __init__(self, folder: str) -> None:
        """Bind the folder."""
        self.run = RunLog(folder)

    def add_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One row of metrics and one of times."""
        numbers = {name: float(value) for name, value in metrics.items() if is_scalar(value)}
        timing = {name: value for name, value in numbers.items() if name.startswith(WALL_CLOCK)}
        kept = {name: value for name, value in numbers.items() if not name.startswith((*WALL_CLOCK, *REPEATED))}
        self.run.add_timing({"step": step, **timing})
        self.run.add_metrics({"step": step, **{RENAMED.get(name, name): value for name, value in kept.items()}})

    def add_responses(self, rows: Sequence[Row]) -> None:
        """Responses of one step."""
        self.run.add_responses(rows)

    def add_outcomes(self, step: int, total: int, outcomes: Sequence[Outcome]) -> None:
        """What a measurement on held-out prompts found: before, after or during training."""
        scores = summarise(outcomes)
        if step == 0:
            self.run.update_summary(before=scores)
        else:
            self.run.add_evaluation({"step": step, **scores})
        if step >= total:
            self.run.update_summary(after=scores)


def is_scalar(value: Any) -> bool:
    """Whether a metric is one number: Python's, NumPy's or a tensor's."""
    if isinstance(value, (bool, str, bytes)) or value is None:
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True
