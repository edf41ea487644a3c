"""What a grid of runs says: figures of every run, means over seeds, differences to the reference on the same seeds.

Reads run folders `DIR/runs/METHOD-SEED` (`METHOD@START-SEED` with several warm starts) and, for what is not there,
`DIR/grid.toml`. A figure that a run did not record is missing, never 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rest_rl.compare.grid import GRID, LOGS, METHODS, REFERENCE, RUNS, RunName, is_finished, read_grid
from rest_rl.compare.statistics import (
    NAN,
    Paired,
    Reach,
    detectable,
    mean_interval,
    paired,
    pooled_sd,
    reach,
    trailing_mean,
)
from rest_rl.config import parse_toml
from rest_rl.errors import UserError
from rest_rl.report.tables import SEED_KEYS, WATCHING_KEYS, finished_steps, flatten, is_number
from rest_rl.runlog import Row, Run, read_run
from rest_rl.statistics import Interval, q_values

EXACT, REWARDED = "rest/exact_match", "rest/accuracy"
LENGTH = "completions/mean_length"
TENTH, FIFTH = 10, 5
RANDOM = "random"
FEWEST_MEASURED = 4
"""Measurements during training from which on steps are counted on them instead of on the training samples."""


class Metric(NamedTuple):
    """A figure of a run."""

    label: str
    text: str
    is_share: bool = True


METRICS: dict[str, Metric] = {
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
PRIMARY = ("exact", "train_exact_end")
"""What the verdict is about: the first that was measured. Chosen before any grid was looked at."""


@dataclass(frozen=True)
class Cell:
    """A finished run and its figures."""

    name: RunName
    run: Run
    values: Mapping[str, float]


@dataclass(frozen=True)
class Versus:
    """One figure of a method: its mean over seeds, and what sets it apart from the reference."""

    mean: Interval
    paired: Paired | None
    q: float


@dataclass(frozen=True)
class Line:
    """All runs of one method from one start."""

    label: str
    method: str
    start: str
    cells: tuple[Cell, ...]
    versus: Mapping[str, Versus]
    to_final: Reach | None
    to_best: Reach | None

    @property
    def seeds(self) -> list[int]:
        """Seeds of its finished runs."""
        return [cell.name.seed for cell in self.cells]

    @property
    def role(self) -> str:
        """What the method is there for; one of the grid file's own is a method."""
        return METHODS[self.method].role if self.method in METHODS else "method"

    def by_seed(self, metric: str) -> dict[int, float]:
        """A figure by seed."""
        return {cell.name.seed: cell.values[metric] for cell in self.cells if metric in cell.values}


@dataclass(frozen=True)
class Comparison:
    """A whole grid."""

    folder: Path
    reference: str
    primary: str
    lines: tuple[Line, ...]
    unfinished: Mapping[str, str]
    """Why a run, wanted by the grid or found in its folder, is left out."""
    unequal: tuple[str, ...]
    counted_on: str
    """The curve on which steps are counted, in words."""

    @property
    def starts(self) -> list[str]:
        """The warm starts; one empty name if the grid has none."""
        return list(dict.fromkeys(line.start for line in self.lines))

    @property
    def unfinished_runs(self) -> list[RunName]:
        """What of the unfinished is a run of the grid."""
        return [name for folder in self.unfinished if (name := RunName.parse(folder))]

    @property
    def absent(self) -> list[str]:
        """Labels of the methods without a finished run, which have no line."""
        there = {line.label for line in self.lines}
        return list(dict.fromkeys(name.label for name in self.unfinished_runs if name.label not in there))

    def line(self, method: str, start: str = "") -> Line | None:
        """The line of a method from a start."""
        return next((line for line in self.lines if (line.method, line.start) == (method, start)), None)

    def rivals(self, start: str | None = None) -> list[Line]:
        """The lines that are compared with the reference."""
        return [line for line in self.lines if line.method != self.reference and start in (None, line.start)]

    def judged(self, start: str | None = None) -> list[Line]:
        """The rivals that the verdict is about: those with the primary figure, without rewards that know nothing."""
        return [line for line in self.rivals(start) if self.primary in line.versus and line.method != RANDOM]

    @property
    def is_single(self) -> bool:
        """Whether one method alone is judged, whose p needs no correction."""
        return len(self.judged()) == 1

    def shared_seeds(self, start: str | None = None) -> dict[str, int]:
        """How many seeds with the primary figure each judged method shares with the reference."""
        tests = {line.label: line.versus[self.primary].paired for line in self.judged(start)}
        return {label: test.n if test else 0 for label, test in tests.items()}

    @property
    def sd(self) -> float:
        """Common standard deviation of the paired differences of the primary figure."""
        tests = [line.versus[self.primary].paired for line in self.judged()]
        return pooled_sd([(test.sd, test.n) for test in tests if test])

    @property
    def seeds(self) -> int:
        """The most seeds that a judged method shares with the reference."""
        return max(self.shared_seeds().values(), default=0)

    @property
    def detectable(self) -> float:
        """The smallest difference that the grid would have seen four times out of five, with all of its seeds."""
        return detectable(self.sd, self.seeds)


