"""Reads the run folders of a grid into a `ComparisonReport`, which contains every value that the page shows.

The run folders are `DIR/runs/METHOD-SEED`, or `METHOD@START-SEED` if the grid has several starting models. A metric
that a run did not record is missing, never 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rest_rl.compare.grid import LOGS_FOLDER, METHODS, RUNS_FOLDER, Grid, RunName, is_finished
from rest_rl.compare.statistics import (
    NAN,
    AtEqualEntropy,
    Curve,
    Paired,
    StepsToTarget,
    area_under_curve,
    compare_at_equal_entropy,
    compare_paired,
    detectable_difference,
    mean_interval,
    pooled_sd,
    steps_to_target,
    trailing_mean,
)
from rest_rl.config import parse_recorded_run
from rest_rl.errors import UserError
from rest_rl.report.tables import (
    MONITORING_KEYS,
    SEED_KEYS,
    flatten,
    greedy_if_recorded,
    headline_key,
    headline_turn,
    is_number,
    last_finished_step,
    scores_for_turn,
    values_by_step,
)
from rest_rl.response import TURNS, Turn
from rest_rl.runlog import Run, read_run
from rest_rl.statistics import Interval, q_values

EXACT, ACCURACY, LENGTH, ENTROPY = "rest/exact_match", "rest/accuracy", "completions/mean_length", "entropy"
RANDOM, PERMUTED, REST = "random", "permuted", "rest"
# If a run has fewer evaluations during training, the steps to a target are counted on the training samples instead.
MIN_EVALUATIONS = 4


class Metric(NamedTuple):
    """A metric of finished runs: its label in tables, what it measures, and whether it is a share from 0 to 1.

    Shares are shown in percent with one decimal, other values with `digits` decimals.
    """

    label: str
    text: str
    is_share: bool = True
    digits: int = 1


ALL_TURN_METRICS: dict[str, Metric] = {
    "exact_greedy": Metric("greedy exact match", "held-out prompts after training, greedy"),
    "exact": Metric("exact match at T = 1", "held-out prompts after training, sampled at temperature 1"),
    "exact_low": Metric("exact match at low T", "exact match on the same prompts, sampled at `eval.low_temperature`"),
    "policy_entropy": Metric(
        "policy entropy", "mean over the tokens of the responses at temperature 1, in nats", is_share=False, digits=3
    ),
    "s_acc": Metric("S_acc", "held-out prompts after training, greedy if recorded, else sampled"),
    "train_exact": Metric("training exact match", "mean over all steps on the training samples (area under the curve)"),
    "train_s_acc": Metric("training S_acc", "mean over all steps on the training samples (area under the curve)"),
    "train_exact_end": Metric(
        "exact match, last fifth", "mean over the last fifth of the steps on the training samples"
    ),
    "slice_exact": Metric("slice", "exact match on the held-out slice during training (area under the curve)"),
    "gain": Metric("gain", "exact match as in the first metric, after minus before training"),
    "tokens": Metric("tokens", "mean length of a training response", is_share=False),
}
METRICS = {
    **ALL_TURN_METRICS,
    **{
        f"{key}_{turn}": Metric(f"{metric.label}, {TURNS[turn]}", f"{metric.text}; {TURNS[turn]} only")
        for key, metric in ALL_TURN_METRICS.items()
        if metric.is_share
        for turn in TURNS
    },
}
"""All metrics: over all turns, and separately over call turns and answer turns."""
DIFFERENCE_METRICS = ("gain", *(f"gain_{turn}" for turn in TURNS))
"""Metrics that are differences of shares and may be negative."""
# The verdict rests on the first of these metrics that was measured, over call turns if the runs separate them from
# answer turns. The order was fixed before any grid was trained, so that no result could influence the choice.
# Greedy first: a score at temperature 1 also rises if the policy only becomes sharper.
PRIMARY_CANDIDATES = ("exact_greedy", "exact", "train_exact_end")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of the grid, with its value of each metric (by the keys of `METRICS`)."""

    name: RunName
    run: Run
    values: Mapping[str, float]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recorded configuration as one flat table, with keys such as `trl.learning_rate`."""
        return flatten(parse_recorded_run(self.run.config, str(self.run.folder)))


@dataclass(frozen=True)
class MetricResult:
    """One metric of a method: its values by seed, their mean, and the paired difference from the baseline."""

    by_seed: Mapping[int, float]
    mean: Interval
    paired: Paired | None
    """None for the baseline itself, and for a method that has no seed in common with the baseline."""
    q: float
    """p of the t test, corrected for the number of methods; NaN without a test."""


@dataclass(frozen=True)
class MethodResult:
    """All finished runs of one method from one warm start (the model that they start from), and their metrics."""

    label: str
    method: str
    start: str
    runs: tuple[FinishedRun, ...]
    metrics: Mapping[str, MetricResult]
    to_final: StepsToTarget | None
    to_best: StepsToTarget | None
    at_entropy: AtEqualEntropy | None
    """The comparison with the baseline at equal policy entropy; None for the baseline, or without common curves."""
    over_rest: Paired | None
    """Primary metric minus that of `rest` from the same warm start; None for `rest` itself, or if `rest` has no run."""
    over_permuted: Paired | None
    """Primary metric minus that of `permuted` from the same warm start; None for `permuted`, or if it has no run."""

    @property
    def seeds(self) -> list[int]:
        return [run.name.seed for run in self.runs]

    @property
    def role(self) -> str:
        """The purpose of the method in a grid; methods that the grid file defines have the role "method"."""
        return METHODS[self.method].role if self.method in METHODS else "method"


class Statement(NamedTuple):
    """One statement of the verdict: `kind` is for programs, `text` is one or two sentences of Markdown."""

    kind: str
    text: str


@dataclass(frozen=True)
class ComparisonReport:
    """The results of a grid: metrics and tests by method, the verdict, and which runs are missing."""

    folder: Path
    reference: str
    """The baseline method that all others are compared with."""
    primary: str
    """The metric (a key of `METRICS`) on which the verdict rests."""
    lines: tuple[MethodResult, ...]
    """The methods by warm start, the baseline first."""
    unfinished: Mapping[str, str]
    """By name of a run folder, the reason why a planned run, or one found in the grid's folder, is left out."""
    unequal: tuple[str, ...]
    """Settings that differ between runs that should differ only in method and seed."""
    counted_on: str
    """A description of the curves on which the steps to a target are counted."""
    verdict: tuple[Statement, ...] = ()
    page: Path | None = None
    """compare.md; None if no run of the baseline is finished."""
    headlines: Mapping[str, str] = field(default_factory=dict)
    """By metric over all turns, the metric to show instead: over call turns if answer turns were measured too."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """By name of a run that failed in this call of `compare`, how the run ended and where its log is."""
    is_interrupted: bool = False
    """Whether the user stopped the training; the same call resumes it."""

    @property
    def starts(self) -> list[str]:
        """The names of the warm starts; one empty name if the grid has none."""
        return list(dict.fromkeys(line.start for line in self.lines))

    @property
    def unfinished_runs(self) -> list[RunName]:
        """The parsed names of the unfinished runs; folders whose names do not parse as `RunName` are left out."""
        return [name for folder in self.unfinished if (name := RunName.parse(folder))]

    @property
    def absent(self) -> list[str]:
        """The labels of the methods that have no finished run."""
        present = {line.label for line in self.lines}
        return list(dict.fromkeys(name.label for name in self.unfinished_runs if name.label not in present))

    def headline(self, key: str) -> str:
        """Return the metric to show instead of `key`: its version over call turns if answer turns were measured too."""
        return self.headlines.get(key, key)

    def line(self, method: str, start: str = "") -> MethodResult | None:
        """Return the result of a method from a warm start, or None if it has no finished run."""
        return next((line for line in self.lines if (line.method, line.start) == (method, start)), None)

    def rivals(self) -> list[MethodResult]:
        """Return the results of all methods except the baseline."""
        return [line for line in self.lines if line.method != self.reference]

    def judged(self, start: str | None = None) -> list[MethodResult]:
        """Return the methods in the verdict: all with the primary metric but the baseline and the control `random`."""
        rivals = [line for line in self.rivals() if start in (None, line.start)]
        return [line for line in rivals if self.primary in line.metrics and line.method != RANDOM]

    @property
    def is_single(self) -> bool:
        """Whether the verdict is about only one method; p values then need no correction for several tests."""
        return len(self.judged()) == 1

    @cached_property
    def shared_seeds(self) -> dict[str, int]:
        """For each method in the verdict, the number of seeds with the primary metric in both it and the baseline."""
        tests = {line.label: line.metrics[self.primary].paired for line in self.judged()}
        return {label: test.n if test else 0 for label, test in tests.items()}

    @property
    def seeds(self) -> int:
        """The largest number of seeds that a method in the verdict shares with the baseline."""
        return max(self.shared_seeds.values(), default=0)

    @cached_property
    def sd(self) -> float:
        """The pooled standard deviation of the paired differences in the primary metric."""
        tests = [line.metrics[self.primary].paired for line in self.judged()]
        return pooled_sd([(test.sd, test.n) for test in tests if test])

    @cached_property
    def detectable(self) -> float:
        """The smallest true difference in the primary metric that `seeds` seeds detect with a power of 80 %."""
        return detectable_difference(self.sd, self.seeds)


def collect(folder: Path, grid: Grid | None, reference: str) -> ComparisonReport:
    """Read the run folders of a grid, and compare every method with the baseline `reference` from the same warm start.

    `grid` defines the planned runs; pass None if another program trained the runs.
    """
    runs, unfinished = read_runs(folder, grid, reference)
    headlines = {key: headline_metric(runs, key) for key in ALL_TURN_METRICS}
    primary = headlines[
        next((key for key in PRIMARY_CANDIDATES if any(key in run.values for run in runs)), PRIMARY_CANDIDATES[-1])
    ]
    curves, counted_on = step_curves(runs)
    return ComparisonReport(
        folder=folder,
        reference=reference,
        primary=primary,
        lines=compare_methods(runs, reference, primary, curves),
        unfinished=unfinished,
        unequal=tuple(find_unequal_settings(runs, grid)),
        counted_on=counted_on,
        headlines=headlines,
    )


def headline_metric(runs: Sequence[FinishedRun], key: str) -> str:
    # The same rule as `headline_turn`: call turns only if every run has them, so that different turns never mix.
    known = [run.values for run in runs if key in run.values]
    is_split = known and all(f"{key}_calls" in run for run in known) and any(f"{key}_answers" in run for run in known)
    return f"{key}_calls" if is_split else key


def read_runs(folder: Path, grid: Grid | None, reference: str) -> tuple[list[FinishedRun], dict[str, str]]:
    # Returns the finished runs, those of the baseline first, and by folder name why other runs are left out.
    runs: list[FinishedRun] = []
    unfinished: dict[str, str] = {}
    for path in sorted(path for path in (folder / RUNS_FOLDER).glob("[!.]*") if path.is_dir()):
        name = RunName.parse(path.name)
        try:
            run = read_run(path)
        except UserError:
            unfinished[path.name] = "contains no run"
            continue
        if name is None:
            unfinished[path.name] = "is not named METHOD-SEED"
        elif not is_finished(run.summary):
            unfinished[path.name] = f"is unfinished at step {last_finished_step(run)}"
        else:
            runs.append(FinishedRun(name, run, compute_metrics(run)))
    found = {*unfinished, *(str(run.name) for run in runs)}
    for name in map(str, grid.run_names() if grid else ()):
        if name not in found:  # a run that fails before its first step leaves a log but no folder
            log = Path(LOGS_FOLDER) / f"{name}.log"
            is_begun = (folder / log).is_file() and (folder / log).stat().st_size > 0
            unfinished[name] = f"has no run folder (see {log})" if is_begun else "has not started"
    # The baseline first, then methods of the grid file (0.5), then the package's methods in their own order.
    order = {name: index for index, name in enumerate((reference, *(name for name in METHODS if name != reference)))}
    runs.sort(key=lambda run: (run.name.start, order.get(run.name.method, 0.5), run.name))
    return runs, unfinished


def compute_metrics(run: Run) -> dict[str, float]:
    lengths = list(values_by_step(run.metrics, LENGTH).values())
    found: dict[str, Any] = {"tokens": statistics.fmean(lengths) if lengths else None}
    found["policy_entropy"] = (run.summary.get("after") or {}).get("policy_entropy")
    for turn in (None, *TURNS):
        found |= {key if turn is None else f"{key}_{turn}": value for key, value in compute_shares(run, turn).items()}
    return {key: float(found[key]) for key in METRICS if is_number(found.get(key))}


def compute_shares(run: Run, turn: Turn | None) -> dict[str, Any]:
    before, after = (scores_for_turn(run.summary.get(when), turn) for when in ("before", "after"))
    ending = "" if turn is None else f"_{turn}"
    exact, accuracy = (list(values_by_step(run.metrics, key + ending).values()) for key in (EXACT, ACCURACY))
    first, last = greedy_if_recorded(before, after)
    found = {
        "exact_greedy": (after.get("greedy") or {}).get("exact_match"),
        "exact": after.get("exact_match"),
        "exact_low": (after.get("low_temperature") or {}).get("exact_match"),
        "s_acc": greedy_if_recorded(after)[0].get("s_acc"),
        "train_exact": statistics.fmean(exact) if exact else None,
        "train_s_acc": statistics.fmean(accuracy) if accuracy else None,
        "train_exact_end": statistics.fmean(exact[-max(1, len(exact) // 5) :]) if exact else None,
        "slice_exact": area_under_curve(slice_curve(run, turn)),
    }
    if is_number(first.get("exact_match")) and is_number(last.get("exact_match")):
        found["gain"] = last["exact_match"] - first["exact_match"]
    return found


def slice_curve(run: Run, turn: Turn | None) -> dict[int, float]:
    """Return exact match on held-out prompts during training, by step; over all turns if `turn` is None."""
    scores = greedy_if_recorded(*(scores_for_turn(row, turn) for row in run.evaluations))
    steps = (row.get("step") for row in run.evaluations)
    return values_by_step([{**own, "step": step} for own, step in zip(scores, steps, strict=True)], "exact_match")


def step_curves(runs: Sequence[FinishedRun]) -> tuple[dict[RunName, Curve], str]:
    """Return each run's learning curve, used to count steps to a target, and a description of these curves."""
    # Exact match on the held-out slice if every run evaluated it often enough, otherwise on the training samples, which
    # are new to the policy when they are scored.
    if all(len(run.run.evaluations) >= MIN_EVALUATIONS for run in runs):
        turn = headline_turn(row for run in runs for row in run.run.evaluations)
        what = f"the held-out slice{f', {TURNS[turn]}' if turn else ''}"
        return {run.name: slice_curve(run.run, turn) for run in runs}, what
    key = headline_key([run.run for run in runs], EXACT)
    what = "the training samples" if key == EXACT else "the call turns of the training samples"
    return smoothed_curves(runs, key), f"{what}, trailing mean over a tenth of the steps"


