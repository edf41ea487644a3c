"""Groups of runs that differ only in their seeds, curves with spread over runs, and result tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from rest_rl.config import parse_recorded_run
from rest_rl.errors import UserError
from rest_rl.report.diagnosis import Finding, diagnose
from rest_rl.report.diagnosis.history import step_of
from rest_rl.response import TURNS, Turn
from rest_rl.runlog import Row, Run

SCORES = ("exact_match", "s_acc", "s_format")
SEED_KEYS = ("run.seed", "run.out", "trl.seed", "trl.data_seed", "data.seed", "eval.seed")
"""Keys in which the runs of one group may differ."""
MONITORING_KEYS = ("eval.every", "eval.interim_prompts", "eval.low_temperature")
"""Keys that only observe a run. They change no result, so runs that differ only in them count as the same."""


class Curve(NamedTuple):
    """The mean over runs at each step, and one standard deviation below and above it; a single run has no spread."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class RunGroup:
    """Runs of one configuration with different seeds."""

    label: str
    runs: tuple[Run, ...]


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Group runs by their configuration without its seeds, and label each group.

    Raises:
        UserError: two runs have the same configuration and seed. Counted as two seeds they would understate the spread.
    """
    # The flattened configuration as sorted text is the identity: without seed and folder that of a group, with the seed
    # that of a run. Groups keep the order of their first runs, so the result depends only on the order of `runs`.
    settings: dict[str, dict[str, str]] = {}
    members: dict[str, list[Run]] = {}
    by_identity: dict[str, Run] = {}
    for run in runs:
        table = flatten(parse_recorded_run(run.config, str(run.folder)))
        flat = {key: str(value) for key, value in table.items() if key not in MONITORING_KEYS}
        duplicate = by_identity.setdefault(
            str(sorted((key, value) for key, value in flat.items() if key != "run.out")), run
        )
        if duplicate is not run:
            raise UserError(
                f"{duplicate.folder} and {run.folder} have the same configuration and the same seed",
                "runs that differ in their settings or seeds",
                "leave one of them out",
            )
        kept = {key: value for key, value in flat.items() if key not in SEED_KEYS}
        identity = str(sorted(kept.items()))
        settings[identity] = kept
        members.setdefault(identity, []).append(run)
    labels = group_labels(list(settings.values()))
    return [RunGroup(label, tuple(members[identity])) for label, identity in zip(labels, settings, strict=True)]


def group_labels(settings: Sequence[Mapping[str, str]]) -> list[str]:
    # A label is the preset and up to three keys in which its groups differ, and a number if labels are still equal.
    labels: list[str] = []
    for own in settings:
        preset = own.get("rest.preset", "run")
        rivals = [other for other in settings if other.get("rest.preset", "run") == preset]
        keys = sorted({key for other in rivals for key in {*own, *other} if own.get(key) != other.get(key)})
        labels.append(" ".join([preset, *(f"{key.rsplit('.', 1)[-1]}={own.get(key, 'unset')}" for key in keys[:3])]))
    return [f"{label} #{labels[:i].count(label) + 1}" if labels.count(label) > 1 else label
            for i, label in enumerate(labels)]  # fmt: skip


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one flat table, with keys such as `trl.learning_rate`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def last_finished_step(run: Run) -> int:
    """Return the last step that a run has finished; without metrics it is read from the timing and the summary."""
    rows = (*run.metrics, *run.timing, {"step": run.summary.get("steps")})
    return max(step_of(row) for row in rows)


def values_by_step(rows: Iterable[Row], key: str) -> dict[int, float]:
    """Return the finite numbers in one column of metrics.jsonl or evaluations.jsonl, by step."""
    return {step_of(row): float(row[key]) for row in rows if is_number(row.get("step")) and is_number(row.get(key))}


def diagnose_run(run: Run) -> list[Finding]:
    """Return the findings of a recorded run, in the order in which they first appeared."""
    return diagnose(run.metrics, run.evaluations, parse_recorded_run(run.config, str(run.folder)))


def metric_curve(runs: Iterable[Run], key: str) -> Curve:
    """Return the mean and spread of a metric over runs; steps at which no run has a value are left out."""
    return average_curves([values_by_step(run.metrics, key) for run in runs])


def average_curves(curves: Iterable[Mapping[int, float]]) -> Curve:
    """Return the mean and standard deviation of several curves at every step that at least one of them has."""
    # Runs may log or end at different steps: the spread at a step is over the runs that have a value there.
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve.items():
            by_step.setdefault(step, []).append(value)
    return build_curve({step: mean_and_sd(values) for step, values in by_step.items()})


def build_curve(moments: Mapping[int, tuple[float, float]]) -> Curve:
    steps = sorted(moments)
    spread = [moments[step] for step in steps]
    return Curve(
        steps, [mean for mean, _ in spread], [mean - sd for mean, sd in spread], [mean + sd for mean, sd in spread]
    )


def headline_turn(evaluations: Iterable[Mapping[str, Any] | None]) -> Turn | None:
    """Return "calls" if the headline score covers call turns only, None if it covers all turns.

    It covers call turns if every evaluation has scores on call turns and at least one has scores on answer turns too.
    If one evaluation does not separate them, all scores cover all turns, so that only equal turns are compared.
    """
    measured = [scores for scores in evaluations if scores and is_number(scores.get("exact_match"))]
    counts = [[(scores.get(turn) or {}).get("n", 0) for turn in TURNS] for scores in measured]
    return "calls" if counts and all(own[0] for own in counts) and any(own[1] for own in counts) else None


def scores_for_turn(scores: Mapping[str, Any] | None, turn: Turn | None) -> Mapping[str, Any]:
    """Return the scores over one kind of turn, or over all if `turn` is None.

    As in an evaluation, the greedy scores and those at a low temperature are under `greedy` and `low_temperature`.
    """
    scores = scores or {}
    if turn is None:
        return scores
    greedy, low = (scores.get(key) or {} for key in ("greedy", "low_temperature"))
    found = {**(scores.get(turn) or {}), "greedy": greedy.get(turn) or {}}
    if low:
        found["low_temperature"] = {**(low.get(turn) or {}), "temperature": low.get("temperature")}
    if "policy_entropy" in scores:  # measured over the tokens of all turns
        found["policy_entropy"] = scores["policy_entropy"]
    return found


def greedy_if_recorded(*evaluations: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the greedy scores of evaluations if all have them, else those of responses at temperature 1.

    A run on verl, for example, evaluates only at temperature 1; greedy and sampled scores are never compared.
    """
    greedy: list[Mapping[str, Any]] = [(scores or {}).get("greedy") or {} for scores in evaluations]
    is_recorded = all(is_number(scores.get("exact_match")) for scores in greedy)
    return greedy if is_recorded else [scores or {} for scores in evaluations]


