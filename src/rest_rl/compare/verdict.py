"""A comparison in words: what is beyond seed noise, whether shuffled weights do as well, what could not be seen."""

from __future__ import annotations

import math

from rest_rl.compare.collect import METRICS, RANDOM, Comparison, Line, difference, named
from rest_rl.compare.statistics import Paired, seeds_needed
from rest_rl.statistics import LEVEL, Interval

FEW_SEEDS = 3
WORTH = 0.03
"""A difference that one would want to see: 3 points."""
OWN_REWARD = ("paper", "authors-code")


def verdict(comparison: Comparison) -> list[str]:
    """The findings, the one that matters first; each is one sentence or two of Markdown."""
    found = unfinished_sentences(comparison)
    for start in comparison.starts:
        reference = comparison.line(comparison.reference, start)
        if reference is None:
            found.append(f"From {start} there is no finished {comparison.reference} to compare with.")
            continue
        where = f"From {start}: " if start else ""
        found += [where + sentence for sentence in verdict_of_start(comparison, reference)]
    return found + power_sentences(comparison)


def unfinished_sentences(comparison: Comparison) -> list[str]:
    """Which runs are missing, and which methods with all of theirs."""
    left = comparison.unfinished_runs
    if not left:
        return []
    total = len(left) + sum(len(line.cells) for line in comparison.lines)
    absent = ", ".join(f"`{label}`" for label in comparison.absent)
    without = f" There is no finished run of {absent}: nothing here is about that." if absent else ""
    names = named([f"`{name}`" for name in left])
    return [f"**{len(left)} of {total} runs {'is' if len(left) == 1 else 'are'} not finished**: {names}.{without}"]


def verdict_of_start(comparison: Comparison, reference: Line) -> list[str]:
    """The findings of one warm start."""
    judged = comparison.judged(reference.start)
    noticed = [line for line in judged if is_noticed(comparison, line)]
    found = (
        [nothing_learnt(comparison, [reference, *judged]) or headline(comparison, judged, noticed)] if judged else []
    )
    found += [one_difference(comparison, line) for line in noticed]
    found += speed_sentences(comparison, judged)
    found += control_sentences(comparison, reference.start, noticed)
    found += gain_sentences(comparison, reference)
    if any(line.method in OWN_REWARD for line in noticed):
        found.append(
            "`paper` and `authors-code` have rewards of their own: a difference of theirs is not one of weights alone."
        )
    return found


def is_noticed(comparison: Comparison, line: Line) -> bool:
    """Whether a method differs from the reference beyond seed noise: q at most 5 %."""
    return comparison.primary in line.versus and line.versus[comparison.primary].q <= LEVEL


def nothing_learnt(comparison: Comparison, lines: list[Line]) -> str:
    """That every run of some methods ends exactly where it began, or at 0; empty if any does not."""
    label = METRICS[comparison.primary].label
    ends = {
        "gain": f"every run ends exactly where it began in {label}",
        comparison.primary: f"{label} is 0 in every run",
    }
    for key, text in ends.items():
        if all(cell.values.get(key) == 0 for line in lines for cell in line.cells):
            return f"**Nothing was learnt**: {text}, so this grid says nothing about methods."
    return ""


def headline(comparison: Comparison, judged: list[Line], noticed: list[Line]) -> str:
    """The first sentence."""
    label, reference = METRICS[comparison.primary].label, comparison.reference
    known = [q for line in judged if not math.isnan(q := line.versus[comparison.primary].q)]
    if not known:
        alike = any(count > 1 for count in comparison.shared_seeds(judged[0].start).values())
        why = "differences that are alike under every seed leave nothing for" if alike else "too few seeds for"
        return f"**No verdict**: {why} a test of {label}."
    if not noticed:
        return f"**No difference beyond seed noise.** {unnoticed_text(comparison, judged, min(known))}"
    above = [line for line in noticed if sign(comparison, line) > 0]
    if len(judged) == 1:
        side = "above" if above else "below"
        test = f"{label}, {letter(comparison)} ≤ {LEVEL:g}"
        return f"**`{judged[0].label}` is {side} `{reference}` beyond seed noise** ({test})."
    counts = f"{len(above)} above `{reference}` and {len(noticed) - len(above)} below it"
    return f"**Of {len(judged)} methods, {counts} beyond seed noise** ({label}, q ≤ {LEVEL:g})."


