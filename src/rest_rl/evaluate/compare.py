"""`rest-rl eval diff`: compare two evaluations of the same benchmark, sample by sample.

Only samples that both evaluations scored are used, so all differences are paired. Each group is tested for a
difference, and so are all samples together. Attempts at one task count as dependent samples. Only the groups' p-values
are adjusted for multiple testing (q-values). Official averages whose categories both evaluations fully scored get a
difference with an interval, but no test.
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
from rest_rl.statistics import (
    Interval,
    clustered_difference,
    mcnemar_p_value,
    paired_difference,
    q_values,
    weighted_mean,
)

FLIPS = "flips.jsonl"
ALL_SAMPLES = "all"
MODEL_SETTINGS = {"model", "endpoint", "responses", "weights"}
"""Settings that identify the model; they are expected to differ."""


class Evaluation(NamedTuple):
    """The contents of an evaluation folder; `rows` maps the id of each sample to its row."""

    folder: str
    summary: Row
    rows: dict[str, Row]

    def verdicts(self, metric: str) -> dict[str, bool]:
        return {identity: row[metric] for identity, row in self.rows.items() if isinstance(row.get(metric), bool)}

    def group_of(self, identity: str) -> str:
        # summaries of older versions have no group_field
        row = self.rows[identity]
        field = self.summary.get("group_field") or ("level" if "level" in row else "category")
        return group_label(field, row[field])

    def cluster_of(self, identity: str) -> str:
        # summaries of older versions have no cluster_field
        return str(self.rows[identity].get(self.summary.get("cluster_field", "id"), identity))

    def describe(self) -> Row:
        return {key: self.summary.get(key) for key in ("model", "prompt", "format")} | {"folder": self.folder}


@dataclass(frozen=True)
class Change:
    """The change of a group's accuracy from the base to the tuned model, as fractions, with a 95 % interval.

    `lost` counts samples that only the base model got right, `gained` samples that only the tuned model got right. `p`
    is McNemar's exact p-value (None for averages); for groups, `q` is `p` after the Benjamini-Hochberg adjustment.
    `clusters` counts tasks (None for averages). If it is less than `n`, because tasks were attempted several times,
    interval and `p` are those of `clustered_difference`.
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
    clusters: int | None = None


@dataclass(frozen=True)
class Flip:
    """A sample that only one of the two models got right, with the reason of each verdict."""

    metric: str
    id: str
    group: str
    direction: Literal["lost", "gained"]
    base_reason: str
    tuned_reason: str


