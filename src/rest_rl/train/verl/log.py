"""What a run on verl writes into its run folder: verl's figures under the names they have on TRL; imports no verl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rest_rl.runlog import Row, RunLog
from rest_rl.statistics import Outcome, summarise

RENAMED: Mapping[str, str] = {
    "actor/pg_loss": "loss",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "learning_rate",
    "actor/pg_clipfrac": "clip_ratio/region_mean",
}
"""verl's name of a figure and ours; all others keep verl's."""
REPEATED = ("critic/", "response_length", "response/", "prompt_length/", "num_turns/", "val-")
"""Beginnings of names of what is recorded under another name, or elsewhere."""
WALL_CLOCK = ("timing", "perf/", "throughput")
"""Beginnings of names of what differs from run to run."""


class VerlLog:
    """Writes each step of a run on verl to its folder, which its driver has made."""

    def __init__(self, folder: str) -> None:
        """Bind the folder."""
        self.run = RunLog(folder)

    def add_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The figures of a step, without times and what stands elsewhere."""
        kept = {name: value for name, value in scalars(metrics).items() if not name.startswith(WALL_CLOCK + REPEATED)}
        self.run.add_metrics({"step": step, **{RENAMED.get(name, name): value for name, value in kept.items()}})

    def add_timing(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The times of a step."""
        timing = {name: value for name, value in scalars(metrics).items() if name.startswith(WALL_CLOCK)}
        self.run.add_timing({"step": step, **timing})

    def add_responses(self, rows: Sequence[Row]) -> None:
        """Responses of one step."""
        self.run.add_responses(rows)

    def add_outcomes(self, step: int, total: int, outcomes: Sequence[Outcome]) -> None:
        """What a measurement on held-out prompts found: before, after or during training."""
        scores = summarise(outcomes)
        if step == 0:
            self.run.update_summary(before=scores)
        elif step < total:
            self.run.add_evaluation({"step": step, **scores})
        if step >= total:
            self.run.update_summary(after=scores)


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures that are one number: Python's, NumPy's or a tensor's."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, (bool, str, bytes)) or value is None:
            continue
        with suppress(TypeError, ValueError, RuntimeError):
            found[name] = float(value)
    return found
