"""`rest-rl eval diff`: two evaluations of one benchmark, sample by sample.

Only samples that both sides scored count, so every difference is paired: what one model loses and the other gains.
The test of all samples stands alone; those of the groups are a family of tests and carry q-values too. An official
average whose categories were scored whole on both sides has its change and an interval, but no test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from rest_rl.errors import UserError
from rest_rl.evaluate.harness import group_label
from rest_rl.evaluate.log import SAMPLES, SUMMARY, EvalLog, Row
from rest_rl.evaluate.tables import comparison_markdown
from rest_rl.jsonl import as_json, describe_os_error
from rest_rl.response import TURNS
from rest_rl.runlog import read_json_object, replace_file
from rest_rl.statistics import Interval, mcnemar_p_value, paired_difference, q_values, weighted_mean

FLIPS = "flips.jsonl"
ALL_SAMPLES = "all"
MODEL_SETTINGS = {"model", "endpoint", "responses", "weights"}
"""Settings that say who answered, not how; they are expected to differ."""


class Evaluation(NamedTuple):
    """An evaluation folder as read back; `rows` by id."""

    folder: str
    summary: Row
    rows: dict[str, Row]

    def verdicts(self, metric: str) -> dict[str, bool]:
        return {identity: row[metric] for identity, row in self.rows.items() if isinstance(row.get(metric), bool)}

    def group_of(self, identity: str) -> str:
        """The group of a sample as the summary calls it; summaries that do not say where rows have it are older."""
        row = self.rows[identity]
        field = self.summary.get("group_field") or ("level" if "level" in row else "category")
        return group_label(field, row[field])

    def describe(self) -> Row:
        return {key: self.summary.get(key) for key in ("model", "prompt", "format")} | {"folder": self.folder}


@dataclass(frozen=True)
class Change:
    """The paired change of one group: accuracies and their difference as shares, with a 95 % interval.

    `lost` samples were right at the base alone, `gained` ones at the tuned model alone. `p` is of McNemar's exact test,
    None for an official average; `q` is it among the groups of the table, None for what spans several.
    """

    group: str
    n: int
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    lost: int
    gained: int
    p: float | None
    q: float | None = None


@dataclass(frozen=True)
class Flip:
    """A sample on which the two sides differ, with what each was told."""

    metric: str
    id: str
    group: str
    direction: Literal["lost", "gained"]
    base_reason: str
    tuned_reason: str


@dataclass(frozen=True)
class EvalComparison:
    """What changed from a base to a tuned model; `metrics` holds a table per metric.

    A table's rows are groups, then the official averages that both sides have, then all samples.
    """

    benchmark: str
    version: str | None
    pin: str
    base: Row
    tuned: Row
    metrics: dict[str, tuple[Change, ...]]
    flips: tuple[Flip, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> Row:
        return asdict(self)


def compare_evaluations(base: str | Path, tuned: str | Path) -> EvalComparison:
    """Compare two evaluation folders; UserError when they hold no evaluations or have nothing to compare."""
    first, second = read_evaluation(base), read_evaluation(tuned)
    for key in ("benchmark", "version", "pin"):
        one, other = first.summary.get(key), second.summary.get(key)
        if one != other:
            raise UserError(
                f"{key} {one!r} in {first.folder} and {other!r} in {second.folder}",
                "the same: their samples or their judges differ",
                "compare evaluations of one benchmark and release",
            )
    metrics = [name for name in first.summary.get("metrics", []) if name in second.summary.get("metrics", [])]
    shared = {}
    for metric in metrics:
        others = second.verdicts(metric)
        shared[metric] = [identity for identity in first.verdicts(metric) if identity in others]
    if not any(shared.values()):
        raise UserError(
            f"{base} and {tuned}, which share no scored sample",
            "evaluations of the same samples",
            "run both with the same --limit, --ids and --categories, and go on with --resume where one was stopped",
        )
    return EvalComparison(
        benchmark=str(first.summary["benchmark"]),
        version=first.summary.get("version"),
        pin=str(first.summary.get("pin")),
        base=first.describe(),
        tuned=second.describe(),
        metrics={metric: compute_changes(first, second, metric, ids) for metric, ids in shared.items()},
        flips=tuple(flip for metric, ids in shared.items() for flip in find_flips(first, second, metric, ids)),
        warnings=tuple(find_warnings(first, second, metrics)),
    )


def write_comparison(comparison: EvalComparison, folder: str | Path) -> list[Path]:
    """Write comparison.md, comparison.json and flips.jsonl, which has a line per flipped sample."""
    target, content = Path(folder), comparison.to_json()
    texts = {
        FLIPS: "".join(as_json(flip) + "\n" for flip in content["flips"]),
        "comparison.json": as_json(content, indent=2) + "\n",
        "comparison.md": comparison_markdown(content),
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            replace_file(target / name, text)
    except OSError as error:
        raise UserError(f"{folder} ({describe_os_error(error)})", "a writable folder", "pass another") from error
    return [target / name for name in texts]


def read_evaluation(folder: str | Path) -> Evaluation:
    """Read an evaluation folder; UserError if it holds none. Of several rows of a sample the last one stands."""
    path = Path(folder)
    summary, rows = read_json_object(path / SUMMARY), EvalLog(path).read_rows()
    if "benchmark" not in summary or not rows:
        missing = SAMPLES if "benchmark" in summary else f"{SUMMARY} of an evaluation"
        expected, remedy = (
            "the folder of a finished `rest-rl eval`",
            "pass what its --out was, or finish it with --resume",
        )
        raise UserError(f"{folder}, which holds no {missing}", expected, remedy)
    return Evaluation(str(folder), summary, {row["id"]: row for row in rows})


def compute_changes(first: Evaluation, second: Evaluation, metric: str, ids: Sequence[str]) -> tuple[Change, ...]:
    """A change per group in the order of the summary, then of official averages, then one of all samples."""
    members: dict[str, list[tuple[bool, bool]]] = {str(name): [] for name in first.summary.get("groups", {})}
    for identity in ids:
        pair = first.rows[identity][metric], second.rows[identity][metric]
        members.setdefault(first.group_of(identity), []).append(pair)
    groups = [compute_change(name, pairs) for name, pairs in members.items() if pairs]
    q = q_values([group.p for group in groups if group.p is not None])
    groups = [replace(group, q=value) for group, value in zip(groups, q, strict=True)]
    averages = compute_average_changes(first, second, groups) if metric == first.summary["metrics"][0] else []
    averages += compute_turn_changes(first, second, metric, ids)
    return (*groups, *averages, compute_change(ALL_SAMPLES, [pair for pairs in members.values() for pair in pairs]))


def compute_average_changes(first: Evaluation, second: Evaluation, groups: Sequence[Change]) -> list[Change]:
    """The changes of the official averages that both summaries have, by the weights that these record.

    The paired intervals of the categories are put together as those of single averages are (see `weighted_mean`).
    There is no test: lost and gained samples of different weights make no exact one.
    """
    own = {group.group: group for group in groups}
    sides = [evaluation.summary.get("official") or {} for evaluation in (first, second)]
    found: list[Change] = []
    for name in sides[0]:
        weights, others = ((side.get(name) or {}).get("weights") for side in sides)
        if not weights or weights != others or not own.keys() >= weights.keys():
            continue
        parts = [(weight, own[category]) for category, weight in weights.items()]
        total = sum(weights.values())
        base, tuned = (sum(weight * getattr(part, key) for weight, part in parts) / total for key in ("base", "tuned"))
        n, lost, gained = (sum(getattr(part, key) for _, part in parts) for key in ("n", "lost", "gained"))
        interval = weighted_mean((weight, Interval(part.difference, part.low, part.high)) for weight, part in parts)
        found.append(Change(name, n, base, tuned, *interval, lost, gained, None))
    return found


def compute_turn_changes(first: Evaluation, second: Evaluation, metric: str, ids: Sequence[str]) -> list[Change]:
    """The changes over turns that call and turns that answer, where rows say which is which."""
    rows = [(first.rows[identity], second.rows[identity]) for identity in ids]
    own = {turn: [(a[metric], b[metric]) for a, b in rows if a.get("turn") == turn] for turn in TURNS}
    return [compute_change(turn, pairs) for turn, pairs in own.items() if pairs]


def compute_change(group: str, pairs: Sequence[tuple[bool, bool]]) -> Change:
    """The change over (base, tuned) verdicts; without any it is 0 in [-1, 1]."""
    n, lost = len(pairs), sum(old and not new for old, new in pairs)
    gained = sum(new and not old for old, new in pairs)
    base, tuned = (sum(pair[side] for pair in pairs) / n if n else 0.0 for side in (0, 1))
    return Change(
        group, n, base, tuned, *paired_difference(lost, gained, n), lost, gained, mcnemar_p_value(lost, gained)
    )


def find_flips(first: Evaluation, second: Evaluation, metric: str, ids: Sequence[str]) -> Iterator[Flip]:
    """The samples on which the verdicts differ."""
    for identity in ids:
        old, new = first.rows[identity], second.rows[identity]
        if old[metric] != new[metric]:
            reasons = (str(row.get("overflow") or row.get("refused") or row.get("reason") or "") for row in (old, new))
            yield Flip(metric, identity, first.group_of(identity), "lost" if old[metric] else "gained", *reasons)


def find_warnings(first: Evaluation, second: Evaluation, metrics: Sequence[str]) -> Iterator[str]:
    """What may explain a difference other than the model: prompt, format, samples of one side, settings."""
    for key in ("prompt", "format"):
        if first.summary.get(key) != second.summary.get(key):
            yield f"{key} differs: {first.summary.get(key)!r} and {second.summary.get(key)!r}"
    if len(first.rows) != len(second.rows):
        yield f"number of samples differs: {len(first.rows)} and {len(second.rows)}"
    one, other = first.verdicts(metrics[0]), second.verdicts(metrics[0])
    if one.keys() != other.keys():
        only = len(one.keys() - other), len(other.keys() - one)
        yield f"scored on one side only and left out: {only[0]} of the base, {only[1]} of the tuned model"
    settings, others = (evaluation.summary.get("settings") or {} for evaluation in (first, second))
    for key in sorted({*settings, *others} - MODEL_SETTINGS - {"prompt", "format"}):
        if settings.get(key) != others.get(key):
            yield f"{key} differs: {settings.get(key)!r:.160} and {others.get(key)!r:.160}"
    if settings.get("weights") and settings.get("weights") == others.get("weights"):
        yield "both sides have the same weights: what differs is how they were asked, or chance"
