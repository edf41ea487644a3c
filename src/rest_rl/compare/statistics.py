"""What a few seeds say: intervals of means, paired differences and their tests, power, steps to where a curve got.

Seeds count as independent draws and are few, so intervals are those of Student. NaN stands for what is not known: one
seed has no spread. All intervals are of 95 %.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import chi, norm, t

from rest_rl.statistics import LEVEL, Interval

POWER = 0.8
EXACT_SEEDS = 16
"""Seeds up to which every assignment of signs is tried."""
DRAWS = 20_000
MOST_SEEDS = 10_000
NAN = float("nan")
ROUNDING = 1e-9
"""Share of a value, or of the largest of several, below which a difference counts as none: shares are not exact."""


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


class Reach(NamedTuple):
    """How many of its steps a method takes to where the reference gets, as a share of the reference's."""

    share: float
    """Of the curves of the mean over seeds; NaN if the method's never gets there."""
    reached: int
    n: int
    by_seed: Interval
    """Geometric mean over seeds, each with its own target; NaN unless every seed gets there."""


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean ± t(0.975, n - 1) s / sqrt(n); no values, or one, or all the same: no interval around the mean."""
    if not values:
        return Interval(NAN, NAN, NAN)
    mean = statistics.fmean(values)
    half = half_width(values)
    return Interval(mean, mean - half, mean + half)


def half_width(values: Sequence[float]) -> float:
    """t(0.975, n - 1) s / sqrt(n), NaN for fewer than two values and for values without any spread but not all 0."""
    if len(values) < 2:
        return NAN
    sd = spread(values)
    if sd == 0:
        return NAN if any(values) else 0.0
    return float(t.ppf(1 - LEVEL / 2, len(values) - 1)) * sd / math.sqrt(len(values))


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation, 0 where it is rounding alone; NaN for fewer than two values."""
    if len(values) < 2:
        return NAN
    sd = statistics.stdev(values)
    return sd if sd > ROUNDING * max(abs(value) for value in values) else 0.0


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Paired:
    """The difference on the seeds that both have, with its interval and two tests.

    Differences that are all 0 have p = 1; differences that are all alike but not 0 say nothing of the noise, and their
    p is NaN.
    """
    differences = [without_rounding(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    return Paired(
        len(differences),
        mean_interval(differences),
        spread(differences),
        t_test(differences),
        sign_flip_test(differences),
    )


def without_rounding(ours: float, theirs: float) -> float:
    """The difference, 0 if it is rounding alone."""
    return 0.0 if math.isclose(ours, theirs, rel_tol=ROUNDING) else ours - theirs


def t_test(differences: Sequence[float]) -> float:
    """Student's one-sample t test against 0, two-sided; NaN without spread, but 1 if nothing differs at all."""
    if len(differences) < 2:
        return NAN
    sd = spread(differences)
    if sd == 0:
        return NAN if any(differences) else 1.0
    score = statistics.fmean(differences) / (sd / math.sqrt(len(differences)))
    return float(2 * t.sf(abs(score), len(differences) - 1))


def sign_flip_test(differences: Sequence[float], seed: int = 0) -> float:
    """How often random signs of the differences give a mean at least as far from 0, two-sided.

    Exact up to 16 differences, beyond that over 20,000 draws (with the observed signs among them). It needs no normal
    distribution, only that a difference could as well have come with the other sign. NaN without any difference.
    """
    n = len(differences)
    if n == 0:
        return NAN
    values = np.abs(np.asarray(differences, dtype=float))
    observed = abs(math.fsum(differences))
    if n <= EXACT_SEEDS:
        signs = np.array(list(itertools.product((1, -1), repeat=n)))
        hits, draws = int((np.abs(signs @ values) >= observed - 1e-12).sum()), len(signs)
    else:
        signs = np.random.default_rng(seed).choice((1, -1), size=(DRAWS, n))
        hits, draws = int((np.abs(signs @ values) >= observed - 1e-12).sum()) + 1, DRAWS + 1
    return hits / draws


def power_of(difference: float, sd: float, n: int) -> float:
    """Chance that a paired t test at the 5 % level finds a true difference with n seeds."""
    if n < 2 or not sd > 0:
        return NAN
    critical, shift = float(t.ppf(1 - LEVEL / 2, n - 1)), abs(difference) / sd * math.sqrt(n)

    def found(scale: float) -> float:
        bound = critical * scale / math.sqrt(n - 1)  # the sd of the sample is scale / sqrt(n - 1) of the true one
        return float(chi.pdf(scale, n - 1) * (norm.cdf(shift - bound) + norm.cdf(-shift - bound)))

    return float(quad(found, *chi.ppf((1e-10, 1 - 1e-10), n - 1))[0])


def detectable(sd: float, n: int) -> float:
    """The smallest true difference that n seeds find with a chance of 80 %: where `power_of` is 0.8."""
    if n < 2 or not sd > 0:
        return NAN
    effect = brentq(lambda effect: power_of(effect, 1.0, n) - POWER, 1e-3, 100.0)
    return sd * cast(float, effect)


def seeds_needed(difference: float, sd: float) -> int | None:
    """The fewest seeds that find a true difference with a chance of 80 %; None beyond 10,000."""
    if not difference or not sd > 0:
        return None
    low, high = 1, 2
    while power_of(difference, sd, high) < POWER:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(difference, sd, middle) >= POWER else (middle, high)
    return high


def pooled_sd(groups: Sequence[tuple[float, int]]) -> float:
    """The common standard deviation of groups of (sd, n): variances weighed by n - 1; groups without one left out."""
    known = [(sd, n - 1) for sd, n in groups if n > 1 and not math.isnan(sd)]
    freedom = sum(weight for _, weight in known)
    return math.sqrt(sum(sd**2 * weight for sd, weight in known) / freedom) if freedom else NAN


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values up to each one: what was known by then."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [statistics.fmean(part) for part in parts]


def first_at(curve: Mapping[int, float], target: float) -> int | None:
    """The first step at which a curve reaches a value; None if it never does."""
    return next((step for step in sorted(curve) if curve[step] >= target - 1e-12), None)


def reach(
    ours: Mapping[int, Mapping[int, float]], theirs: Mapping[int, Mapping[int, float]], *, best: bool
) -> Reach | None:
    """Steps to the reference's last (or `best`) value over the reference's own steps to it, on the seeds of both.

    Curves are smoothed, by seed and step. Both counts are first crossings, so a method that is the reference has 1.
    None without a common seed with curves.
    """
    seeds = sorted(seed for seed in ours.keys() & theirs.keys() if ours[seed] and theirs[seed])
    if not seeds:
        return None
    shares = [share_of_steps(ours[seed], theirs[seed], best=best) for seed in seeds]
    known = [share for share in shares if share is not None]
    logs = mean_interval([math.log(share) for share in known]) if len(known) == len(seeds) else mean_interval([])
    whole = share_of_steps(
        mean_curve([ours[seed] for seed in seeds]), mean_curve([theirs[seed] for seed in seeds]), best=best
    )
    by_seed = Interval(*(math.exp(limit) for limit in logs))
    return Reach(NAN if whole is None else whole, len(known), len(seeds), by_seed)


def share_of_steps(ours: Mapping[int, float], theirs: Mapping[int, float], *, best: bool) -> float | None:
    """First crossing of the other curve's last (or best) value, over that curve's own first crossing of it."""
    if not theirs:
        return None
    target = max(theirs.values()) if best else theirs[max(theirs)]
    own, other = first_at(ours, target), first_at(theirs, target)
    assert other is not None
    return None if own is None else own / other


def mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean at the steps that all curves have."""
    steps = set.intersection(*(set(curve) for curve in curves))
    return {step: statistics.fmean(curve[step] for curve in curves) for step in sorted(steps)}