def headline_turn_of_runs(runs: Iterable[Run]) -> Turn | None:
    """Return the `headline_turn` of all evaluations of these runs before and after training."""
    return headline_turn(run.summary.get(when) for run in runs for when in ("before", "after"))


def headline_key(runs: Sequence[Run], key: str) -> str:
    """Return `key`, or the key of the metric over call turns if every run logs it and any logs answer turns too."""
    known = [names for run in runs if key in (names := {name for row in run.metrics for name in row})]
    split = [{f"{key}_{turn}" for turn in TURNS} & names for names in known]
    is_split = known and all(f"{key}_calls" in own for own in split) and any(len(own) == 2 for own in split)
    return f"{key}_calls" if is_split else key


def evaluation_curve(runs: Sequence[Run], turn: Turn | None = None, *, greedy: bool) -> Curve:
    """Return held-out exact match during training, with its spread.

    The spread is the standard deviation over runs; for a single run it is the standard error over prompts.
    """
    by_step: dict[int, list[tuple[float, float]]] = {}
    measured = [run for run in runs if run.evaluations]
    for run in measured:
        for row in run.evaluations:
            scores = scores_for_turn(row, turn)
            scores = (scores.get("greedy") or {}) if greedy else scores
            if is_number(value := scores.get("exact_match")) and is_number(row.get("step")):
                by_step.setdefault(step_of(row), []).append((value, scores.get("exact_match_error") or 0.0))
    if len(measured) == 1:
        return build_curve({step: pairs[0] for step, pairs in by_step.items()})
    return build_curve({step: mean_and_sd([value for value, _ in pairs]) for step, pairs in by_step.items()})


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the centered running mean; windows are shorter at both ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, which is 0 for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


SAMPLED = "sampled, T = 1"
BEFORE_AFTER_HEADER = ("percent", "n", "exact match", "gain", "S_acc", "S_format")