def unnoticed_text(comparison: Comparison, judged: list[Line], smallest: float) -> str:
    """How far from the reference methods are that do not differ from it beyond noise."""
    label, reference = METRICS[comparison.primary].label, comparison.reference
    far = max(judged, key=lambda line: abs(sign(comparison, line)))
    test = far.versus[comparison.primary].paired
    points = points_text(test.difference) if test else "–"
    if len(judged) == 1:
        return (
            f"`{far.label}` is {points} points from `{reference}` in {label} ({letter(comparison)} {p_text(smallest)})."
        )
    return (
        f"None of {len(judged)} methods differs from `{reference}` in {label} (smallest q {p_text(smallest)}). The "
        f"largest difference is that of `{far.label}`, {points} points."
    )


def one_difference(comparison: Comparison, line: Line) -> str:
    """How far a method is from the reference, and whether it gets there sooner."""
    versus = line.versus[comparison.primary]
    assert versus.paired is not None
    text = f"`{line.label}`: {points_text(versus.paired.difference)} points ({letter(comparison)} {p_text(versus.q)})."
    final = line.to_final
    if final and not math.isnan(final.share):
        text += f" It gets to where `{comparison.reference}` ends in {final.share:.2f} of its steps."
    return text


def speed_sentences(comparison: Comparison, judged: list[Line]) -> list[str]:
    """Who gets to where the reference ends in fewer steps: the interval of the mean over seeds is below 1."""
    sooner = [line for line in judged if line.to_final and line.to_final.by_seed.high < 1]
    parts = [
        f"`{line.label}` in {line.to_final.by_seed.value:.2f} [{line.to_final.by_seed.low:.2f}, "
        f"{line.to_final.by_seed.high:.2f}] of its steps"
        for line in sooner
        if line.to_final
    ]
    if not parts:
        return []
    many = "" if comparison.is_single else ", not corrected for the number of methods"
    return [f"Sooner where `{comparison.reference}` ends: {'; '.join(parts)} (geometric mean over seeds{many})."]


def control_sentences(comparison: Comparison, start: str, noticed: list[Line]) -> list[str]:
    """Whether shuffled or inverted weights do as well as those that did better."""
    better = [line for line in noticed if sign(comparison, line) > 0 and line.role in ("method", "ablation")]
    if not better:
        return only_controls(comparison, start)
    shuffled = comparison.line("permuted", start)
    if shuffled is None:
        return ["Without `permuted` in the grid it is open whether the regions or any uneven weights do it."]
    tests = [(line, difference(line, shuffled, comparison.primary)) for line in better]
    return [control_sentence(line, test, sign(comparison, line)) for line, test in tests]


def control_sentence(line: Line, test: Paired, lead: float) -> str:
    """What a lead over shuffled weights says of a lead over the reference."""
    if test.n < 2:
        return (
            f"`{line.label}` and `permuted` have {seeds_text(test.n)} in common: whether the regions explain the lead "
            "cannot be told."
        )
    points = f"`{line.label}` is {points_text(test.difference)} points above shuffled weights"
    if test.difference.low > 0:
        return f"{points}: which region gets the weight matters."
    if test.difference.high < min(WORTH, lead / 2):
        return (
            f"**Weights matter, but shuffled ones do as well**: {points}, less than half of its lead, so the regions "
            "do not explain it."
        )
    return f"{points}: whether the regions explain its lead or any uneven weights would do cannot be told."