def smoothed_curves(runs: Sequence[FinishedRun], key: str) -> dict[RunName, Curve]:
    return {run.name: trailing_mean(values_by_step(run.run.metrics, key)) for run in runs}


def compare_methods(
    runs: Sequence[FinishedRun], reference: str, primary: str, curves: Mapping[RunName, Curve]
) -> tuple[MethodResult, ...]:
    # Every method is compared with the baseline from the same warm start, metric by metric.
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault((run.name.start, run.name.method), []).append(run)

    def by_seed(group: tuple[str, str], metric: str) -> dict[int, float]:
        return {run.name.seed: run.values[metric] for run in groups.get(group, ()) if metric in run.values}

    def over(group: tuple[str, str], method: str, metric: str) -> Paired | None:
        other = (group[0], method)
        return (
            compare_paired(by_seed(group, metric), by_seed(other, metric))
            if group != other and other in groups
            else None
        )

    def steps(group: tuple[str, str], *, best: bool) -> StepsToTarget | None:
        pair = (groups[group], groups.get((group[0], reference), []))
        ours, theirs = ({run.name.seed: curves[run.name] for run in members} for members in pair)
        return steps_to_target(ours, theirs, best=best)

    at_entropy = compare_all_at_equal_entropy(groups, reference)
    metrics: dict[tuple[str, str], dict[str, MetricResult]] = {group: {} for group in groups}
    for metric, about in METRICS.items():
        tests = {group: test for group in groups if (test := over(group, reference, metric)) and test.n}
        # `random` is left out of the correction for the number of methods: it is certain to differ, and a certain
        # rejection would make the q of all others smaller.
        tested = [group for group in tests if group[1] != RANDOM]
        q = dict(zip(tested, q_values([tests[group].p_t for group in tested]), strict=True))
        for group in groups:
            if values := by_seed(group, metric):
                is_bounded = about.is_share and metric not in DIFFERENCE_METRICS
                mean = mean_interval(list(values.values()), (0.0, 1.0) if is_bounded else None)
                metrics[group][metric] = MetricResult(values, mean, tests.get(group), q.get(group, NAN))
    return tuple(
        MethodResult(
            label=members[0].name.label,
            method=group[1],
            start=group[0],
            runs=tuple(members),
            metrics=metrics[group],
            to_final=steps(group, best=False),
            to_best=steps(group, best=True),
            at_entropy=at_entropy.get(group),
            over_rest=over(group, REST, primary),
            over_permuted=over(group, PERMUTED, primary),
        )
        for group, members in groups.items()
    )


