"""Everything a grid's run folders say, collected once into a frozen `ComparisonReport`; the renderers only format it.

Reads run folders `DIR/runs/METHOD-SEED` (`METHOD@START-SEED` with several warm starts). A figure that a run did not
record is missing, never 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rest_rl.compare.grid import LOGS_FOLDER, METHODS, RUNS_FOLDER, Grid, RunName, is_finished
from rest_rl.compare.statistics import (
    NAN,
    Curve,
    Paired,
    StepsToTarget,
    area_under_curve,
    compare_paired,
    detectable_difference,
    mean_interval,
    pooled_sd,
    steps_to_target,
)
from rest_rl.config import parse_recorded_run
from rest_rl.errors import UserError
from rest_rl.report.tables import (
    MONITORING_KEYS,
    SEED_KEYS,
    flatten,
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

EXACT, ACCURACY, LENGTH = "rest/exact_match", "rest/accuracy", "completions/mean_length"
RANDOM, PERMUTED, REST = "random", "permuted", "rest"
MIN_EVALUATIONS = 4
"""Measurements during training from which on steps are counted on them instead of on the training samples."""


class Metric(NamedTuple):
    """A figure of a run."""

    label: str
    text: str
    is_share: bool = True


ALL_TURN_METRICS: dict[str, Metric] = {
    "exact": Metric("exact match", "held-out prompts after training, sampled at temperature 1"),
    "exact_greedy": Metric("greedy", "exact match on the same prompts, greedy"),
    "s_acc": Metric("S_acc", "held-out prompts after training, sampled"),
    "train_exact": Metric(
        "training exact match", "mean over all steps, of the samples trained on: area under the curve"
    ),
    "train_s_acc": Metric("training S_acc", "mean over all steps: area under the curve"),
    "train_exact_end": Metric("exact match, last fifth", "mean over the last fifth of the steps, training samples"),
    "slice_exact": Metric("slice", "exact match on the held-out slice during training, area under the curve"),
    "gain": Metric("gain", "exact match on held-out prompts, after - before training, sampled"),
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
"""All figures: over all turns, and apart over call turns and answer turns."""
DIFFERENCE_METRICS = ("gain", *(f"gain_{turn}" for turn in TURNS))
"""Figures that are differences of shares and may be negative."""
PRIMARY_CANDIDATES = ("exact", "train_exact_end")
"""What the verdict is about: the first that was measured, over call turns where the runs tell these from answer turns.
Chosen before any grid was looked at."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of the grid and its figures, by the keys of METRICS."""

    name: RunName
    run: Run
    values: Mapping[str, float]

    @cached_property
    def settings(self) -> dict[str, Any]:
        return flatten(parse_recorded_run(self.run.config, str(self.run.folder)))


@dataclass(frozen=True)
class MetricResult:
    """One figure of a method: by seed, its mean, and its difference to the reference."""

    by_seed: Mapping[int, float]
    mean: Interval
    paired: Paired | None
    """None for the reference itself, and without a common seed."""
    q: float
    """The t test's p, corrected for the number of methods; NaN where there is none."""


@dataclass(frozen=True)
class MethodResult:
    """All finished runs of one method from one start."""

    label: str
    method: str
    start: str
    runs: tuple[FinishedRun, ...]
    metrics: Mapping[str, MetricResult]
    to_final: StepsToTarget | None
    to_best: StepsToTarget | None
    over_rest: Paired | None
    """The primary figure minus that of `rest` from the same start, if it is another method of the grid."""
    over_permuted: Paired | None
    """Likewise minus that of `permuted`."""

    @property
    def seeds(self) -> list[int]:
        return [run.name.seed for run in self.runs]

    @property
    def role(self) -> str:
        """What the method is there for; one of the grid file's own is a method."""
        return METHODS[self.method].role if self.method in METHODS else "method"


class Statement(NamedTuple):
    """One finding of the verdict; `kind` is for programs, `text` is a sentence or two of Markdown."""

    kind: str
    text: str


