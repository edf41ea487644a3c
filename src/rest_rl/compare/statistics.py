"""Statistics over a few seeds: intervals of means, paired differences and their tests, power, steps to a target.

Seeds count as independent draws. Because seeds are few, all intervals are 95 % Student intervals; intervals of shares
are cut off at 0 and 1. Unknown values, such as the spread of a single seed, are NaN.
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
# Up to 14 seeds the sign-flip test enumerates all assignments of signs; for more, it draws this many at random.
MAX_SIGN_DRAWS = 20_000
MAX_SEEDS = 10_000
NAN = float("nan")
# Relative differences below this count as zero. Scores are quotients, so equal ones may differ by rounding.
ROUNDING_TOLERANCE = 1e-9

Curve = Mapping[int, float]  # by training step


class Paired(NamedTuple):
    """The difference in one metric between two methods over the seeds that both have, and two tests of it."""

    n: int
    difference: Interval
    sd: float
    """Standard deviation of the differences."""
    p_t: float
    """p of the paired t test, two-sided."""
    p_flip: float
    """p of the sign-flip permutation test, two-sided; never below 2 / 2**n."""


class StepsToTarget(NamedTuple):
    """Steps a method needs to reach the baseline's last (or best) value, divided by the steps the baseline needs."""

    share: float
    """The ratio for the mean curves over seeds; NaN if the method never reaches the value."""
    reached: int
    """Number of seeds that reach the value, of `n`."""
    n: int
    by_seed: Interval
    """Geometric mean of the seeds' ratios, each with a separate target; NaN unless every seed reaches its target."""


class AtEqualEntropy(NamedTuple):
    """Accuracies of a method and the baseline on the training samples when their policy entropies are equal."""

    entropy: float
    """The mean over seeds of the entropy at which the two are compared."""
    ours: float
    theirs: float
    paired: Paired