@dataclass(frozen=True)
class EvalComparison:
    """The comparison of a base and a tuned model; `metrics` maps each metric to a table of changes.

    A table has one row per group, per official average in both evaluations, per kind of turn, and for all samples.
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
    """Compare two evaluation folders. Raises UserError if benchmark or pin differ, or no sample was scored in both."""
    first, second = read_evaluation(base), read_evaluation(tuned)
    for key in ("benchmark", "version", "pin"):
        one, other = first.summary.get(key), second.summary.get(key)
        if one != other:
            raise UserError(
                f"different {key}: {one!r} in {first.folder} and {other!r} in {second.folder}",
                "the same samples and the same judge",
                "compare evaluations of one benchmark and release",
            )
    metrics = [name for name in first.summary.get("metrics", []) if name in second.summary.get("metrics", [])]
    shared = {}
    for metric in metrics:
        others = second.verdicts(metric)
        shared[metric] = [identity for identity in first.verdicts(metric) if identity in others]
    if not any(shared.values()):
        raise UserError(
            f"{base} and {tuned} share no scored sample",
            remedy="run both with the same --limit, --ids and --categories, and resume one that was stopped",
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
    """Write comparison.md, comparison.json and flips.jsonl (one line per `Flip`) into `folder`; return their paths."""
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
        raise UserError(
            f"cannot write to {folder} ({describe_os_error(error)})", remedy="pass another folder"
        ) from error
    return [target / name for name in texts]


def read_evaluation(folder: str | Path) -> Evaluation:
    """Read the folder of a finished evaluation. If a sample has several rows, the last row counts."""
    path = Path(folder)
    summary, rows = read_json_object(path / SUMMARY), EvalLog(path).read_rows()
    if "benchmark" not in summary or not rows:
        missing = SAMPLES if "benchmark" in summary else f"{SUMMARY} of an evaluation"
        problem = f"{folder} contains no {missing}" if path.exists() else f"{folder} does not exist"
        expected, remedy = "the folder of a finished `rest-rl eval`", "pass its --out, or finish it with --resume"
        raise UserError(problem, expected, remedy)
    return Evaluation(str(folder), summary, {row["id"]: row for row in rows})


def compute_changes(first: Evaluation, second: Evaluation, metric: str, ids: Sequence[str]) -> tuple[Change, ...]:
    members: dict[str, list[str]] = {str(name): [] for name in first.summary.get("groups", {})}
    for identity in ids:
        members.setdefault(first.group_of(identity), []).append(identity)

    def change(name: str, own: Sequence[str]) -> Change:
        pairs = [(first.rows[identity][metric], second.rows[identity][metric]) for identity in own]
        return compute_change(name, pairs, list(map(first.cluster_of, own)))

    groups = [change(name, own) for name, own in members.items() if own]
    # only the groups form a family of tests; averages and the test over all samples are not adjusted
    q = q_values([group.p for group in groups if group.p is not None])
    groups = [replace(group, q=value) for group, value in zip(groups, q, strict=True)]
    averages = compute_average_changes(first, second, groups) if metric == first.summary["metrics"][0] else []
    turns = {turn: [identity for identity in ids if first.rows[identity].get("turn") == turn] for turn in TURNS}
    averages += [change(turn, own) for turn, own in turns.items() if own]
    return (*groups, *averages, change(ALL_SAMPLES, ids))


# The paired intervals of the official averages: an average is sum w_c acc_c over disjoint categories, so its change is
# the same weighted sum of the categories' paired differences. MOVER (`weighted_mean`) combines their Bonett-Price
# intervals by adding the squared, weighted distances to the limits on each side, which keeps their asymmetry. If a
# category is missing on one side or the weights differ, the two averages are not comparable and are left out.
# There is no p-value: McNemar's test counts flips, and flips of different weights have no exact distribution.
def compute_average_changes(first: Evaluation, second: Evaluation, groups: Sequence[Change]) -> list[Change]:
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


# McNemar's exact test: samples with equal verdicts carry no information about the difference. Under the null hypothesis
# a flipped sample is lost or gained with probability 1/2, so `lost` is binomial(lost + gained, 1/2); two-sided p.
def compute_change(group: str, pairs: Sequence[tuple[bool, bool]], clusters: Sequence[str] | None = None) -> Change:
    """Return the change of a group, given (base, tuned) verdicts; without any, it is 0 with the interval [-1, 1].

    Verdicts with the same value in `clusters` are dependent; None means that all are independent.
    """
    n, lost = len(pairs), sum(old and not new for old, new in pairs)
    gained = sum(new and not old for old, new in pairs)
    base, tuned = (sum(pair[side] for pair in pairs) / n if n else 0.0 for side in (0, 1))
    sums: dict[str, list[int]] = {}
    for (old, new), cluster in zip(pairs, clusters or map(str, range(n)), strict=True):
        own = sums.setdefault(cluster, [0, 0])
        own[0] += new - old
        own[1] += 1
    if len(sums) == n:
        interval, p = paired_difference(lost, gained, n), mcnemar_p_value(lost, gained)
    else:
        interval, p = clustered_difference([(change, size) for change, size in sums.values()])
    return Change(group, n, base, tuned, *interval, lost, gained, p, clusters=len(sums))


def find_flips(first: Evaluation, second: Evaluation, metric: str, ids: Sequence[str]) -> Iterator[Flip]:
    for identity in ids:
        old, new = first.rows[identity], second.rows[identity]
        if old[metric] != new[metric]:
            reasons = (str(row.get("overflow") or row.get("refused") or row.get("reason") or "") for row in (old, new))
            yield Flip(metric, identity, first.group_of(identity), "lost" if old[metric] else "gained", *reasons)


def find_warnings(first: Evaluation, second: Evaluation, metrics: Sequence[str]) -> Iterator[str]:
    # anything other than the model that may explain a difference
    for key in ("prompt", "format"):
        if first.summary.get(key) != second.summary.get(key):
            yield f"{key} differs: {first.summary.get(key)!r} and {second.summary.get(key)!r}"
    if len(first.rows) != len(second.rows):
        yield f"number of samples differs: {len(first.rows)} and {len(second.rows)}"
    one, other = first.verdicts(metrics[0]), second.verdicts(metrics[0])
    if one.keys() != other.keys():
        only = len(one.keys() - other), len(other.keys() - one)
        yield f"left out, scored on one side only: {only[0]} of the base model, {only[1]} of the tuned model"
    settings, others = (evaluation.summary.get("settings") or {} for evaluation in (first, second))
    for key in sorted({*settings, *others} - MODEL_SETTINGS - {"prompt", "format"}):
        if settings.get(key) != others.get(key):
            yield f"{key} differs: {settings.get(key)!r:.160} and {others.get(key)!r:.160}"
    if settings.get("weights") and settings.get("weights") == others.get("weights"):
        yield "both evaluations use the same weights: any difference is due to settings or chance"
