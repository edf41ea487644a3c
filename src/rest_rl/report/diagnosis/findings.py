"""Findings of the diagnosis, and the texts of figures in them."""

from __future__ import annotations

from typing import NamedTuple

from rest_rl.report.diagnosis.history import WindowMean


class Finding(NamedTuple):
    """One problem of a run, first observed at step `step` and most recently at step `last`."""

    kind: str
    """A key of SYMPTOMS; docs/diagnosis.md has a section on each."""
    figure: str
    """What the metrics show."""
    cause: str
    remedy: str
    step: int
    last: int


class Symptom(NamedTuple):
    """What the metrics show, the likely cause and the remedy."""

    figure: str
    cause: str
    remedy: str


def format_percent(mean: WindowMean) -> str:
    return f"{100 * mean.value:.1f} ± {100 * mean.error:.1f} %"


def format_change(before: WindowMean, now: WindowMean) -> str:
    return f"{format_percent(before)} → {format_percent(now)} ({format_steps(before)} → {format_steps(now)})"


def format_steps(mean: WindowMean) -> str:
    return f"steps {mean.first}-{mean.last}"
