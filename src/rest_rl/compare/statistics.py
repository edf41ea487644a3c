"""What a few seeds say: intervals of means, paired differences and their tests, power, steps to a target.

Seeds count as independent draws and are few, so intervals are Student's; those of shares end at 0 and 1.
NaN stands for what is not known: one seed has no spread. All intervals are of 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.integrate import trapezoid
from scipy.optimize import brentq
from scipy.stats import nct, permutation_test, t, ttest_1samp

from rest_rl.statistics import SIGNIFICANCE_LEVEL, Interval

POWER = 0.8
MAX_SIGN_DRAWS = 20_000
"""Sign assignments tried at most: all of them up to 14 seeds, random ones beyond."""
MAX_SEEDS = 10_000
NAN = float("nan")
ROUNDING_TOLERANCE = 1e-9
"""Share of a value, or of the largest of several, below which a difference counts as none: shares are not exact."""

Curve = Mapping[int, float]
"""A value by training step."""


class Paired(NamedTuple):
    """One quantity of two methods on the same seeds: ours minus theirs."""

    n: int
    difference: Interval
    sd: float
    """Standard deviation of the differences."""
    p_t: float
    """Paired t test, two-sided."""
    p_flip: float
    """Sign-flip permutation test, two-sided: never below 2 / 2**n."""


class StepsToTarget(NamedTuple):
    """How many steps a method takes to the reference's last (or best) value, as a share of the reference's steps."""

    share: float
    """Of the curves of the mean over seeds; NaN if the method's never gets there."""
    reached: int
    n: int
    by_seed: Interval
    """Geometric mean over seeds, each with its own target; NaN unless every seed gets there."""


def mean_interval(values: Sequence[float], bounds: tuple[float, float] | None = None) -> Interval:
    """Mean ± t(0.975, n - 1) s / sqrt(n); without two values, or without spread around a mean that is not 0, no ±.

    Limits beyond `bounds`, within which the true mean must lie, are cut off there: this loses no coverage.
    """
    if not values:
        return Interval(NAN, NAN, NAN)
    mean, sd = statistics.fmean(values), sample_sd(values)
    if sd == 0:
        half = NAN if any(values) else 0.0
    else:
        half = float(t.ppf(1 - SIGNIFICANCE_LEVEL / 2, len(values) - 1)) * sd / math.sqrt(len(values))
    if bounds is None or math.isnan(half):
        return Interval(mean, mean - half, mean + half)
    return Interval(mean, max(bounds[0], mean - half), min(bounds[1], mean + half))


def sample_sd(values: Sequence[float]) -> float:
    """The sample standard deviation, 0 where it is only rounding; NaN for fewer than two values."""
    if len(values) < 2:
        return NAN
    sd = statistics.stdev(values)
    return sd if sd > ROUNDING_TOLERANCE * max(abs(value) for value in values) else 0.0


def compare_paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Paired:
    """The difference on the seeds that both have, with its interval and two tests."""
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    differences = [0.0 if math.isclose(a, b, rel_tol=ROUNDING_TOLERANCE) else a - b for a, b in pairs]
    return Paired(
        n=len(differences),
        difference=mean_interval(differences),
        sd=sample_sd(differences),
        p_t=t_test(differences),
        p_flip=sign_flip_test(differences),
    )


def t_test(differences: Sequence[float]) -> float:
    """Student's t test against 0, two-sided. Differences that are all 0 have p = 1; other ones without spread, NaN."""
    if len(differences) < 2:
        return NAN
    if sample_sd(differences) == 0:
        return NAN if any(differences) else 1.0
    result: Any = ttest_1samp(differences, 0.0)
    return float(result.pvalue)


def sign_flip_test(differences: Sequence[float]) -> float:
    """How often random signs of the differences give a sum at least as far from 0, two-sided; NaN without any.

    It needs no normal distribution, only that a difference could as well have come with the other sign.
    """
    if not differences:
        return NAN
    if len(differences) == 1:  # scipy wants two observations; both signs are as far from 0
        return 1.0
    result = permutation_test(
        (np.asarray(differences, dtype=float),),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=MAX_SIGN_DRAWS,
        rng=0,
    )
    return float(result.pvalue)