@dataclass(frozen=True)
class ComparisonReport:
    """What a grid's runs say, and what became of the runs."""

    folder: Path
    reference: str
    primary: str
    """The key of METRICS that the verdict is about."""
    lines: tuple[MethodResult, ...]
    """By start and method, the reference first."""
    unfinished: Mapping[str, str]
    """Why a run, wanted by the grid or found in its folder, is left out."""
    unequal: tuple[str, ...]
    """What differs between runs that should only differ in method and seed."""
    counted_on: str
    """The curve on which steps are counted, in words."""
    verdict: tuple[Statement, ...] = ()
    page: Path | None = None
    """compare.md; None where no run of the reference is finished."""
    headlines: Mapping[str, str] = field(default_factory=dict)
    """By figure over all turns the one that stands for it: that over call turns where answers were measured too."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """By run of this call what ended it and where its log is."""
    is_interrupted: bool = False
    """Whether the user stopped the training of the grid; the same call goes on with it."""

    @property
    def starts(self) -> list[str]:
        """The warm starts; one empty name if the grid has none."""
        return list(dict.fromkeys(line.start for line in self.lines))

    @property
    def unfinished_runs(self) -> list[RunName]:
        """Which of the unfinished are runs of the grid."""
        return [name for folder in self.unfinished if (name := RunName.parse(folder))]

    @property
    def absent(self) -> list[str]:
        """Labels of the methods without a finished run, which have no line."""
        present = {line.label for line in self.lines}
        return list(dict.fromkeys(name.label for name in self.unfinished_runs if name.label not in present))

    def headline(self, key: str) -> str:
        """The figure that stands for `key`."""
        return self.headlines.get(key, key)

    def line(self, method: str, start: str = "") -> MethodResult | None:
        return next((line for line in self.lines if (line.method, line.start) == (method, start)), None)

    def rivals(self) -> list[MethodResult]:
        return [line for line in self.lines if line.method != self.reference]

    def judged(self, start: str | None = None) -> list[MethodResult]:
        """The rivals that the verdict is about: those with the primary figure, without `random`."""
        rivals = [line for line in self.rivals() if start in (None, line.start)]
        return [line for line in rivals if self.primary in line.metrics and line.method != RANDOM]

    @property
    def is_single(self) -> bool:
        """Whether only one method is judged, whose p needs no correction."""
        return len(self.judged()) == 1

    @cached_property
    def shared_seeds(self) -> dict[str, int]:
        """How many seeds with the primary figure each judged method shares with the reference."""
        tests = {line.label: line.metrics[self.primary].paired for line in self.judged()}
        return {label: test.n if test else 0 for label, test in tests.items()}

    @property
    def seeds(self) -> int:
        """The most seeds that a judged method shares with the reference."""
        return max(self.shared_seeds.values(), default=0)

    @cached_property
    def sd(self) -> float:
        """Common standard deviation of the paired differences of the primary figure."""
        tests = [line.metrics[self.primary].paired for line in self.judged()]
        return pooled_sd([(test.sd, test.n) for test in tests if test])

    @cached_property
    def detectable(self) -> float:
        """The smallest difference that the grid would have seen four times out of five, with all of its seeds."""
        return detectable_difference(self.sd, self.seeds)


def collect(folder: Path, grid: Grid | None, reference: str) -> ComparisonReport:
    """Read the run folders of a grid and compare every method with the reference from the same start.

    `grid` names the runs that were wanted; None if another loop trained in the folder. Without a finished run there
    are no lines.
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
        unequal=tuple(find_unequal_settings(runs)),
        counted_on=counted_on,
        headlines=headlines,
    )


def headline_metric(runs: Sequence[FinishedRun], key: str) -> str:
    """The figure over call turns where every run has it and some run has answer turns: unlike figures never mix."""
    known = [run.values for run in runs if key in run.values]
    is_split = known and all(f"{key}_calls" in own for own in known) and any(f"{key}_answers" in own for own in known)
    return f"{key}_calls" if is_split else key