def compare(folder: str | Path, reference: str = REFERENCE) -> Comparison:
    """Read a grid's run folders and compare every method with the reference from the same start."""
    cells, unfinished = read_cells(Path(folder), reference)
    if not cells:
        raise UserError(
            f"{folder} without a finished run", f"folders {RUNS}/METHOD-SEED of rest-rl train", "run the grid first"
        )
    if all(cell.name.method != reference for cell in cells):
        methods = ", ".join(dict.fromkeys(cell.name.method for cell in cells))
        raise ValueError(
            f"got no finished run of the reference {reference!r} in {folder}, only of {methods}; finish it, or name "
            "another with --reference"
        )
    primary = next((key for key in PRIMARY if any(key in cell.values for cell in cells)), PRIMARY[-1])
    curves, counted_on = step_curves(cells)
    return Comparison(
        folder=Path(folder),
        reference=reference,
        primary=primary,
        lines=compared_lines(cells, reference, curves),
        unfinished=unfinished,
        unequal=tuple(unequal_settings(cells)),
        counted_on=counted_on,
    )


def read_cells(folder: Path, reference: str) -> tuple[list[Cell], dict[str, str]]:
    """The finished runs below `folder/runs`, the reference's first, and why each of the others is left out.

    The others are those of `grid.toml` as well: a run that failed early has no folder.
    """
    cells: list[Cell] = []
    unfinished: dict[str, str] = {}
    places = sorted(path for path in (folder / RUNS).glob("*") if path.is_dir() and not path.name.startswith("."))
    for place in places:
        name = RunName.parse(place.name)
        try:
            run = read_run(place)
        except ValueError:
            unfinished[place.name] = "holds no run"
            continue
        if name is None:
            unfinished[place.name] = "is not called METHOD-SEED"
        elif not is_finished(run.summary):
            unfinished[place.name] = f"has {finished_steps(run)} steps"
        else:
            cells.append(Cell(name, run, figures(run)))
    found = {*unfinished, *(str(cell.name) for cell in cells)}
    unfinished |= {name: why_absent(folder, name) for name in wanted_runs(folder) if name not in found}
    order = {name: index for index, name in enumerate((reference, *(name for name in METHODS if name != reference)))}
    cells.sort(key=lambda cell: (cell.name.start, order.get(cell.name.method, 0.5), cell.name))
    return cells, unfinished


def wanted_runs(folder: Path) -> list[str]:
    """Names of the runs that were asked for in a grid's folder; none if another loop trained there."""
    return [str(name) for name, _ in read_grid(folder / GRID).runs()] if (folder / GRID).is_file() else []


def why_absent(folder: Path, name: str) -> str:
    """Why a wanted run has no folder."""
    log = Path(LOGS) / f"{name}.log"
    is_begun = (folder / log).is_file() and (folder / log).stat().st_size > 0
    return f"has no run folder (see {log})" if is_begun else "has not begun"


