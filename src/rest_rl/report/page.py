"""The Markdown report: a page with plots about one or several run folders. It reads only the run folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_rl.errors import UserError
from rest_rl.report.diagnosis import Finding
from rest_rl.report.diagnosis.history import step_of
from rest_rl.report.palette import REGION_COLORS
from rest_rl.report.plots import REGION_METRIC, draw_all
from rest_rl.report.tables import (
    BEFORE_AFTER_HEADER,
    RunGroup,
    before_after_rows,
    diagnose_run,
    format_change,
    format_mean_and_sd,
    greedy_if_recorded,
    group_runs,
    headline_turn_of_runs,
    is_number,
    last_finished_step,
    markdown_table,
    metric_curve,
    scores_for_turn,
)
from rest_rl.runlog import PLOTS, Run, read_run, unwritable_folder_error


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write report.md and its plots into `out`, by default the folder of a single run, and return the page.

    Raises:
        UserError: a folder has no run, or its run has not finished a step.
    """
    runs = [read_run(folder) for folder in folders]
    empty = [str(run.folder) for run in runs if not last_finished_step(run)]
    if empty:
        raise UserError(f"no training step is finished in {', '.join(empty)}", remedy="resume the run, or leave it out")
    target = Path(out) if out else runs[0].folder if len(runs) == 1 else Path("report")
    groups = group_runs(runs)
    try:
        plots = draw_all(groups, target / PLOTS)
        page = target / "report.md"
        page.write_text(render_report(groups, plots, page.parent), encoding="utf-8")
    except OSError as error:
        raise unwritable_folder_error(target, error) from error
    return page


def render_report(groups: Sequence[RunGroup], plots: dict[str, Path], base: Path) -> str:
    runs = [run for group in groups for run in group.runs]
    parts = ["# Report", render_results(groups) if len(runs) > 1 else render_single_result(runs[0])]
    if findings := render_findings(runs):
        parts.append(findings)
    for title, path in plots.items():
        parts.append(f"## {title}\n\n![{title}]({Path(os.path.relpath(path, base)).as_posix()})")
    if rows := build_region_rows(groups):
        header = ("region", "entropy (nats)", "weight", "share of tokens")
        parts.append("## Regions: first and last tenth of the run\n\n" + markdown_table(header, rows))
    parts += [part for run in runs[:1] if (part := render_sample_responses(run))]
    parts.append("## Runs\n\n" + render_run_table(groups))
    return "\n\n".join(parts) + "\n"


def render_findings(runs: Sequence[Run]) -> str:
    lines = [
        f"- {f'{run.name}, ' if len(runs) > 1 else ''}{format_step_range(finding, run)}: **{finding.figure}.** "
        f"Likely cause: {finding.cause}. Remedy: {finding.remedy}."
        for run in runs
        for finding in diagnose_run(run)
    ]
    return "\n".join(["## Why is it not learning?\n", *lines]) if lines else ""


def format_step_range(finding: Finding, run: Run) -> str:
    if finding.step == finding.last:
        return f"step {finding.step}"
    is_last = finding.last >= max(map(step_of, run.metrics), default=0)
    return f"from step {finding.step} on" if is_last else f"steps {finding.step} to {finding.last}"


def render_single_result(run: Run) -> str:
    if not run.summary.get("before"):
        return "No evaluation was recorded."
    note = (
        f"Mean scores of `{run.name}` on held-out prompts, before → after training. The gain has one standard error "
        "over prompts, which combines the errors of both evaluations."
    )
    return f"## Result\n\n{note}\n\n{markdown_table(BEFORE_AFTER_HEADER, before_after_rows(run.summary))}"