def mean_interval(values: Sequence[float], bounds: tuple[float, float] | None = None) -> Interval:
    """Return the mean of n values with its Student interval, mean ± t(0.975, n - 1) sd / sqrt(n).

    The limits are NaN for fewer than two values and for equal values, which do not show any noise, except that they are
    0 if all values are 0. `bounds` is the range of the true mean: limits are cut off there, which loses no coverage.
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
    if len(values) < 2:
        return NAN
    sd = statistics.stdev(values)
    return sd if sd > ROUNDING_TOLERANCE * max(abs(value) for value in values) else 0.0


def compare_paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Paired:
    """Return the mean of `ours` - `theirs`, values by seed, over the seeds in both, with its interval and two tests."""
    # Both methods of a seed see the same prompts in the same order, so the seed shifts both scores alike. Subtracting
    # seed by seed removes this shared part of the variance before the mean is taken.
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
    """Return the two-sided p of the t test for a mean of 0: 1 if all values are 0, NaN if they are equal but not 0."""
    if len(differences) < 2:
        return NAN
    if sample_sd(differences) == 0:
        return NAN if any(differences) else 1.0
    result: Any = ttest_1samp(differences, 0.0)
    return float(result.pvalue)


def sign_flip_test(differences: Sequence[float]) -> float:
    """Return the two-sided p of the sign-flip permutation test for a mean of 0; NaN if there are no differences."""
    # If the methods are equal, each difference could as well have had the other sign. p is the share of the 2**n sign
    # assignments whose sum is at least as far from 0 as the observed one; no normal distribution is assumed.
    if not differences:
        return NAN
    if len(differences) == 1:  # scipy requires two observations; with one, both signs are equally far from 0
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
    """Return the power of a paired t test: its chance of detecting a true difference at the 5 % level with n seeds."""
    # Under a true difference the t statistic has a noncentral t distribution; the power is the mass of both its tails
    # beyond the critical value.
    if n < 2 or not sd > 0:
        return NAN
    critical, shift = t.ppf(1 - SIGNIFICANCE_LEVEL / 2, n - 1), abs(difference) / sd * math.sqrt(n)
    # scipy returns NaN for a left tail below about 1e-16
    return float(nct.sf(critical, n - 1, shift) + np.nan_to_num(nct.cdf(-critical, n - 1, shift)))


def detectable_difference(sd: float, n: int) -> float:
    """Return the smallest true difference that n seeds detect with a power of 80 %."""
    # The power depends only on difference / sd, so solve once for sd = 1 and scale.
    if n < 2 or not sd > 0:
        return NAN
    return sd * float(brentq(lambda effect: paired_t_power(effect, 1.0, n) - POWER, 1e-3, 100.0))  # type: ignore[arg-type]


def count_seeds_needed(difference: float, sd: float) -> int | None:
    """Return the fewest seeds that detect a true difference with a power of 80 %; None above 10,000."""
    # The power grows with n, so bisect: `low` never suffices, `high` always does.
    if not difference or not sd > 0 or paired_t_power(difference, sd, MAX_SEEDS) < POWER:
        return None
    low, high = 1, MAX_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if paired_t_power(difference, sd, middle) >= POWER else (middle, high)
    return high


def pooled_sd(groups: Sequence[tuple[float, int]]) -> float:
    """Return the pooled standard deviation of groups, each given as (sd, n); variances are weighted by n - 1."""
    known = [(sd, n - 1) for sd, n in groups if n > 1 and not math.isnan(sd)]
    freedom = sum(weight for _, weight in known)
    return math.sqrt(sum(sd**2 * weight for sd, weight in known) / freedom) if freedom else NAN


def area_under_curve(curve: Curve) -> float | None:
    """Return the mean of a curve over its steps (area divided by range of steps); None for fewer than 2 points."""
    steps = sorted(curve)
    if len(steps) < 2:
        return None
    return float(trapezoid([curve[step] for step in steps], steps)) / (steps[-1] - steps[0])


def steps_to_target(ours: Mapping[int, Curve], theirs: Mapping[int, Curve], *, best: bool) -> StepsToTarget | None:
    """Compare how many steps two methods need to reach the baseline's last (or `best`) value, on their common seeds.

    `ours` and `theirs` (the baseline) contain a smoothed curve for each seed. Returns None without a common seed.
    """
    # Both counts are first crossings of the same target, so the baseline compared with itself has exactly 1. The mean
    # over seeds is geometric, because ratios are multiplicative. It is NaN as soon as one seed never reaches its
    # target: dropping that seed would favor the method that fails.
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
    if not theirs:
        return None
    target = max(theirs.values()) if best else theirs[max(theirs)]
    own, other = first_step_reaching(ours, target), first_step_reaching(theirs, target)
    assert other is not None  # the target is a value of this curve
    return None if own is None else own / other


def first_step_reaching(curve: Curve, target: float) -> int | None:
    return next((step for step in sorted(curve) if curve[step] >= target - 1e-12), None)


def mean_on_shared_steps(curves: Sequence[Curve]) -> dict[int, float]:
    # Only steps that all curves have count: where a seed has no value, the mean would jump by the level of that seed.
    steps = set.intersection(*(set(curve) for curve in curves))
    return {step: statistics.fmean(curve[step] for curve in curves) for step in sorted(steps)}


def trailing_mean(curve: Curve) -> dict[int, float]:
    """Return the mean over the last tenth of the steps up to each step; it uses no later step."""
    window = max(1, len(curve) // 10)
    means = np.convolve(list(curve.values()), np.full(window, 1 / window), "valid").tolist() if curve else []
    return dict(zip(list(curve)[window - 1 :], means, strict=True))


def compare_at_equal_entropy(
    ours: Mapping[int, tuple[Curve, Curve]], theirs: Mapping[int, tuple[Curve, Curve]]
) -> AtEqualEntropy | None:
    """Compare the accuracies of a method and the baseline at equal policy entropy, over their common seeds.

    Both contain, for each seed, the smoothed curves of entropy and accuracy. Returns None without a common seed that
    has all of them.
    """
    # A sharper policy scores higher at temperature 1 even if it has learned nothing. So each seed compares the two runs
    # at one entropy: the larger of their final entropies. A run that was never so uncertain is left out.
    levels: dict[int, float] = {}
    pairs: dict[int, tuple[float, float]] = {}
    for seed in sorted(ours.keys() & theirs.keys()):
        if all((*ours[seed], *theirs[seed])):
            entropies = (ours[seed][0], theirs[seed][0])
            level = max(curve[max(curve)] for curve in entropies)
            pair = (accuracy_at(level, *ours[seed]), accuracy_at(level, *theirs[seed]))
            if not any(map(math.isnan, pair)):
                levels[seed], pairs[seed] = level, pair
    if not pairs:
        return None
    own, other = ({seed: pair[side] for seed, pair in pairs.items()} for side in (0, 1))
    means = (statistics.fmean(values.values()) for values in (levels, own, other))
    return AtEqualEntropy(*means, paired=compare_paired(own, other))


def accuracy_at(level: float, entropies: Curve, accuracies: Curve) -> float:
    # The accuracy at the last point at which the entropy was at the level, between steps by linear interpolation; NaN
    # without such a point. The level is at least the last entropy. The entropy may rise before it falls, and an earlier
    # point at the same level would compare a policy that has learned little.
    steps = sorted(entropies)
    at = next((i for i in reversed(range(len(steps))) if entropies[steps[i]] >= level), None)
    if at is None:
        return NAN
    step, before = float(steps[at]), entropies[steps[at]]
    if before > level:
        after = entropies[steps[at + 1]]
        step += (before - level) / (before - after) * (steps[at + 1] - steps[at])
    known = sorted(accuracies)
    return float(np.interp(step, known, [accuracies[each] for each in known]))