def compare_all_at_equal_entropy(
    groups: Mapping[tuple[str, str], Sequence[FinishedRun]], reference: str
) -> dict[tuple[str, str], AtEqualEntropy | None]:
    runs = [run for members in groups.values() for run in members]
    entropies = smoothed_curves(runs, ENTROPY)
    accuracies = smoothed_curves(runs, headline_key([run.run for run in runs], EXACT))
    curves = {
        group: {run.name.seed: (entropies[run.name], accuracies[run.name]) for run in members}
        for group, members in groups.items()
    }
    return {
        group: compare_at_equal_entropy(own, curves.get((group[0], reference), {}))
        for group, own in curves.items()
        if group[1] != reference
    }


def find_unequal_settings(runs: Sequence[FinishedRun], grid: Grid | None) -> list[str]:
    # One line per difference between runs of one warm start, other than seed and what the methods change. There should
    # be none. The digest covers the samples that a run trained on, which must be equal for all methods of a seed.
    found = []
    changed_by_methods = {key for changes in (grid.methods if grid else {}).values() for key in flatten(changes)}
    free = (*SEED_KEYS, *MONITORING_KEYS, *changed_by_methods)
    for start in dict.fromkeys(run.name.start for run in runs):
        peers = [run for run in runs if run.name.start == start]
        shared = {str(run.name): {"steps": run.run.summary.get("steps")} for run in peers}
        for run in peers:
            shared[str(run.name)] |= {
                key: value
                for key, value in run.settings.items()
                if not key.startswith(("rest.", "run.")) and key not in free
            }
        found += find_differing_keys(shared)
        for seed in dict.fromkeys(run.name.seed for run in peers):
            digests = {str(run.name): (run.run.summary.get("data") or {}).get("digest") for run in peers
                       if run.name.seed == seed}  # fmt: skip
            found += find_differing_keys({name: {"samples trained on": digest} for name, digest in digests.items()})
    for label in dict.fromkeys(run.name.label for run in runs):
        tables = [method_settings(run) for run in runs if run.name.label == label]
        changed = sorted({key for table in tables for key in table if any(t.get(key) != table[key] for t in tables)})
        if changed:
            found.append(f"the settings of {label} differ between its seeds: {', '.join(changed)}")
    return found


def find_differing_keys(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = []
    for key in sorted({key for table in settings.values() for key in table}):
        by_value: dict[str, list[str]] = {}
        for name, table in settings.items():
            by_value.setdefault(str(table.get(key, "unset")), []).append(name)
        if len(by_value) > 1:
            rarest_first = sorted(by_value.items(), key=lambda item: len(item[1]))
            found.append(f"{key}: " + "; ".join(f"{value} in {list_some(names)}" for value, names in rarest_first))
    return found


def list_some(names: Sequence[str], max_names: int = 3) -> str:
    return ", ".join(names[:max_names]) + (f" and {len(names) - max_names} more" if len(names) > max_names else "")


def method_settings(run: FinishedRun) -> dict[str, str]:
    # Leave out the seed of the shuffle, because for `permuted` it depends on the seed of the run.
    return {
        key: str(value) for key, value in run.settings.items() if key.startswith("rest.") and key != "rest.weights.seed"
    }