def render_results(groups: Sequence[RunGroup]) -> str:
    turn = headline_turn_of_runs(run for group in groups for run in group.runs)
    header = ["", "runs", "greedy before", "greedy after", "gain", "T = 1 before", "T = 1 after"]
    extra = [key for key in ("low_temperature", "policy_entropy") if any_recorded(groups, key)]
    header += [f"{EXTRA_COLUMNS[key]} {when}" for key in extra for when in ("before", "after")]
    header += ["S_acc after", *(["answers before", "answers after"] if turn else [])]
    rows = []
    for group in groups:
        evaluations = [[run.summary.get(when) for run in group.runs] for when in ("before", "after")]
        before, after = ([scores_for_turn(scores, turn) for scores in own] for own in evaluations)
        pairs = [greedy_if_recorded(*pair) for pair in zip(before, after, strict=True)]
        gains = [b["exact_match"] - a["exact_match"] for a, b in pairs if has_exact_match(a, b)]
        cells = [exact_match_values(scores.get("greedy") for scores in own) for own in (before, after)]
        cells += [gains, exact_match_values(before), exact_match_values(after)]
        cells += [extra_values(own, key) for key in extra for own in (before, after)]
        cells.append([scores["s_acc"] for scores in map(first_scores, after) if has_exact_match(scores)])
        cells += [
            exact_match_values(first_scores(scores_for_turn(scores, "answers")) for scores in own)
            for own in evaluations
            if turn
        ]
        rows.append((group.label, len(group.runs), *map(format_mean_and_sd, cells)))
    note = (
        f"Exact match on held-out {'call turns' if turn else 'prompts'}, greedy and sampled at temperature T; mean "
        "over runs ± one standard deviation. The gain, S_acc and answers are greedy if recorded."
    )
    return f"## Result\n\n{note}\n\n{markdown_table(header, rows)}"


EXTRA_COLUMNS = {"low_temperature": "low T", "policy_entropy": "policy entropy"}


def any_recorded(groups: Sequence[RunGroup], key: str) -> bool:
    summaries = [run.summary for group in groups for run in group.runs]
    return any((summary.get(when) or {}).get(key) is not None for summary in summaries for when in ("before", "after"))


def extra_values(evaluations: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    if key == "low_temperature":
        return exact_match_values(scores.get(key) for scores in evaluations)
    return [scores[key] for scores in evaluations if is_number(scores.get(key))]


def first_scores(scores: Mapping[str, Any]) -> Mapping[str, Any]:
    return greedy_if_recorded(scores)[0]


def exact_match_values(evaluations: Iterable[Mapping[str, Any] | None]) -> list[float]:
    return [scores["exact_match"] for scores in evaluations if scores and has_exact_match(scores)]


def has_exact_match(*evaluations: Mapping[str, Any] | None) -> bool:
    return all(is_number((score or {}).get("exact_match")) for score in evaluations)


def build_region_rows(groups: Sequence[RunGroup]) -> list[tuple[str, ...]]:
    rows = []
    for group in groups:
        for region in REGION_COLORS:
            cells = [format_early_to_late(group, quantity, region) for quantity in ("entropy", "weight", "share")]
            if any(cell != "–" for cell in cells):
                rows.append((f"{group.label}: {region}" if len(groups) > 1 else region, *cells))
    return rows


def format_early_to_late(group: RunGroup, quantity: str, region: str) -> str:
    values = metric_curve(group.runs, REGION_METRIC.format(quantity=quantity, region=region)).mean
    if not values:
        return "–"
    part = max(1, len(values) // 10)
    return format_change(sum(values[:part]) / part, sum(values[-part:]) / part)


def render_sample_responses(run: Run) -> str:
    if not run.responses:
        return ""
    blocks = []
    for row in (run.responses[0], run.responses[-1]):
        title = f"Step {row.get('step')}, reward {row.get('reward', float('nan')):.3f}"
        text = str(row.get("response", ""))
        # A fence longer than any run of backticks in the response, so that the response cannot close it.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        blocks.append(f"{title}\n\n{fence}text\n{text}\n{fence}")
    return f"## First and last recorded response ({run.name})\n\n" + "\n\n".join(blocks)


def render_run_table(groups: Sequence[RunGroup]) -> str:
    rows, turn = [], headline_turn_of_runs(run for group in groups for run in group.runs)
    for group in groups:
        for run in group.runs:
            pair = greedy_if_recorded(*(scores_for_turn(run.summary.get(when), turn) for when in ("before", "after")))
            libraries = run.environment.get("libraries") or {}
            versions = [libraries.get(library, "–") for library in ("torch", "trl")]
            rows.append(
                (
                    run.name,
                    group.label,
                    last_finished_step(run),
                    format_change(*(scores.get("exact_match") for scores in pair)),
                    *versions,
                )
            )
    exact = "exact match, call turns" if turn else "exact match"
    return markdown_table(("run", "curve", "steps", exact, "torch", "trl"), rows)