def before_after_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table of scores before and after training, in percent.

    Greedy scores come first, then those at temperature 1 with the policy entropy in nats, then those at a low
    temperature; kinds of responses that neither evaluation has are left out. In each, call turns come first, then
    answer turns (and the share of them that are calls which the format does not read, if there are any) and all turns,
    if the evaluations separate them. The first also have a row for each kind of task and each split if there are
    several.
    """
    pair = [summary.get(when) or {} for when in ("before", "after")]
    turn = headline_turn(pair)

    def rows_of(name: str, pair: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
        if turn is None:
            return [before_after_row(name, *pair)]
        names = {"calls": f"{name.removeprefix('sampled, ')}, calls", "answers": "  answers"}
        apart = [before_after_row(names[each], *(scores.get(each) for scores in pair)) for each in TURNS]
        return [*apart, *unread_call_rows(pair), before_after_row("  all turns", *pair)]

    rows: list[tuple[str, ...]] = []
    for name, scores in decodings(pair).items():
        is_first = not rows
        rows += rows_of(name, scores)
        rows += breakdown_rows(scores) if is_first else []
        rows += entropy_rows(pair) if name == SAMPLED else []
    return rows


def decodings(pair: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    # The scores of two evaluations by the way in which the responses were generated, without ways that neither has.
    greedy, low = ([scores.get(key) or {} for scores in pair] for key in ("greedy", "low_temperature"))
    temperature = next((scores["temperature"] for scores in low if "temperature" in scores), 0.0)
    found = {"greedy": greedy, SAMPLED: list(pair), f"sampled, T = {temperature:g}": low}
    return {name: scores for name, scores in found.items() if any("n" in own or "exact_match" in own for own in scores)}


def breakdown_rows(pair: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for group in ("kinds", "splits"):
        parts = [scores.get(group) or {} for scores in pair]
        names = list(dict.fromkeys(name for part in parts for name in part))
        for name in names if len(names) > 1 else ():  # a single name would repeat the row above
            yield before_after_row(f"  {name.replace('_', ' ')}", *(part.get(name) for part in parts))


def unread_call_rows(pair: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    # Calls that the format does not read count as answers, so a high score on answer turns may consist of them.
    shares = [(scores.get("answers") or {}).get("unread_calls") for scores in pair]
    if not any(shares):
        return []
    return [("  unread calls", "", " → ".join(map(format_percent, shares)), "", "", "")]


def entropy_rows(pair: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    before, after = (value if is_number(value := scores.get("policy_entropy")) else None for scores in pair)
    if before is None and after is None:
        return []
    gain = "–" if before is None or after is None else f"{after - before:+.3f}"
    return [("  policy entropy, nats", "", format_change(before, after), gain, "", "")]


def before_after_row(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> tuple[str, ...]:
    # The gain's error combines both standard errors as if the two evaluations were independent. They share their
    # prompts, so the true error is smaller.
    before, after = before or {}, after or {}
    exact, s_acc, s_format = (
        " → ".join(format_percent(side.get(score)) for side in (before, after)) for score in SCORES
    )
    gain = "–"
    if is_number(before.get("exact_match")) and is_number(after.get("exact_match")):
        error = math.hypot(before.get("exact_match_error", 0.0), after.get("exact_match_error", 0.0))
        gain = f"{100 * (after['exact_match'] - before['exact_match']):+.1f} ± {100 * error:.1f}"
    return (name, str(after.get("n", before.get("n", 0))), exact, gain, s_acc, s_format)


def format_percent(value: float | None) -> str:
    """Return a share in percent without the sign, such as `41.2`; a dash for None."""
    return f"{100 * value:.1f}" if value is not None else "–"


def format_change(before: float | None, after: float | None) -> str:
    """Return text such as `0.263 → 0.412`, with a dash for a value that was not measured."""
    return " → ".join("–" if value is None else f"{value:.3f}" for value in (before, after))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table whose first column is aligned left and whose other columns are aligned right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(escape_cell(cell) for cell in line) + " |" for line in lines)


def escape_cell(cell: Any) -> str:
    # Pipes and line breaks would break the table; leading blanks indent the row.
    text = str(cell).replace("|", "\\|").replace("\n", " ")
    return "&nbsp;" * (len(text) - len(text.lstrip())) + text.strip()


def format_mean_and_sd(values: Sequence[float]) -> str:
    """Return text such as `0.412 ± 0.013`; a single value without `±`, and a dash for no values."""
    if not values:
        return "–"
    mean, sd = mean_and_sd(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {sd:.3f}"
