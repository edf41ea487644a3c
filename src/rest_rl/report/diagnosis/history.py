"""The metrics of a run so far, as means over windows with their standard errors.

A metric of one step is a mean over responses to newly drawn prompts, so steps scatter independently around a slow
trend. Half the mean square of successive differences estimates that scatter independently of the trend (von Neumann, J.
(1941), https://doi.org/10.1214/aoms/1177731677). The standard error of a window's mean is the scatter divided by the
square root of the number of rows.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

WINDOW = 10
"""Rows of metrics in a window: few enough to warn early, enough for means with a third of the scatter of one row."""
SCATTER_ROWS = 10 * WINDOW

# Larger values count as not finite, because sums of their squares would overflow.
MAX_MAGNITUDE = 1e100
# Accepted chance of a false alarm per metric, over all pairs of separate windows; see `History.threshold`.
FALSE_ALARM_RATE = 1e-3


class WindowMean(NamedTuple):
    """The mean of a metric over the steps `first` to `last`, and the standard error of that mean."""

    value: float
    error: float
    first: int
    last: int

    def exceeds(self, limit: float, errors: float) -> bool:
        """Return whether the mean is above `limit` by more than `errors` standard errors."""
        return self.value - errors * self.error > limit

    def is_above(self, other: WindowMean, errors: float, min_difference: float = 0.0) -> bool:
        """Return whether the mean exceeds `other` by `min_difference` and by `errors` standard errors of both means."""
        return self.value - other.value > max(min_difference, errors * math.hypot(self.error, other.error))


class MetricSeries:
    """The finite values of one metric, in step order."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self._best, self._sum, self._moment = 0, 0.0, 0.0
        self._squares: deque[float] = deque(maxlen=SCATTER_ROWS)

    def add(self, step: int, value: float) -> None:
        """Append a value, and update the position of the highest window that does not overlap the newest window."""
        if self.values:
            self._squares.append((value - self.values[-1]) ** 2)
        self._sum += value
        self._moment += len(self.values) * value
        self.steps.append(step)
        self.values.append(value)
        end = len(self.values) - WINDOW
        if end >= WINDOW and (not self._best or self._window(end) > self._window(self._best)):
            self._best = end

    def window_mean(self, end: int) -> WindowMean:
        """Return the mean over the `WINDOW` rows before row `end`, or over fewer rows near the start."""
        steps = self.steps[max(0, end - WINDOW) : end]
        return WindowMean(self._window(end) / len(steps), self.scatter() / math.sqrt(len(steps)), steps[0], steps[-1])

    def scatter(self) -> float:
        """Return the standard deviation of single values around their slow trend."""
        return math.sqrt(math.fsum(self._squares) / (2 * len(self._squares))) if self._squares else 0.0

    def best_window(self) -> WindowMean | None:
        """Return the highest mean over a window that does not overlap the newest; `first_window()` if none exists."""
        return self.window_mean(self._best) if self._best else self.first_window()

    def first_window(self) -> WindowMean | None:
        """Return the mean over the first window, without rows that are also in the newest; None if that leaves none."""
        end = min(WINDOW, len(self.values) - WINDOW)
        return self.window_mean(end) if end > 0 else None

    def fit_trend(self) -> tuple[float, float]:
        """Return the rise of the least-squares line from the first row to the last, with its standard error."""
        # The x axis is the row number, so all sums have closed forms and the cost per call is constant. Needs two rows.
        rows = len(self.values)
        squares = rows * (rows**2 - 1) / 12  # sum of (row - middle)^2
        slope = (self._moment - (rows - 1) / 2 * self._sum) / squares
        return slope * (rows - 1), self.scatter() / math.sqrt(squares) * (rows - 1)

    def _window(self, end: int) -> float:
        return math.fsum(self.values[max(0, end - WINDOW) : end])


class SecondMoment:
    """Adam's average of squared gradient norms, up to a constant factor, and the step that contributes most to it."""

    def __init__(self, decay: float, max_norm: float) -> None:
        """Start at zero. `decay` is Adam's beta2. Norms are clipped to `max_norm` first; 0 means no clipping."""
        self.decay, self.max_norm = decay, max_norm
        self.step, self.norm = 0, 0.0
        self._total, self._peak = 0.0, 0.0

    def add(self, step: int, norm: float) -> None:
        # The total and the peak decay alike, so the peak stays the largest term until a new square exceeds it: no
        # history of norms is needed.
        square = min(norm, self.max_norm or math.inf) ** 2
        self._total, self._peak = self.decay * self._total + square, self.decay * self._peak
        if square > self._peak:
            self._peak, self.step, self.norm = square, step, norm

    @property
    def peak_share(self) -> float:
        """The largest share that a single step contributes to the average."""
        return self._peak / self._total if self._total > 0 else 0.0