def paired_t_power(difference: float, sd: float, n: int) -> float:
    """Chance that a paired t test at the 5 % level finds a true difference with n seeds: the noncentral t's tails."""
    if n < 2 or not sd > 0:
        return NAN
    critical, shift = t.ppf(1 - SIGNIFICANCE_LEVEL / 2, n - 1), abs(difference) / sd * math.sqrt(n)
    # scipy gives NaN for a left tail that is too small for it, below 1e-16
    return float(nct.sf(critical, n - 1, shift) + np.nan_to_num(nct.cdf(-critical, n - 1, shift)))


def detectable_difference(sd: float, n: int) -> float:
    """The smallest true difference that n seeds find with a chance of 80 %: where `power_of` is 0.8."""
    if n < 2 or not sd > 0:
        return NAN
    return sd * float(brentq(lambda effect: paired_t_power(effect, 1.0, n) - POWER, 1e-3, 100.0))  # type: ignore[arg-type]


def count_seeds_needed(difference: float, sd: float) -> int | None:
    """The fewest seeds that find a true difference with a chance of 80 %; None beyond 10,000."""
    if not difference or not sd > 0 or paired_t_power(difference, sd, MAX_SEEDS) < POWER:
        return None
    low, high = 1, MAX_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if paired_t_power(difference, sd, middle) >= POWER else (middle, high)
    return high


def pooled_sd(groups: Sequence[tuple[float, int]]) -> float:
    """The common standard deviation of groups of (sd, n): variances weighted by n - 1; groups without one left out."""
    known = [(sd, n - 1) for sd, n in groups if n > 1 and not math.isnan(sd)]
    freedom = sum(weight for _, weight in known)
    return math.sqrt(sum(sd**2 * weight for sd, weight in known) / freedom) if freedom else NAN


def area_under_curve(curve: Curve) -> float | None:
    """Area under a curve over its range of steps, so a mean over steps; None for less than two points."""
    steps = sorted(curve)
    if len(steps) < 2:
        return None
    return float(trapezoid([curve[step] for step in steps], steps)) / (steps[-1] - steps[0])


def steps_to_target(ours: Mapping[int, Curve], theirs: Mapping[int, Curve], *, best: bool) -> StepsToTarget | None:
    """Steps to the reference's last (or `best`) value over the reference's own steps to it, on the seeds of both.

    Curves are smoothed, by seed and step. Both counts are first crossings, so a method that is the reference has 1.
    None without a common seed with curves.
    """
    seeds = sorted(seed for seed in ours.keys() & theirs.keys() if ours[seed] and theirs[seed])
    if not seeds:
        return None
    shares = [steps_ratio(ours[seed], theirs[seed], best=best) for seed in seeds]
    known = [share for share in shares if share is not None]
    logs = mean_interval([math.log(share) for share in known] if len(known) == len(seeds) else [])
    mean_of_ours, mean_of_theirs = (mean_on_shared_steps([curves[seed] for seed in seeds]) for curves in (ours, theirs))
    whole = steps_ratio(mean_of_ours, mean_of_theirs, best=best)
    return StepsToTarget(
        share=NAN if whole is None else whole,
        reached=len(known),
        n=len(seeds),
        by_seed=Interval(*(math.exp(limit) for limit in logs)),
    )


def steps_ratio(ours: Curve, theirs: Curve, *, best: bool) -> float | None:
    """First crossing of the other curve's last (or best) value, over that curve's own first crossing of it."""
    if not theirs:
        return None
    target = max(theirs.values()) if best else theirs[max(theirs)]
    own, other = first_step_reaching(ours, target), first_step_reaching(theirs, target)
    assert other is not None
    return None if own is None else own / other


def first_step_reaching(curve: Curve, target: float) -> int | None:
    """The first step at which a curve reaches a value; None if it never does."""
    return next((step for step in sorted(curve) if curve[step] >= target - 1e-12), None)


def mean_on_shared_steps(curves: Sequence[Curve]) -> dict[int, float]:
    steps = set.intersection(*(set(curve) for curve in curves))
    return {step: statistics.fmean(curve[step] for curve in curves) for step in sorted(steps)}
