"""The verdict of a comparison: differences beyond seed noise, the control with shuffled weights, statistical power."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rest_rl.compare.collect import METRICS, PERMUTED, RANDOM, ComparisonReport, MethodResult, Statement, list_some
from rest_rl.compare.statistics import Paired, count_seeds_needed
from rest_rl.statistics import SIGNIFICANCE_LEVEL, Interval

FEW_SEEDS = 3
RELEVANT_DIFFERENCE = 0.03  # the smallest difference in exact match that a grid should be able to detect
METHODS_WITH_OWN_REWARD = ("grpo-static", "rest-no-dynamic-reward", "authors-code")


def build_verdict(report: ComparisonReport) -> tuple[Statement, ...]:
    """Return the statements about a comparison, the most important first."""
    # The verdict rests on one metric that was fixed in advance (`report.primary`). A method differs if its paired t
    # test over seeds, corrected for the number of methods, has q <= 0.05. A lead is attributed to the regions only if
    # it also exceeds the control with shuffled weights; anything that an interval leaves open is stated as open.
    found = list(unfinished_statements(report))
    for start in report.starts:
        reference = report.line(report.reference, start)
        if reference is None:
            text = f"From {start} there is no finished run of `{report.reference}`, so nothing is compared."
            found.append(Statement("no_reference", text))
            continue
        where = f"From {start}: " if start else ""
        found += [Statement(kind, where + text) for kind, text in start_statements(report, reference)]
    return (*found, *power_statements(report))


def unfinished_statements(report: ComparisonReport) -> Iterator[Statement]:
    left = report.unfinished_runs
    if not left:
        return
    total = len(left) + sum(len(line.runs) for line in report.lines)
    absent = ", ".join(f"`{label}`" for label in report.absent)
    without = f" Methods without a finished run are not compared: {absent}." if absent else ""
    count = f"**{len(left)} of {total} runs {'is' if len(left) == 1 else 'are'} not finished**"
    yield Statement("unfinished", f"{count}: {list_some([f'`{name}`' for name in left])}.{without}")


def start_statements(report: ComparisonReport, reference: MethodResult) -> Iterator[Statement]:
    judged = report.judged(reference.start)
    significant = [line for line in judged if q_value(report, line) <= SIGNIFICANCE_LEVEL]
    if judged:
        yield nothing_learnt_statement(report, [reference, *judged]) or main_statement(report, judged, significant)
    for line in significant:
        points, p = format_points(get_lead(report, line)), format_p(q_value(report, line))
        text = f"`{line.label}`: {points} points compared with `{report.reference}` ({p_or_q(report)} {p})."
        if line.to_final and not math.isnan(line.to_final.share):
            text += f" It reaches the final score of `{report.reference}` in {line.to_final.share:.2f} times the steps."
        yield Statement("difference", text)
    yield from entropy_statements(report, judged)
    yield from speed_statements(report, judged)
    yield from control_statements(report, judged, significant)
    yield from gain_statements(report, reference)
    if any(line.method in METHODS_WITH_OWN_REWARD for line in significant):
        names = " and ".join(f"`{line.label}`" for line in significant if line.method in METHODS_WITH_OWN_REWARD)
        text = f"The rewards differ too, so the differences of {names} are not due to the weights only."
        yield Statement("own_reward", text)


def q_value(report: ComparisonReport, line: MethodResult) -> float:
    return line.metrics[report.primary].q if report.primary in line.metrics else math.nan


def get_lead(report: ComparisonReport, line: MethodResult) -> Interval:
    test = line.metrics[report.primary].paired
    return test.difference if test else Interval(math.nan, math.nan, math.nan)


def nothing_learnt_statement(report: ComparisonReport, lines: list[MethodResult]) -> Statement | None:
    # Returns None unless all runs end exactly where they began, or at 0.
    label = METRICS[report.primary].label
    ends = {
        report.headline("gain"): f"every run ends exactly where it began in {label}",
        report.primary: f"{label} is 0 in every run",
    }
    for key, what in ends.items():
        if all(run.values.get(key) == 0 for line in lines for run in line.runs):
            text = f"**Nothing was learned**: {what}, so this grid says nothing about the methods."
            return Statement("nothing_learnt", text)
    return None


def main_statement(report: ComparisonReport, judged: list[MethodResult], significant: list[MethodResult]) -> Statement:
    label, reference = METRICS[report.primary].label, report.reference
    known = [q for line in judged if not math.isnan(q := q_value(report, line))]
    if not known:
        tests = [line.metrics[report.primary].paired for line in judged]
        alike = any(test and test.n > 1 for test in tests)
        why = "equal differences under all seeds allow no" if alike else "there are too few seeds for a"
        return Statement("no_verdict", f"**No verdict**: {why} test of {label}.")
    if not significant:
        tested = [line for line in judged if line.metrics[report.primary].paired]
        far = max(tested, key=lambda line: abs(get_lead(report, line).value))
        points, p = format_points(get_lead(report, far)), format_p(min(known))
        text = (
            f"`{far.label}` differs by {points} points from `{reference}` in {label} ({p_or_q(report)} {p})."
            if len(judged) == 1
            else f"None of the {len(judged)} methods differs from `{reference}` in {label} (smallest q {p}). The "
            f"largest difference is that of `{far.label}`: {points} points."
        )
        return Statement("no_difference", f"**No difference beyond seed noise.** {text}")
    above = [line for line in significant if get_lead(report, line).value > 0]
    if len(judged) == 1:
        side, test = "above" if above else "below", f"{label}, {p_or_q(report)} ≤ {SIGNIFICANCE_LEVEL:g}"
        return Statement(side, f"**`{judged[0].label}` is {side} `{reference}` beyond seed noise** ({test}).")
    counts = f"{len(above)} above `{reference}`, {len(significant) - len(above)} below"
    text = f"**Of {len(judged)} methods, beyond seed noise: {counts}** ({label}, q ≤ {SIGNIFICANCE_LEVEL:g})."
    return Statement("some_differ", text)


def entropy_statements(report: ComparisonReport, judged: list[MethodResult]) -> Iterator[Statement]:
    # A difference is confirmed at equal policy entropy if the interval there is on the same side of 0.
    for line in judged:
        for key in dict.fromkeys((report.primary, report.headline("exact"))):
            result = line.metrics.get(key)
            if result is None or result.paired is None or not result.q <= SIGNIFICANCE_LEVEL or line.at_entropy is None:
                continue
            lead, equal = result.paired.difference.value, line.at_entropy.paired.difference
            bound = equal.value if math.isnan(equal.low) else equal.low if lead > 0 else equal.high
            if bound * lead <= 0:
                text = (
                    f"At equal policy entropy `{line.label}` differs from `{report.reference}` by "
                    f"{format_points(equal)} points, which does not confirm its difference in {METRICS[key].label}."
                )
                yield Statement("not_at_equal_entropy", text)
                break


def speed_statements(report: ComparisonReport, judged: list[MethodResult]) -> Iterator[Statement]:
    # Faster means that the whole interval of the ratio of steps is below 1.
    reached = [(line.label, line.to_final.by_seed) for line in judged if line.to_final]
    parts = [
        f"`{label}` in {share.value:.2f} [{share.low:.2f}, {share.high:.2f}] times the steps"
        for label, share in reached
        if share.high < 1
    ]
    if parts:
        many = "" if report.is_single else ", not corrected for the number of methods"
        text = (
            f"Faster to the final score of `{report.reference}`: {'; '.join(parts)} (geometric mean over seeds{many})."
        )
        yield Statement("sooner", text)


def control_statements(
    report: ComparisonReport, judged: list[MethodResult], significant: list[MethodResult]
) -> Iterator[Statement]:
    # A lead of a control or a rival says nothing about ResT's weights, so only methods and ablations are checked
    # against `permuted`. If none of them leads but a control does, that is a result too: uneven weights helped, ResT's
    # did not.
    leading = [line for line in significant if get_lead(report, line).value > 0]
    better = [line for line in leading if line.role in ("method", "ablation")]
    for line in better:
        if line.over_permuted is None:
            text = "Without `permuted` runs it is open whether the regions or any uneven weights explain the lead."
            yield Statement("no_control", text)
            return
        yield control_statement(line.label, line.over_permuted, get_lead(report, line).value)
    if not better and any(line.role == "method" for line in judged):
        for line in leading:
            if line.method in (PERMUTED, "inverted"):
                text = f"`{line.method}` is better beyond seed noise, but no method with ResT's own weights is."
                yield Statement("only_control_leads", text)


def control_statement(label: str, test: Paired, lead_of_reference: float) -> Statement:
    # Three outcomes by the interval of the difference to `permuted`: above 0, the regions matter; below both 3 points
    # and half of the lead over the baseline, shuffled weights are as good; otherwise the question is open.
    if test.n < 2:
        seeds = {0: "no seed", 1: "one seed"}[test.n]
        text = f"`{label}` and `permuted` have {seeds} in common, so it is open whether the regions explain the lead."
        return Statement("control_unknown", text)
    points = f"`{label}` is {format_points(test.difference)} points above shuffled weights"
    if test.difference.low > 0:
        return Statement("regions_matter", f"{points}: it matters which region gets which weight.")
    if test.difference.high < min(RELEVANT_DIFFERENCE, lead_of_reference / 2):
        text = (
            f"**Weights matter, but shuffled weights do as well**: {points}, less than half of its lead, so the "
            "regions do not explain it."
        )
        return Statement("shuffled_as_good", text)
    text = f"{points}: it is open whether the regions explain its lead or any uneven weights would."
    return Statement("control_unknown", text)


def gain_statements(report: ComparisonReport, reference: MethodResult) -> Iterator[Statement]:
    gain = report.headline("gain")
    if result := reference.metrics.get(gain):
        yield reference_gain_statement(reference.label, result.mean)
    drawn = report.line(RANDOM, reference.start)
    if drawn and (result := drawn.metrics.get(gain)):
        if result.mean.low > 0:
            kind, meaning = "random_gains", "**part of every gain in this grid needs no reward signal.**"
        elif result.mean.high < RELEVANT_DIFFERENCE:
            kind, meaning = (
                "random_flat",
                f"without a reward signal, less than {100 * RELEVANT_DIFFERENCE:.0f} points are gained.",
            )
        else:
            kind, meaning = "random_unknown", "it is open whether anything is gained without a reward signal."
        points = format_points(result.mean)
        yield Statement(
            kind, f"Training on random rewards (`random`) changes exact match by {points} points: {meaning}"
        )


def reference_gain_statement(label: str, gain: Interval) -> Statement:
    points = f"{format_points(gain)} points over its start"
    if math.isnan(gain.low):
        return Statement("reference_gain", f"`{label}` gained {points}.")
    if gain.low > 0:
        return Statement("reference_learnt", f"`{label}` learned: {points}.")
    if gain.high < RELEVANT_DIFFERENCE:
        text = (
            f"`{label}` itself gained almost nothing ({points}). A grid in which so little is learned says little "
            "about the methods: train longer, or use another start."
        )
        return Statement("reference_flat", text)
    text = f"It is open whether `{label}` itself learned ({points}); more seeds or longer runs would show it."
    return Statement("reference_unknown", text)


def power_statements(report: ComparisonReport) -> Iterator[Statement]:
    shared = report.shared_seeds
    if shared and report.seeds < 2:
        text = (
            "One seed has no spread, so no difference can be distinguished from noise. Run at least 3 seeds, better 5."
        )
        yield Statement("one_seed", text)
        return
    if not math.isnan(report.detectable):
        needed = count_seeds_needed(RELEVANT_DIFFERENCE, report.sd)
        many = "" if report.is_single else ", before correction for the number of methods"
        points = f"{100 * RELEVANT_DIFFERENCE:.0f} points"
        more = f"; for {points} it would take {needed} seeds" if needed and needed > report.seeds else ""
        text = (
            f"With {report.seeds} seeds, this grid detects a difference of {100 * report.detectable:.1f} points with a "
            f"power of 80 %{many}{more}."
        )
        yield Statement("power", text)
    short = [f"`{label}` {count}" for label, count in shared.items() if count < report.seeds]
    if short:
        common = f"Fewer seeds in common with `{report.reference}`"
        yield Statement("fewer_seeds", f"{common}, and therefore less power: {', '.join(short)}.")
    if shared and report.seeds < FEW_SEEDS:
        yield Statement("few_seeds", f"{report.seeds} seeds are hardly enough for a test. Run at least 3, better 5.")


def p_or_q(report: ComparisonReport) -> str:
    return "p" if report.is_single else "q"


def format_points(interval: Interval) -> str:
    """Return a difference of shares in percentage points, such as `+3.1 [+0.4, +5.8]`."""
    return format_interval(interval, 100, 1, sign="+")


def format_interval(interval: Interval, scale: float, digits: int, sign: str = "") -> str:
    """Return text such as `41.2 [38.0, 44.4]`; without limits only the value, and without a value a dash."""
    if math.isnan(interval.value):
        return "–"
    value, low, high = (f"{scale * number:{sign}.{digits}f}" for number in interval)
    return value if math.isnan(interval.low) else f"{value} [{low}, {high}]"


def format_p(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
