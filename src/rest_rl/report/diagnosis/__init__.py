"""Diagnosis of a run that does not learn: what the metrics show, the likely cause and a remedy.

The diagnosis reads rows of `metrics.jsonl` and `evaluations.jsonl` and the table of `config.toml`, and imports neither
torch nor the trainer. A finding is reported only if it is beyond noise. docs/diagnosis.md describes every finding, its
limit and the reason for that limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rest_rl.report.diagnosis.findings import Finding
from rest_rl.report.diagnosis.history import History, SecondMoment, step_of
from rest_rl.report.diagnosis.settings import DiagnosisSettings
from rest_rl.report.diagnosis.symptoms import SYMPTOMS

__all__ = ["Diagnosis", "Finding", "diagnose"]


class Diagnosis:
    """The diagnosis of a run while it trains; each finding quotes the last metrics that showed the problem."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        """Start without metrics. `table` is the run's config.toml; missing settings have the trainer's defaults."""
        self._settings = DiagnosisSettings.from_table(table)
        self._history = History(SecondMoment(self._settings.beta2, self._settings.max_norm))
        self._found: dict[str, Finding] = {}

    @property
    def findings(self) -> list[Finding]:
        """All findings so far, in the order in which they first appeared."""
        return list(self._found.values())

    def add(self, row: Mapping[str, Any], total: int = 0) -> list[Finding]:
        """Add a row of metrics.jsonl and return new findings; `total` is the step count if config.toml has none."""
        self._history.add(row)
        settings = self._settings.with_total_steps(total)
        new = []
        for kind, symptom in SYMPTOMS.items():
            if shown := symptom(self._history, settings):
                first = self._found[kind].step if kind in self._found else self._history.step
                finding = Finding(kind, *shown, first, self._history.step)
                if kind not in self._found:
                    new.append(finding)
                self._found[kind] = finding
        return new

    def add_evaluation(self, row: Mapping[str, Any]) -> None:
        """Add a row of evaluations.jsonl; the next call of `add` takes it into account."""
        self._history.evaluations.append(row)


def diagnose(
    rows: Iterable[Mapping[str, Any]],
    evaluations: Iterable[Mapping[str, Any]] = (),
    table: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Return all findings of a run, in the order in which they first appeared.

    `rows` are the rows of metrics.jsonl and `evaluations` the rows of evaluations.jsonl, both in step order.
    """
    rows, waiting = list(rows), list(evaluations)
    diagnosis = Diagnosis(table or {})
    for row in rows:
        while waiting and step_of(waiting[0]) <= step_of(row):
            diagnosis.add_evaluation(waiting.pop(0))
        diagnosis.add(row, step_of(rows[-1]))
    return diagnosis.findings