def only_controls(comparison: Comparison, start: str) -> list[str]:
    """Whether shuffled or inverted weights are better where no method was seen to be."""
    if not any(line.role == "method" for line in comparison.judged(start)):
        return []
    lines = [comparison.line(control, start) for control in ("permuted", "inverted")]
    leading = [line for line in lines if line and is_noticed(comparison, line) and sign(comparison, line) > 0]
    return [
        f"`{line.method}` does better beyond seed noise, and no method with ResT's own weights was seen to."
        for line in leading
    ]


def gain_sentences(comparison: Comparison, reference: Line) -> list[str]:
    """Whether the reference learnt at all, and what rewards that know nothing did."""
    found = []
    if gain := reference.versus.get("gain"):
        found.append(reference_text(reference, gain.mean))
    drawn = comparison.line(RANDOM, reference.start)
    if drawn and (gain := drawn.versus.get("gain")):
        found.append(
            f"Rewards that know nothing (`random`) change exact match by {points_text(gain.mean)} points: "
            + without_signal(gain.mean)
        )
    return found


def reference_text(reference: Line, gain: Interval) -> str:
    """What the reference gained over its start."""
    points = f"{points_text(gain)} points over its start"
    if math.isnan(gain.low):
        return f"`{reference.label}` gained {points}."
    if gain.low > 0:
        return f"`{reference.label}` learnt: {points}."
    if gain.high < WORTH:
        return (
            f"`{reference.label}` itself gained nothing to speak of ({points}): a grid in which so little is learnt "
            "says little about methods. Train longer, or take another start."
        )
    return f"Whether `{reference.label}` itself learnt cannot be told ({points}): more seeds or longer runs would."


def without_signal(gain: Interval) -> str:
    """What a gain under random rewards says."""
    if gain.low > 0:
        return "**part of every gain here needs no reward.**"
    if gain.high < WORTH:
        return f"less than {100 * WORTH:.0f} points come without a signal."
    return "whether something is gained without a signal cannot be told."


def power_sentences(comparison: Comparison) -> list[str]:
    """What this grid could not have seen."""
    shared, most = comparison.shared_seeds(), comparison.seeds
    if not shared:
        return []
    if most < 2:
        return ["One seed has no spread: nothing here can be told from noise. Run at least 3 seeds, better 5."]
    found = []
    if not math.isnan(comparison.detectable):
        needed = seeds_needed(WORTH, comparison.sd)
        many = "" if comparison.is_single else ", before correction for the number of methods"
        more = f"; for {100 * WORTH:.0f} points it takes {needed} seeds" if needed and needed > most else ""
        found.append(
            f"With {most} seeds the grid would have seen a difference of {100 * comparison.detectable:.1f} points four "
            f"times out of five{many}{more}."
        )
    short = [f"`{label}` {count}" for label, count in shared.items() if count < most]
    if short:
        found.append(
            f"Fewer seeds in common with `{comparison.reference}`, so less was to be seen of them: {', '.join(short)}."
        )
    if most < FEW_SEEDS:
        found.append(f"{most} seeds hardly allow a test: run at least 3, better 5.")
    return found


def letter(comparison: Comparison) -> str:
    """What a test is called: the p of one method is its q."""
    return "p" if comparison.is_single else "q"


def seeds_text(count: int) -> str:
    """`no seed`, `one seed`, `3 seeds`."""
    return {0: "no seed", 1: "one seed"}.get(count, f"{count} seeds")


def sign(comparison: Comparison, line: Line) -> float:
    """On which side of the reference a method is."""
    test: Paired | None = line.versus[comparison.primary].paired
    return 0.0 if test is None else test.difference.value


def points_text(interval: Interval) -> str:
    """`+3.1 [+0.4, +5.8]` in points; without an interval the value alone."""
    value = f"{100 * interval.value:+.1f}"
    if math.isnan(interval.low):
        return value
    return f"{value} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def p_text(p: float) -> str:
    """A p- or q-value."""
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