def figures(run: Run) -> dict[str, float]:
    """Every figure of METRICS that the run recorded."""
    before, after = run.summary.get("before") or {}, run.summary.get("after") or {}
    exact, rewarded, lengths = (list(metric_curve(run, key).values()) for key in (EXACT, REWARDED, LENGTH))
    found: dict[str, Any] = {
        "exact": after.get("exact_match"),
        "exact_greedy": (after.get("greedy") or {}).get("exact_match"),
        "s_acc": after.get("s_acc"),
        "train_exact": statistics.fmean(exact) if exact else None,
        "train_s_acc": statistics.fmean(rewarded) if rewarded else None,
        "train_exact_end": statistics.fmean(exact[-max(1, len(exact) // FIFTH) :]) if exact else None,
        "slice_exact": area_under(slice_curve(run)),
        "tokens": statistics.fmean(lengths) if lengths else None,
    }
    if is_number(after.get("exact_match")) and is_number(before.get("exact_match")):
        found["gain"] = after["exact_match"] - before["exact_match"]
    return {key: float(found[key]) for key in METRICS if is_number(found.get(key))}


def metric_curve(run: Run, key: str) -> dict[int, float]:
    """A metric of the training steps by step."""
    return points(run.metrics, key)


def slice_curve(run: Run) -> dict[int, float]:
    """Exact match on the held-out slice by step, sampled."""
    return points(run.evaluations, "exact_match")


def points(rows: Iterable[Row], key: str) -> dict[int, float]:
    """The numbers of some rows by step."""
    return {int(row["step"]): float(row[key]) for row in rows if is_number(row.get("step")) and is_number(row.get(key))}


def area_under(curve: Mapping[int, float]) -> float | None:
    """Area under a curve (trapezoids) over its range of steps: a mean over steps; None for less than two points."""
    steps = sorted(curve)
    if len(steps) < 2:
        return None
    parts = [(b - a) * (curve[a] + curve[b]) / 2 for a, b in pairwise(steps)]
    return sum(parts) / (steps[-1] - steps[0])


def step_curves(cells: Sequence[Cell]) -> tuple[dict[str, dict[int, float]], str]:
    """By run name the curve on which steps are counted, and what it is.

    The held-out slice where every run measured it often enough; else exact match on the training samples (which the
    policy has not learnt from when it is measured), as the mean of the last tenth of the steps.
    """
    if all(len(cell.run.evaluations) >= FEWEST_MEASURED for cell in cells):
        return {str(cell.name): slice_curve(cell.run) for cell in cells}, "the held-out slice, sampled"
    curves = {}
    for cell in cells:
        raw = metric_curve(cell.run, EXACT)
        window = max(1, len(raw) // TENTH)
        smooth = dict(zip(raw, trailing_mean(list(raw.values()), window), strict=True))
        # The first means are of fewer steps than the others: they would cross a level by noise.
        curves[str(cell.name)] = dict(list(smooth.items())[window - 1 :])
    return curves, "the training samples, mean of the last tenth of the steps"


def compared_lines(
    cells: Sequence[Cell], reference: str, curves: Mapping[str, Mapping[int, float]]
) -> tuple[Line, ...]:
    """The cells by method and start, each compared with the reference of its start; q-values over all but `random`."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.name.method, cell.name.start), []).append(cell)
    tests: dict[tuple[str, str], dict[str, Paired]] = {key: {} for key in groups}
    for (method, start), own in groups.items():
        if method != reference and (rivals := groups.get((reference, start))):
            for metric in METRICS:
                test = paired(values_by_seed(own, metric), values_by_seed(rivals, metric))
                tests[method, start] |= {metric: test} if test.n else {}
    q: dict[tuple[str, str, str], float] = {}
    for metric in METRICS:
        # What certainly differs would make the others' q smaller: rewards that know nothing stand alone.
        tested = [key for key in groups if metric in tests[key] and key[0] != RANDOM]
        adjusted = q_values([tests[key][metric].p_t for key in tested])
        q |= {(*key, metric): value for key, value in zip(tested, adjusted, strict=True)}
    return tuple(
        Line(
            label=own[0].name.label,
            method=method,
            start=start,
            cells=tuple(own),
            versus={
                metric: Versus(
                    mean_interval(list(values_by_seed(own, metric).values())),
                    tests[method, start].get(metric),
                    q.get((method, start, metric), NAN),
                )
                for metric in METRICS
                if values_by_seed(own, metric)
            },
            to_final=steps_to(own, groups.get((reference, start), []), curves, best=False),
            to_best=steps_to(own, groups.get((reference, start), []), curves, best=True),
        )
        for (method, start), own in groups.items()
    )


def values_by_seed(cells: Sequence[Cell], metric: str) -> dict[int, float]:
    """A figure of some cells by seed."""
    return {cell.name.seed: cell.values[metric] for cell in cells if metric in cell.values}


def steps_to(
    own: Sequence[Cell], others: Sequence[Cell], curves: Mapping[str, Mapping[int, float]], *, best: bool
) -> Reach | None:
    """Steps to where the reference ends, or to its best, as a share of its own."""
    ours, theirs = ({cell.name.seed: curves[str(cell.name)] for cell in cells} for cells in (own, others))
    return reach(ours, theirs, best=best)


def difference(ours: Line, theirs: Line, metric: str) -> Paired:
    """One figure of two methods on the seeds of both."""
    return paired(ours.by_seed(metric), theirs.by_seed(metric))


def unequal_settings(cells: Sequence[Cell]) -> list[str]:
    """What makes runs of one start unlike besides method and seed, a line each: they should have none of it."""
    found = []
    for start in dict.fromkeys(cell.name.start for cell in cells):
        own = [cell for cell in cells if cell.name.start == start]
        found += differing({str(cell.name): shared_settings(cell.run) for cell in own})
        for seed in dict.fromkeys(cell.name.seed for cell in own):
            found += differing({str(cell.name): trained_on(cell.run) for cell in own if cell.name.seed == seed})
    for label in dict.fromkeys(cell.name.label for cell in cells):
        own_tables = [method_settings(cell.run) for cell in cells if cell.name.label == label]
        changed = sorted(
            {key for table in own_tables for key in table if len({str(t.get(key)) for t in own_tables}) > 1}
        )
        if changed:
            found.append(f"{label} is not the same method under each of its seeds: {', '.join(changed)}")
    return found


def differing(settings: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for each key whose value differs between the named tables."""
    found = []
    for key in sorted({key for table in settings.values() for key in table}):
        by_value: dict[str, list[str]] = {}
        for name, table in settings.items():
            by_value.setdefault(table.get(key, "unset"), []).append(name)
        if len(by_value) > 1:
            rarest_first = sorted(by_value.items(), key=lambda item: len(item[1]))
            found.append(f"{key}: " + "; ".join(f"{value} in {named(names)}" for value, names in rarest_first))
    return found


def named(names: Sequence[str], most: int = 3) -> str:
    """Some names, the others counted."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shared_settings(run: Run) -> dict[str, str]:
    """What all runs of a start have to share: all settings but the method's, and the number of steps."""
    flat = flatten(parse_toml(run.config, str(run.folder)))
    free = (*SEED_KEYS, *WATCHING_KEYS)
    shared = {
        key: str(value) for key, value in flat.items() if not key.startswith(("rest.", "run.")) and key not in free
    }
    return {**shared, "steps": str(run.summary.get("steps"))}


def trained_on(run: Run) -> dict[str, str]:
    """What all runs of a start and a seed have to share."""
    return {"samples trained on": str((run.summary.get("data") or {}).get("digest"))}


def method_settings(run: Run) -> dict[str, str]:
    """The settings of a run's method; the shuffle of `permuted` changes with the seed."""
    flat = flatten(parse_toml(run.config, str(run.folder)))
    return {key: str(value) for key, value in flat.items() if key.startswith("rest.") and key != "rest.weights.seed"}