class History:
    """The rows of metrics and of evaluations so far, in the order in which they were logged."""

    def __init__(self, second_moment: SecondMoment) -> None:
        self.newest_row: Mapping[str, Any] = {}
        self.second_moment = second_moment
        self.evaluations: list[Mapping[str, Any]] = []
        self.repeated_steps: list[tuple[int, int]] = []
        """Pairs of successive rows whose steps do not increase: (step before, step after)."""
        self._series: dict[str, MetricSeries] = {}
        self._rows = 0

    @property
    def threshold(self) -> float:
        """Standard errors by which a mean must pass its limit for a finding: 6.0 in the first window, 5.0 at row 60."""
        # Every pair of windows is a test, n^2 / 2 of them with n windows. A Gaussian tail of about exp(-z^2 / 2) gives
        # the Bonferroni limit z = sqrt(2 ln(n^2 / 2 / FALSE_ALARM_RATE)). The scatter is itself an estimate, so
        # Student's t replaces z, to first order t = z + (z^3 + z) / (4 v). Von Neumann's estimate has about 2/3 of the
        # number of differences as degrees of freedom v, so t is high at first, falls, and then grows with ln n.
        windows = max(self._rows / WINDOW, math.sqrt(2))
        z = math.sqrt(2 * math.log(windows**2 / 2 / FALSE_ALARM_RATE))
        freedom = 2 / 3 * max(1, min(self._rows - 1, SCATTER_ROWS))
        return z + (z**3 + z) / (4 * freedom)

    @property
    def step(self) -> int:
        return step_of(self.newest_row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add one row of metrics; values that are not finite numbers are left out."""
        if self._rows and step_of(row) <= self.step:
            self.repeated_steps.append((self.step, step_of(row)))
        self.newest_row = row
        self._rows += 1
        for key, value in row.items():
            if has_finite_square(value):
                self._series.setdefault(key, MetricSeries()).add(self.step, float(value))
        if has_finite_square(norm := row.get("grad_norm")):
            self.second_moment.add(self.step, float(norm))

    def current_series(self, key: str) -> MetricSeries | None:
        """Return the series of a metric if its values fill a window and the newest row has one, else None."""
        series = self._series.get(key)
        is_current = series is not None and len(series.values) >= WINDOW and series.steps[-1] == self.step
        return series if is_current else None

    def newest_window(self, key: str) -> WindowMean | None:
        """Return the mean of a metric over the newest window; None if `current_series` is None."""
        series = self.current_series(key)
        return series.window_mean(len(series.values)) if series else None

    def first_window(self, key: str) -> WindowMean | None:
        """Return the mean of a metric over its first window, without rows that are also in the newest window."""
        series = self.current_series(key)
        return series.first_window() if series else None

    def best_window(self, key: str) -> WindowMean | None:
        """Return the highest mean of a metric over a window that does not overlap the newest window."""
        series = self.current_series(key)
        return series.best_window() if series else None

    def find_fall(self, key: str, min_difference: float = 0.0) -> tuple[WindowMean, WindowMean] | None:
        """Return the highest and the newest window mean if the newest is lower by both noise and `min_difference`."""
        best, now = self.best_window(key), self.newest_window(key)
        return (best, now) if best and now and best.is_above(now, self.threshold, min_difference) else None

    def window_ending_at(self, key: str, step: int) -> WindowMean | None:
        """Return the mean of a metric over the window that ended at `step`; None if there is none."""
        series = self.current_series(key)
        end = bisect_right(series.steps, step) if series else 0
        return series.window_mean(end) if series and end else None

    def all_values(self, key: str) -> list[float]:
        return self._series[key].values if key in self._series else []

    def newest_values(self, key: str) -> list[float]:
        """Return the values of a metric in the newest window; empty if the window is not full."""
        series = self.current_series(key)
        return series.values[-WINDOW:] if series else []

    def find_labels(self, prefix: str) -> list[str]:
        """Return the names of all metrics that start with `prefix`, without the prefix."""
        return [key.removeprefix(prefix) for key in self._series if key.startswith(prefix)]


def step_of(row: Mapping[str, Any]) -> int:
    """Return the step of a row; 0 if it has none."""
    step = row.get("step")
    return int(step) if has_finite_square(step) else 0


def has_finite_square(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_MAGNITUDE