def read_runs(folder: Path, grid: Grid | None, reference: str) -> tuple[list[FinishedRun], dict[str, str]]:
    """The finished runs, the reference's first, and why each of the others, found or wanted, is left out."""
    runs: list[FinishedRun] = []
    unfinished: dict[str, str] = {}
    for path in sorted(path for path in (folder / RUNS_FOLDER).glob("[!.]*") if path.is_dir()):
        name = RunName.parse(path.name)
        try:
            run = read_run(path)
        except UserError:
            unfinished[path.name] = "holds no run"
            continue
        if name is None:
            unfinished[path.name] = "is not called METHOD-SEED"
        elif not is_finished(run.summary):
            unfinished[path.name] = f"has {last_finished_step(run)} steps"
        else:
            runs.append(FinishedRun(name, run, compute_metrics(run)))
    found = {*unfinished, *(str(run.name) for run in runs)}
    for name in map(str, grid.run_names() if grid else ()):
        if name not in found:  # a run that failed early has no folder
            log = Path(LOGS_FOLDER) / f"{name}.log"
            is_begun = (folder / log).is_file() and (folder / log).stat().st_size > 0
            unfinished[name] = f"has no run folder (see {log})" if is_begun else "has not begun"
    order = {name: index for index, name in enumerate((reference, *(name for name in METHODS if name != reference)))}
    runs.sort(key=lambda run: (run.name.start, order.get(run.name.method, 0.5), run.name))
    return runs, unfinished


def compute_metrics(run: Run) -> dict[str, float]:
    """The figures of METRICS that a run recorded."""
    lengths = list(values_by_step(run.metrics, LENGTH).values())
    found: dict[str, Any] = {"tokens": statistics.fmean(lengths) if lengths else None}
    for turn in (None, *TURNS):
        found |= {key if turn is None else f"{key}_{turn}": value for key, value in compute_shares(run, turn).items()}
    return {key: float(found[key]) for key in METRICS if is_number(found.get(key))}


