"""The section of a report on why a run is not learning."""

from __future__ import annotations

from collections.abc import Iterable

from rest_rl.config import parse_toml
from rest_rl.report.diagnosis import Finding, diagnose
from rest_rl.report.diagnosis.history import step_of
from rest_rl.runlog import Run


def findings_of(run: Run) -> list[Finding]:
    """What is wrong with a run, in the order in which it showed."""
    return diagnose(run.metrics, run.evaluations, parse_toml(run.config, str(run.folder)))


def findings_text(runs: Iterable[Run]) -> str:
    """A Markdown section with the findings of all runs; empty if there are none."""
    runs = list(runs)
    lines = [
        f"- {f'{run.name}, ' if len(runs) > 1 else ''}{when(finding, run)}: **{finding.figure}.** Likely cause: "
        f"{finding.cause}. Remedy: {finding.remedy}."
        for run in runs
        for finding in findings_of(run)
    ]
    return "\n".join(["## Why is it not learning?\n", *lines]) if lines else ""


def when(finding: Finding, run: Run) -> str:
    """The steps in which a finding showed."""
    is_last = finding.last >= max(map(step_of, run.metrics), default=0)
    if finding.step == finding.last:
        return f"step {finding.step}"
    return f"from step {finding.step} on" if is_last else f"steps {finding.step} to {finding.last}"
