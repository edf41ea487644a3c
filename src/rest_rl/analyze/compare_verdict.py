"""A comparison in words: what is beyond seed noise, whether shuffled weights do as well, what could not be seen."""

from __future__ import annotations

import math

from rest_rl.analyze.compare import METRICS, RANDOM, Comparison, Line, difference
from rest_rl.analyze.seed_statistics import LEVEL, Interval, Paired, seeds_needed

FEW_SEEDS = 3
WORTH = 0.03
"""A difference that one would want to see: 3 points."""
OWN_REWARD = ("paper", "authors-code")


def verdict(comparison: Comparison) -> list[str]:
    """The findings, the one that matters first; each is one sentence or two of Markdown."""
    found = []
    for start in comparison.starts:
        reference = comparison.line(comparison.reference, start)
        if reference is None:
            found.append(f"From {start} there is no finished {comparison.reference} to compare with.")
            continue
        where = f"From {start}: " if start else ""
        found += [where + sentence for sentence in verdict_of_start(comparison, reference)]
    return found + power_sentences(comparison)


def verdict_of_start(comparison: Comparison, reference: Line) -> list[str]:
    """The findings of one warm start."""
    rivals = [line for line in comparison.rivals(reference.start) if comparison.primary in line.versus]
    judged = [line for line in rivals if line.method != RANDOM]
    noticed = [line for line in judged if is_noticed(comparison, line)]
    found = [headline(comparison, judged, noticed)] if judged else []
    found += [one_difference(comparison, line) for line in noticed]
    found += speed_sentences(comparison, judged)
    found += control_sentences(comparison, reference.start, noticed)
    found += random_sentences(comparison, reference)
    if any(line.method in OWN_REWARD for line in noticed):
        found.append(
            "`paper` and `authors-code` have rewards of their own: a difference of theirs is not one of weights alone."
        )
    return found


def is_noticed(comparison: Comparison, line: Line) -> bool:
    """Whether a method differs from the reference beyond seed noise: q at most 5 %."""
    return comparison.primary in line.versus and line.versus[comparison.primary].q <= LEVEL


def headline(comparison: Comparison, judged: list[Line], noticed: list[Line]) -> str:
    """The first sentence."""
    label, reference = METRICS[comparison.primary].label, comparison.reference
    if not noticed:
        known = [line.versus[comparison.primary].q for line in judged]
        known = [q for q in known if not math.isnan(q)]
        if not known:
            return f"**No verdict**: too few seeds for a test of {label}."
        whom = "The one method does not differ" if len(judged) == 1 else f"None of {len(judged)} methods differs"
        far = max(judged, key=lambda line: abs(sign(comparison, line)))
        test = far.versus[comparison.primary].paired
        largest = (
            f" The largest difference is that of `{far.label}`, {points_text(test.difference)} points." if test else ""
        )
        text = f"{whom} from `{reference}` in {label} (smallest q {min(known):.2f}).{largest}"
        return f"**No difference beyond seed noise.** {text}"
    above = sum(sign(comparison, line) > 0 for line in noticed)
    counts = f"{above} above `{reference}` and {len(noticed) - above} below it"
    return f"**Of {len(judged)} methods, {counts} beyond seed noise** ({label}, q ≤ {LEVEL:g})."


def one_difference(comparison: Comparison, line: Line) -> str:
    """How far a method is from the reference, and whether it gets there sooner."""
    versus = line.versus[comparison.primary]
    assert versus.paired is not None
    text = f"`{line.label}`: {points_text(versus.paired.difference)} points (q {p_text(versus.q)})."
    final = line.to_final
    if final and not math.isnan(final.share):
        text += f" It gets to where `{comparison.reference}` ends in {final.share:.2f} of its steps."
    return text


def speed_sentences(comparison: Comparison, judged: list[Line]) -> list[str]:
    """Who gets to where the reference ends in fewer steps under every seed, the interval below 1."""
    sooner = [line for line in judged if line.to_final and line.to_final.by_seed.high < 1]
    parts = [
        f"`{line.label}` in {line.to_final.by_seed.value:.2f} [{line.to_final.by_seed.low:.2f}, "
        f"{line.to_final.by_seed.high:.2f}] of its steps"
        for line in sooner
        if line.to_final
    ]
    if not parts:
        return []
    where = f"Sooner where `{comparison.reference}` ends, on every seed"
    return [f"{where}: {'; '.join(parts)} (not corrected for the number of methods)."]


def control_sentences(comparison: Comparison, start: str, noticed: list[Line]) -> list[str]:
    """Whether shuffled or inverted weights do as well as those that did better."""
    better = [line for line in noticed if sign(comparison, line) > 0 and line.role in ("method", "ablation")]
    found = []
    shuffled = comparison.line("permuted", start)
    for line in better:
        if shuffled is None:
            break
        test = difference(line, shuffled, comparison.primary)
        if test.difference.low > 0:
            found.append(
                f"`{line.label}` is {points_text(test.difference)} points above shuffled weights: which region gets "
                "the weight matters."
            )
        else:
            found.append(
                f"**Weights matter, but shuffled ones do as well**: `{line.label}` is {points_text(test.difference)} "
                "points above `permuted`, so the regions do not explain its lead."
            )
    for control in ("permuted", "inverted"):
        line = comparison.line(control, start)
        if line is not None and is_noticed(comparison, line) and sign(comparison, line) > 0 and not better:
            found.append(f"Only `{control}` does better, and no method with ResT's own weights does.")
    if better and shuffled is None:
        found.append("Without `permuted` in the grid it is open whether the regions or any uneven weights do it.")
    return found


def random_sentences(comparison: Comparison, reference: Line) -> list[str]:
    """Whether the reference learnt at all, and what rewards that know nothing did."""
    found = []
    if gain := reference.versus.get("gain"):
        if math.isnan(gain.mean.low):
            found.append(f"`{reference.label}` gained {points_text(gain.mean)} points over its start.")
        elif gain.mean.low > 0:
            found.append(f"`{reference.label}` learnt: {points_text(gain.mean)} points over its start.")
        else:
            found.append(
                f"`{reference.label}` itself did not gain beyond seed noise ({points_text(gain.mean)} points): where "
                "nothing is learnt, methods cannot differ. Train longer, or take another start."
            )
    drawn = comparison.line(RANDOM, reference.start)
    if drawn and (gain := drawn.versus.get("gain")):
        found.append(
            f"Rewards that know nothing (`random`) change exact match by {points_text(gain.mean)} points: "
            + ("**part of every gain here needs no reward.**" if gain.mean.low > 0 else "no gain without a signal.")
        )
    return found


def power_sentences(comparison: Comparison) -> list[str]:
    """What this grid could not have seen."""
    if comparison.seeds < 2:
        return ["One seed has no spread: nothing here can be told from noise. Run at least 3 seeds, better 5."]
    if math.isnan(comparison.detectable):
        return []
    needed = seeds_needed(WORTH, comparison.sd)
    text = (
        f"With {comparison.seeds} seeds the grid would have seen a difference of {100 * comparison.detectable:.1f} "
        "points four times out of five, before correction for the number of methods"
    )
    more = f"; for {100 * WORTH:.0f} points it takes {needed} seeds" if needed and needed > comparison.seeds else ""
    found = [f"{text}{more}."]
    if comparison.seeds < FEW_SEEDS:
        found.append(f"{comparison.seeds} seeds hardly allow a test: run at least 3, better 5.")
    return found


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