def compute_shares(run: Run, turn: Turn | None) -> dict[str, Any]:
    """The figures that are shares, over one sort of turns or over all."""
    before, after = (scores_for_turn(run.summary.get(when), turn) for when in ("before", "after"))
    ending = "" if turn is None else f"_{turn}"
    exact, accuracy = (list(values_by_step(run.metrics, key + ending).values()) for key in (EXACT, ACCURACY))
    found = {
        "exact": after.get("exact_match"),
        "exact_greedy": (after.get("greedy") or {}).get("exact_match"),
        "s_acc": after.get("s_acc"),
        "train_exact": statistics.fmean(exact) if exact else None,
        "train_s_acc": statistics.fmean(accuracy) if accuracy else None,
        "train_exact_end": statistics.fmean(exact[-max(1, len(exact) // 5) :]) if exact else None,
        "slice_exact": area_under_curve(slice_curve(run, turn)),
    }
    if is_number(after.get("exact_match")) and is_number(before.get("exact_match")):
        found["gain"] = after["exact_match"] - before["exact_match"]
    return found


def slice_curve(run: Run, turn: Turn | None) -> dict[int, float]:
    """Exact match on the held-out slice by step."""
    return values_by_step(
        [{**scores_for_turn(row, turn), "step": row.get("step")} for row in run.evaluations], "exact_match"
    )


def step_curves(runs: Sequence[FinishedRun]) -> tuple[dict[RunName, Curve], str]:
    """The curve of each run on which steps are counted, and what it is.

    The held-out slice where every run measured it often enough; else exact match on the training samples (which the
    policy has not learnt from when it is measured), as the mean of the last tenth of the steps. Over call turns where
    the headline is.
    """
    if all(len(run.run.evaluations) >= MIN_EVALUATIONS for run in runs):
        turn = headline_turn(row for run in runs for row in run.run.evaluations)
        what = f"the held-out slice{f', {TURNS[turn]}' if turn else ''}, sampled"
        return {run.name: slice_curve(run.run, turn) for run in runs}, what
    key = headline_key([run.run for run in runs], EXACT)
    curves: dict[RunName, Curve] = {}
    for run in runs:
        raw = values_by_step(run.run.metrics, key)
        window = max(1, len(raw) // 10)
        means = np.convolve(list(raw.values()), np.full(window, 1 / window), "valid").tolist() if raw else []
        curves[run.name] = dict(zip(list(raw)[window - 1 :], means, strict=False))
    what = "the training samples" if key == EXACT else "the call turns of the training samples"
    return curves, f"{what}, mean of the last tenth of the steps"


def compare_methods(
    runs: Sequence[FinishedRun], reference: str, primary: str, curves: Mapping[RunName, Curve]
) -> tuple[MethodResult, ...]:
    """The runs by start and method, each method compared with the reference of its start."""
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
        ours, theirs = ({run.name.seed: curves[run.name] for run in own} for own in pair)
        return steps_to_target(ours, theirs, best=best)

    metrics: dict[tuple[str, str], dict[str, MetricResult]] = {group: {} for group in groups}
    for metric, about in METRICS.items():
        tests = {group: test for group in groups if (test := over(group, reference, metric)) and test.n}
        # What certainly differs would make the others' q smaller: random rewards are left out of the correction.
        tested = [group for group in tests if group[1] != RANDOM]
        q = dict(zip(tested, q_values([tests[group].p_t for group in tested]), strict=True))
        for group in groups:
            if values := by_seed(group, metric):
                is_bounded = about.is_share and metric not in DIFFERENCE_METRICS
                mean = mean_interval(list(values.values()), (0.0, 1.0) if is_bounded else None)
                metrics[group][metric] = MetricResult(values, mean, tests.get(group), q.get(group, NAN))
    return tuple(
        MethodResult(
            label=own[0].name.label,
            method=group[1],
            start=group[0],
            runs=tuple(own),
            metrics=metrics[group],
            to_final=steps(group, best=False),
            to_best=steps(group, best=True),
            over_rest=over(group, REST, primary),
            over_permuted=over(group, PERMUTED, primary),
        )
        for group, own in groups.items()
    )


def find_unequal_settings(runs: Sequence[FinishedRun]) -> list[str]:
    """What makes runs of one start differ besides method and seed, a line each: nothing should."""
    found = []
    free = (*SEED_KEYS, *MONITORING_KEYS)
    for start in dict.fromkeys(run.name.start for run in runs):
        own = [run for run in runs if run.name.start == start]
        shared = {str(run.name): {"steps": run.run.summary.get("steps")} for run in own}
        for run in own:
            shared[str(run.name)] |= {
                key: value
                for key, value in run.settings.items()
                if not key.startswith(("rest.", "run.")) and key not in free
            }
        found += find_differing_keys(shared)
        for seed in dict.fromkeys(run.name.seed for run in own):
            digests = {str(run.name): (run.run.summary.get("data") or {}).get("digest") for run in own
                       if run.name.seed == seed}  # fmt: skip
            found += find_differing_keys({name: {"samples trained on": digest} for name, digest in digests.items()})
    for label in dict.fromkeys(run.name.label for run in runs):
        tables = [method_settings(run) for run in runs if run.name.label == label]
        changed = sorted({key for table in tables for key in table if any(t.get(key) != table[key] for t in tables)})
        if changed:
            found.append(f"{label} is not the same method under each of its seeds: {', '.join(changed)}")
    return found


def find_differing_keys(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each key whose value differs between the named tables, the rarest value first."""
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
    """The settings of a run's method; the shuffle of `permuted` changes with the seed."""
    return {
        key: str(value) for key, value in run.settings.items() if key.startswith("rest.") and key != "rest.weights.seed"
    }
