"""What every comparison needs, of models as of methods: a value with its interval, and p-values of many tests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import binomtest, false_discovery_control, norm

from rest_rl.errors import UserError
from rest_rl.response import TURNS, Turn

SIGNIFICANCE_LEVEL = 0.05
"""Of every test; intervals are of 95 %."""


class Interval(NamedTuple):
    """A value and its 95 % interval; NaN limits where there is no spread to tell from."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside; an unknown interval excludes nothing."""
        return self.low > 0 or self.high < 0


def q_values(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's q-values: among the tests with q <= 0.05 at most 5 % are expected to be chance.

    NaN for tests without a p, which count for none. Benjamini, Y. and Hochberg, Y. (1995),
    https://doi.org/10.1111/j.2517-6161.1995.tb02031.x, for independent tests. Tests that share a reference depend on
    each other positively, under which the bound is known to hold for one-sided tests and taken to hold for these.
    """
    known = [p for p in p_values if not math.isnan(p)]
    adjusted = iter(false_discovery_control(known) if known else [])
    return [math.nan if math.isnan(p) else float(next(adjusted)) for p in p_values]


CONFIDENCE_LEVEL = 0.95


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share, which stays in [0, 1] and has a width at 0 and 1 too.

    Wilson, E. B. (1927), https://doi.org/10.1080/01621459.1927.10502953. Nothing is known of a share of no samples:
    `wilson_interval(0, 0) == (0.0, 1.0)`. ValueError unless 0 <= correct <= n.
    """
    check_counts(correct, n)
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(correct, n).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_p_value(lost: int, gained: int) -> float:
    """The p-value of McNemar's exact test, two-sided: how often a fair coin splits the flipped samples as unevenly.

    McNemar, Q. (1947), https://doi.org/10.1007/BF02295996. Samples that both models answer alike say nothing; without
    a flipped sample p is 1. ValueError for negative counts.
    """
    check_counts(lost, lost + gained)
    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def paired_difference(lost: int, gained: int, n: int) -> Interval:
    """The change (gained - lost) / n of accuracy on the same n samples, with Bonett and Price's adjusted Wald interval.

    With p = (lost + 1) / (n + 2) and q = (gained + 1) / (n + 2) the interval is q - p ± z sqrt((p + q - (q - p)²) /
    (n + 2)), cut to [-1, 1]. Bonett, D. G. and Price, R. M. (2012), https://doi.org/10.3102/1076998611411915. Without
    samples the change is 0 in [-1, 1]. ValueError unless lost + gained <= n.
    """
    check_counts(lost, n)
    check_counts(gained, n - lost)
    if n == 0:
        return Interval(0.0, -1.0, 1.0)
    p, q = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = float(norm.ppf(0.5 + CONFIDENCE_LEVEL / 2)) * math.sqrt((p + q - (q - p) ** 2) / (n + 2))
    return Interval((gained - lost) / n, max(-1.0, q - p - half), min(1.0, q - p + half))


def weighted_mean(parts: Iterable[tuple[float, Interval]]) -> Interval:
    """The mean of (weight, estimate) pairs of separate samples, with the interval of the method MOVER.

    The distances from the mean to its limits are the roots of the sums of squares of the parts' own distances, times
    their weights: low = mean - sqrt(sum w² (value - low)²), high likewise. So the interval is asymmetric where those of
    the parts are, and never beyond the mean of their limits. Zou, G. Y. and Donner, A. (2008),
    https://doi.org/10.1002/sim.3095; over Wilson's intervals: Zou, G. Y., Huang, W. and Zhang, X. (2009),
    https://doi.org/10.1016/j.csda.2008.09.033. Weights count by their shares; ValueError for a negative one and without
    a positive one.
    """
    pairs = list(parts)
    total = math.fsum(weight for weight, _ in pairs)
    if not total > 0 or any(weight < 0 for weight, _ in pairs):
        weights = [weight for weight, _ in pairs]
        raise UserError(f"weights {weights}", "some above 0 and none below", "check the weights")
    value, least, most = (math.fsum(weight * part[i] for weight, part in pairs) / total for i in range(3))
    below, above = (math.hypot(*(weight * (part[i] - part.value) for weight, part in pairs)) / total for i in (1, 2))
    # The mean of the limits bounds them anyway; rounding is kept from passing 0 or 1.
    return Interval(value, max(least, value - below), min(most, value + above))


def check_counts(part: int, whole: int) -> None:
    """ValueError unless 0 <= part <= whole."""
    if not 0 <= part <= whole:
        raise UserError(f"{part} of {whole} samples", "a count from 0 to the whole", "check the counts")


class Outcome(NamedTuple):
    """What one response to a prompt was worth."""

    kind: str
    split: str
    prompt: int
    exact_match: float
    s_acc: float
    s_format: float
    turn: Turn


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over all outcomes, over those of call turns and of answer turns, per kind of task and per split."""
    return {
        **mean_scores(outcomes),
        **{turn: mean_scores([outcome for outcome in outcomes if outcome.turn == turn]) for turn in TURNS},
        "kinds": {kind: mean_scores(group) for kind, group in group_by(outcomes, "kind").items()},
        "splits": {split: mean_scores(group) for split, group in group_by(outcomes, "split").items()},
    }


def group_by(outcomes: Sequence[Outcome], name: str) -> dict[str, list[Outcome]]:
    """Outcomes by one of their fields, in alphabetical order."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: str(getattr(outcome, name))):
        groups.setdefault(str(getattr(outcome, name)), []).append(outcome)
    return groups


def mean_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean scores, the number of responses and the standard error of the exact match over prompts."""
    n = len(outcomes)
    if n == 0:
        return {"n": 0}
    return {
        "exact_match": sum(outcome.exact_match for outcome in outcomes) / n,
        "s_acc": sum(outcome.s_acc for outcome in outcomes) / n,
        "s_format": sum(outcome.s_format for outcome in outcomes) / n,
        "exact_match_error": standard_error(outcomes),
        "n": n,
    }


def standard_error(outcomes: Sequence[Outcome]) -> float:
    """Standard error of the mean exact match: sd over prompts / sqrt(prompts), draws of one prompt averaged first.

    0 for fewer than two prompts.
    """
    by_prompt: Mapping[str, list[Outcome]] = group_by(outcomes, "prompt")
    values = [sum(outcome.exact_match for outcome in group) / len(group) for group in by_prompt.values()]
    n = len(values)
    if n < 2:
        return 0.0
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
