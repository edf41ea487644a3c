"""Statistics of comparisons: confidence intervals, tests, q-values, and mean scores of responses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, false_discovery_control, mannwhitneyu, norm, t

from rest_rl.errors import UserError
from rest_rl.response import TURNS, Turn

SIGNIFICANCE_LEVEL = 0.05


class Interval(NamedTuple):
    """A value and its 95 % confidence interval; the limits are NaN if the spread is unknown."""

    value: float
    low: float
    high: float


def q_values(p_values: Sequence[float]) -> list[float]:
    """Return Benjamini and Hochberg's q-values, which bound the expected share of false positives.

    A NaN p-value gives NaN and does not count as a test. The bound is proven for independent tests (Benjamini, Y. and
    Hochberg, Y., 1995, https://doi.org/10.1111/j.2517-6161.1995.tb02031.x). Our tests share a baseline, so they are
    positively dependent; the bound is proven for such one-sided tests, and we assume it for two-sided ones.
    """
    known = [p for p in p_values if not math.isnan(p)]
    adjusted = iter(false_discovery_control(known) if known else [])
    return [math.nan if math.isnan(p) else float(next(adjusted)) for p in p_values]


CONFIDENCE_LEVEL = 0.95


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's score interval of the fraction correct / n; (0, 1) without samples.

    The interval stays in [0, 1] and has a positive width at 0 and 1, too. Wilson, E. B. (1927),
    https://doi.org/10.1080/01621459.1927.10502953.
    """
    check_counts(correct, n)
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(correct, n).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def clustered_wilson_interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Return Wilson's interval of the fraction correct / n of dependent samples, such as several attempts at a task.

    `counts` has a pair (correct, n) for each cluster of dependent samples. Wilson's formula gets n / D samples. The
    design effect D = sum_c (correct_c - p n_c)² / (n p (1 - p)), at least 1, compares the variance of the fraction p
    with that of independent samples. It is unknown if p is 0 or 1; then each cluster counts as one sample. Clusters of
    one sample give `wilson_interval`. With few clusters, the coverage is below 95 %. Franco, C. et al. (2019),
    https://pmc.ncbi.nlm.nih.gov/articles/PMC6690503, recommend Wilson's form.
    """
    correct, n, clusters = sum(right for right, _ in counts), sum(size for _, size in counts), len(counts)
    if n == clusters:
        return wilson_interval(correct, n)
    if correct in (0, n):
        return wilson_interval(clusters if correct else 0, clusters)
    check_counts(correct, n)
    p = correct / n
    effect = math.fsum((right - p * size) ** 2 for right, size in counts) / (n * p * (1 - p))
    size = n / max(1.0, effect)
    z2 = float(norm.ppf(0.5 + CONFIDENCE_LEVEL / 2)) ** 2
    center = (p * size + z2 / 2) / (size + z2)
    half = math.sqrt(z2 * (size * p * (1 - p) + z2 / 4)) / (size + z2)
    return center - half, center + half


def mcnemar_p_value(lost: int, gained: int) -> float:
    """Return the two-sided p-value of McNemar's exact test; 1 if no sample changed.

    Only samples on which exactly one of the two models is right count. Under the null hypothesis, each of them is
    equally likely to be lost or gained. McNemar, Q. (1947), https://doi.org/10.1007/BF02295996.
    """
    check_counts(lost, lost + gained)
    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def paired_difference(lost: int, gained: int, n: int) -> Interval:
    """Return the difference (gained - lost) / n of two accuracies on the same n samples.

    The interval is Bonett and Price's adjusted Wald interval: with p = (lost + 1) / (n + 2) and
    q = (gained + 1) / (n + 2), it is q - p ± 1.96 sqrt((p + q - (q - p)²) / (n + 2)), clipped to [-1, 1]. Bonett, D. G.
    and Price, R. M. (2012), https://doi.org/10.3102/1076998611411915. Without samples, the result is 0 in [-1, 1].
    """
    check_counts(lost, n)
    check_counts(gained, n - lost)
    return _bonett_price(lost, gained, n) if n else Interval(0.0, -1.0, 1.0)


def _bonett_price(lost: float, gained: float, n: int) -> Interval:
    p, q = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = float(norm.ppf(0.5 + CONFIDENCE_LEVEL / 2)) * math.sqrt((p + q - (q - p) ** 2) / (n + 2))
    return Interval((gained - lost) / n, max(-1.0, q - p - half), min(1.0, q - p + half))


def clustered_difference(changes: Sequence[tuple[int, int]]) -> tuple[Interval, float]:
    """Return the difference of two accuracies on the same dependent samples, and the two-sided p-value of a test.

    `changes` has a pair (gained - lost, n) for each of m clusters of dependent samples, such as the attempts at a task.
    The difference is the ratio of their sums; its variance comes from the deviations of the clusters from it, and t has
    m - 1 degrees of freedom (Cochran, W. G. (1977), Sampling Techniques, section 6.3). If no cluster deviates, the
    interval is Bonett and Price's for m samples. The test is the exact sign-flip test: under the null hypothesis, each
    cluster's change is equally likely to be positive or negative. With clusters of one sample, it is McNemar's.
    """
    m, total, n = len(changes), sum(change for change, _ in changes), sum(size for _, size in changes)
    value, deviations = total / n, sum((change * n - total * size) ** 2 for change, size in changes)
    if deviations == 0:
        interval = _bonett_price(m * max(0.0, -value), m * max(0.0, value), m)
    else:
        half = float(t.ppf(0.5 + CONFIDENCE_LEVEL / 2, m - 1)) * math.sqrt(deviations * m / (m - 1)) / n**2
        interval = Interval(value, max(-1.0, value - half), min(1.0, value + half))
    # The distribution of the total over all signs, from -bound to bound in steps of 1.
    bound = sum(abs(change) for change, _ in changes)
    shares = np.zeros(2 * bound + 1)
    shares[bound] = 1.0
    for change, _ in changes:
        shares = (np.roll(shares, change) + np.roll(shares, -change)) / 2
    p = shares[: bound - abs(total) + 1].sum() + shares[bound + abs(total) :].sum()
    return interval, min(1.0, float(p))


def weighted_mean(parts: Iterable[tuple[float, Interval]]) -> Interval:
    """Return the weighted mean of independent estimates, with a MOVER interval.

    With weights w_i that add up to 1, low = mean - sqrt(sum_i w_i² (value_i - low_i)²), and high accordingly. It is
    asymmetric if the estimates' intervals are. Zou, G. Y. and Donner, A. (2008), https://doi.org/10.1002/sim.3095; with
    Wilson's intervals: Zou, G. Y., Huang, W. and Zhang, X. (2009), https://doi.org/10.1016/j.csda.2008.09.033.

    Args:
        parts: (weight, estimate) pairs. Only the ratios of the weights matter.

    Raises:
        UserError: A weight is negative, or none is positive.
    """
    pairs = list(parts)
    total = math.fsum(weight for weight, _ in pairs)
    if not total > 0 or any(weight < 0 for weight, _ in pairs):
        weights = [weight for weight, _ in pairs]
        raise UserError(f"weights are {weights}", "none below 0 and some above", "correct the weights")
    # Index 0 of an estimate is its value, 1 and 2 are its limits; hypot is the root of the sum of squares.
    value, least, most = (math.fsum(weight * part[i] for weight, part in pairs) / total for i in range(3))
    below, above = (math.hypot(*(weight * (part[i] - part.value) for weight, part in pairs)) / total for i in (1, 2))
    # In exact arithmetic the mean of the limits bounds the interval anyway; here rounding could pass 0 or 1.
    return Interval(value, max(least, value - below), min(most, value + above))


MIN_AUC_CASES = 5


def compute_auc(rows: Sequence[tuple[float, bool]]) -> float | None:
    """Return the probability that a success has the higher value than a failure, where ties count half.

    This is the area under the ROC curve of the values as predictors of success. None with fewer than five of either.
    """
    good, bad = ([value for value, success in rows if success is wanted] for wanted in (True, False))
    if min(len(good), len(bad)) < MIN_AUC_CASES:
        return None
    return float(mannwhitneyu(good, bad).statistic) / (len(good) * len(bad))


def check_counts(part: int, whole: int) -> None:
    if not 0 <= part <= whole:
        raise UserError(f"the counts are {part} of {whole} samples", "0 <= count <= total", "correct the counts")


class Outcome(NamedTuple):
    """The scores of one response to a held-out prompt."""

    kind: str
    split: str
    prompt: int
    exact_match: float
    s_acc: float
    s_format: float
    turn: Turn
    unread_call: bool | None = None
    """Whether the response is a call as JSON that its format does not read; None if this was not examined."""


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return mean scores over all responses, by kind of turn, by kind of task and by split."""
    return {
        **mean_scores(outcomes),
        **{turn: mean_scores([outcome for outcome in outcomes if outcome.turn == turn]) for turn in TURNS},
        "kinds": {kind: mean_scores(group) for kind, group in group_by(outcomes, "kind").items()},
        "splits": {split: mean_scores(group) for split, group in group_by(outcomes, "split").items()},
    }


def group_by(outcomes: Sequence[Outcome], name: str) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: str(getattr(outcome, name))):
        groups.setdefault(str(getattr(outcome, name)), []).append(outcome)
    return groups


def mean_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    n = len(outcomes)
    if n == 0:
        return {"n": 0}
    unread = [outcome.unread_call for outcome in outcomes if outcome.unread_call is not None]
    return {
        "exact_match": sum(outcome.exact_match for outcome in outcomes) / n,
        "s_acc": sum(outcome.s_acc for outcome in outcomes) / n,
        "s_format": sum(outcome.s_format for outcome in outcomes) / n,
        "exact_match_error": standard_error(outcomes),
        **({"unread_calls": sum(unread) / len(unread)} if unread else {}),
        "n": n,
    }


def standard_error(outcomes: Sequence[Outcome]) -> float:
    # Standard error of the mean exact match, 0 for fewer than two prompts. Several responses to a prompt are not
    # independent, so they are averaged first, and the standard deviation is taken over prompts.
    by_prompt: Mapping[str, list[Outcome]] = group_by(outcomes, "prompt")
    values = [sum(outcome.exact_match for outcome in group) / len(group) for group in by_prompt.values()]
    n = len(values)
    if n < 2:
        return 0.0
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
