"""Why a run is not learning: what its metrics show, the likely cause and the remedy, each only beyond noise.

Reads rows of `metrics.jsonl` and `evaluations.jsonl` and the table of `config.toml`; imports nothing heavy. Each
symptom, its limit and the reason for that limit: docs/diagnosis.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rest_rl.report.diagnosis.history import History, SecondMoment, step_of
from rest_rl.report.diagnosis.settings import DiagnosisSettings
from rest_rl.report.diagnosis.symptoms import SYMPTOMS, Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]


class Diagnosis:
    """A run watched row by row; `findings` are those so far, with the figures of the last row that showed them."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        """`table` is the run's config.toml as read; a setting that is not there counts as the trainer's default."""
        self._settings = DiagnosisSettings.from_table(table)
        self._history = History(SecondMoment(self._settings.beta2, self._settings.max_norm))
        self._found: dict[str, Finding] = {}

    @property
    def findings(self) -> list[Finding]:
        """In the order in which they appeared."""
        return list(self._found.values())

    def add(self, row: Mapping[str, Any], total: int = 0) -> list[Finding]:
        """Take in one step's metrics; returns what is found for the first time. `total` steps unless the table says."""
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
        """Take in an evaluation; it is judged with the next row of metrics."""
        self._history.evaluations.append(row)


def diagnose(
    rows: Iterable[Mapping[str, Any]],
    evaluations: Iterable[Mapping[str, Any]] = (),
    table: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """All findings of a run, in the order in which they appeared: what `Diagnosis` says row by row.

    `rows` are those of metrics.jsonl and `evaluations` those of evaluations.jsonl, both in step order.
    """
    rows, waiting = list(rows), list(evaluations)
    diagnosis = Diagnosis(table or {})
    for row in rows:
        while waiting and step_of(waiting[0]) <= step_of(row):
            diagnosis.add_evaluation(waiting.pop(0))
        diagnosis.add(row, step_of(rows[-1]))
    return diagnosis.findings
