"""`rest-rl eval compare`: two evaluations of one benchmark, sample by sample.

Only samples that both sides scored count, so every difference is paired: what one model loses and the other gains.
The test of all samples stands alone; those of the groups are a family of tests and carry q-values too. An official
average whose categories were scored whole on both sides has its change and an interval, but no test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rest_rl.errors import UserError
from rest_rl.evaluate.harness import group_label
from rest_rl.evaluate.log import SAMPLES, SUMMARY, Row
from rest_rl.evaluate.tables import comparison_markdown
from rest_rl.jsonl import as_json, reason
from rest_rl.runlog import read_object, read_rows, replace_file
from rest_rl.statistics import Interval, mcnemar, paired_difference, q_values, weighted_mean

FLIPS = "flips.jsonl"
ALL = "all"
NAMES_THE_MODEL = {"model", "endpoint", "responses", "weights"}
"""Settings that say who answered, not how; they are expected to differ."""
MAX_SHOWN = 160


class Evaluation(NamedTuple):
    """An evaluation folder as read back; `rows` by id."""

    folder: str
    summary: Row
    rows: dict[str, Row]


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
class Comparison:
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
        """The whole comparison as plain values."""
        return asdict(self)


def compare(base: str | Path, tuned: str | Path) -> Comparison:
    """Compare two evaluation folders; ValueError when they hold no evaluations or have nothing to compare."""
    first, second = read_evaluation(base), read_evaluation(tuned)
    check_comparable(first, second)
    metrics = [name for name in first.summary.get("metrics", []) if name in second.summary.get("metrics", [])]
    shared = {}
    for metric in metrics:
        others = set(scored(second, metric))
        shared[metric] = [identity for identity in scored(first, metric) if identity in others]
    if not any(shared.values()):
        raise UserError(
            f"{base} and {tuned}, which share no scored sample",
            "evaluations of the same samples",
            "run both with the same --limit, --ids and --categories, and go on with --resume where one was stopped",
        )
    return Comparison(
        benchmark=str(first.summary["benchmark"]),
        version=first.summary.get("version"),
        pin=str(first.summary.get("pin")),
        base=who(first),
        tuned=who(second),
        metrics={metric: changes(first, second, metric, ids) for metric, ids in shared.items()},
        flips=tuple(flip for metric, ids in shared.items() for flip in flips(first, second, metric, ids)),
        warnings=tuple(warnings(first, second, metrics)),
    )


def write_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
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
        raise UserError(f"{folder} ({reason(error)})", "a writable folder", "pass another") from error
    return [target / name for name in texts]


def read_evaluation(folder: str | Path) -> Evaluation:
    """Read an evaluation folder; ValueError if it holds none. Of several rows of a sample the last one stands."""
    path = Path(folder)
    summary, rows = read_object(path / SUMMARY), read_rows(path / SAMPLES)
    if "benchmark" not in summary or not rows:
        missing = SAMPLES if "benchmark" in summary else f"{SUMMARY} of an evaluation"
        raise UserError(
            f"{folder}, which holds no {missing}",
            "the folder of a finished `rest-rl eval`",
            "pass what its --out was, or finish it with --resume",
        )
    return Evaluation(str(folder), summary, {str(row["id"]): row for row in rows if "id" in row})


def check_comparable(first: Evaluation, second: Evaluation) -> None:
    """ValueError unless both are of one edition of one benchmark."""
    for key in ("benchmark", "version", "pin"):
        one, other = first.summary.get(key), second.summary.get(key)
        if one != other:
            raise UserError(
                f"{key} {one!r} in {first.folder} and {other!r} in {second.folder}",
                "the same: their samples or their judges differ",
                "compare evaluations of one benchmark and release",
            )


def scored(evaluation: Evaluation, metric: str) -> list[str]:
    """The samples with a verdict."""
    return [identity for identity, row in evaluation.rows.items() if isinstance(row.get(metric), bool)]


def changes(first: Evaluation, second: Evaluation, metric: str, ids: Sequence[str]) -> tuple[Change, ...]:
    """A change per group in the order of the summary, then of official averages, then one of all samples."""
    members: dict[str, list[str]] = {str(name): [] for name in first.summary.get("groups", {})}
    for identity in ids:
        members.setdefault(group_of(first, identity), []).append(identity)
    pairs = {
        name: [(first.rows[i][metric], second.rows[i][metric]) for i in own] for name, own in members.items() if own
    }
    tests = [mcnemar(*flipped(own)) for own in pairs.values()]
    groups = [change(name, own, q) for (name, own), q in zip(pairs.items(), q_values(tests), strict=True)]
    averages = average_changes(first, second, groups) if metric == first.summary["metrics"][0] else []
    return (*groups, *averages, change(ALL, [pair for own in pairs.values() for pair in own], None))


def average_changes(first: Evaluation, second: Evaluation, groups: Sequence[Change]) -> list[Change]:
    """The changes of the official averages that both summaries have, by the weights that these record.

    The paired intervals of the categories are put together as those of single averages are (see `weighted_mean`). The
    interval is all that is said: lost and gained samples of different weights make no exact test.
    """
    own = {group.group: group for group in groups}
    sides = [evaluation.summary.get("official") or {} for evaluation in (first, second)]
    found: list[Change] = []
    for name in sides[0]:
        weights, others = ((side.get(name) or {}).get("weights") for side in sides)
        if weights and weights == others and own.keys() >= weights.keys():
            found.append(average_change(name, [(weight, own[category]) for category, weight in weights.items()]))
    return found


def average_change(name: str, parts: Sequence[tuple[float, Change]]) -> Change:
    """The change of the average of weighted groups."""
    total = sum(weight for weight, _ in parts)
    base, tuned = (sum(weight * getattr(part, side) for weight, part in parts) / total for side in ("base", "tuned"))
    value, low, high = weighted_mean((weight, Interval(part.difference, part.low, part.high)) for weight, part in parts)
    n, lost, gained = (sum(getattr(part, count) for _, part in parts) for count in ("n", "lost", "gained"))
    return Change(name, n, base, tuned, value, low, high, lost, gained, None)


def change(group: str, pairs: Sequence[tuple[bool, bool]], q: float | None) -> Change:
    """The change over (base, tuned) verdicts; without any it is 0 in [-1, 1]."""
    n = len(pairs)
    lost, gained = flipped(pairs)
    value, low, high = paired_difference(lost, gained, n)
    base, tuned = (sum(pair[side] for pair in pairs) / n if n else 0.0 for side in (0, 1))
    return Change(group, n, base, tuned, value, low, high, lost, gained, mcnemar(lost, gained), q)


def flipped(pairs: Sequence[tuple[bool, bool]]) -> tuple[int, int]:
    """How many samples were lost and how many gained."""
    return sum(old and not new for old, new in pairs), sum(new and not old for old, new in pairs)


def flips(first: Evaluation, second: Evaluation, metric: str, ids: Sequence[str]) -> list[Flip]:
    """The samples on which the verdicts differ."""
    found: list[Flip] = []
    for identity in ids:
        old, new = first.rows[identity], second.rows[identity]
        if old[metric] != new[metric]:
            direction: Literal["lost", "gained"] = "lost" if old[metric] else "gained"
            found.append(Flip(metric, identity, group_of(first, identity), direction, reason_of(old), reason_of(new)))
    return found


def group_of(evaluation: Evaluation, identity: str) -> str:
    """The group of a sample as the summary calls it; summaries that do not say where rows have it are older."""
    row = evaluation.rows[identity]
    field = evaluation.summary.get("group_field") or ("level" if "level" in row else "category")
    return group_label(field, row[field])


def reason_of(row: Mapping[str, Any]) -> str:
    """What the row says of its verdict."""
    return str(row.get("overflow") or row.get("refused") or row.get("reason") or "")


def who(evaluation: Evaluation) -> Row:
    """Model, prompt, format and folder of one side."""
    return {key: evaluation.summary.get(key) for key in ("model", "prompt", "format")} | {"folder": evaluation.folder}


def warnings(first: Evaluation, second: Evaluation, metrics: Sequence[str]) -> list[str]:
    """What may explain a difference other than the model: prompt, format, samples of one side, settings."""
    found = [
        f"{key} differs: {one!r} and {other!r}"
        for key in ("prompt", "format")
        if (one := first.summary.get(key)) != (other := second.summary.get(key))
    ]
    counts = [len(evaluation.rows) for evaluation in (first, second)]
    if counts[0] != counts[1]:
        found.append(f"number of samples differs: {counts[0]} and {counts[1]}")
    for metric in metrics[:1]:
        sets = [set(scored(evaluation, metric)) for evaluation in (first, second)]
        alone = [len(sets[0] - sets[1]), len(sets[1] - sets[0])]
        if any(alone):
            found.append(f"scored on one side only and left out: {alone[0]} of the base, {alone[1]} of the tuned model")
    return found + setting_warnings(first.summary.get("settings") or {}, second.summary.get("settings") or {})


def setting_warnings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Settings that differ, but for those told already and those that say who answered, which are told when equal."""
    keys = sorted({*first, *second} - NAMES_THE_MODEL - {"prompt", "format"})
    found = [
        f"{key} differs: {shown(first.get(key))} and {shown(second.get(key))}"
        for key in keys
        if first.get(key) != second.get(key)
    ]
    if first.get("weights") and first.get("weights") == second.get("weights"):
        found.append("both sides have the same weights: what differs is how they were asked, or chance")
    return found


def shown(value: Any) -> str:
    """A setting as text, cut where it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
