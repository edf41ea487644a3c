"""The metrics of a run so far, as means over windows with their standard errors.

A metric of one step is a mean over a batch of responses to prompts that were drawn anew, so steps scatter independently
about a slow trend. Half the mean square of successive differences estimates that scatter whatever the trend (von
Neumann, J. (1941), https://doi.org/10.1214/aoms/1177731677), and a window's error is the scatter over the square root
of its rows.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

WINDOW = 10
"""Rows of metrics in a window: few enough to warn early, and the error of a mean is a third of one row's scatter."""
SCATTER_ROWS = 10 * WINDOW
"""Rows that the scatter is estimated from."""


MAX_MAGNITUDE = 1e100
"""Beyond it a value counts as not finite: sums of squares would be."""
FALSE_ALARM_RATE = 1e-3
"""Chance of an alarm, over all pairs of separate windows, that `History.threshold` is made for."""


class WindowMean(NamedTuple):
    """A metric's mean over some steps, `error` its standard error."""

    value: float
    error: float
    first: int
    last: int

    def exceeds(self, limit: float, errors: float) -> bool:
        return self.value - errors * self.error > limit

    def is_above(self, other: WindowMean, errors: float, min_difference: float = 0.0) -> bool:
        """Whether it is larger by more than `least` and by more than so many standard errors of the difference."""
        return self.value - other.value > max(min_difference, errors * math.hypot(self.error, other.error))


class MetricSeries:
    """The finite numbers of one metric, in step order."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self._best, self._sum, self._moment = 0, 0.0, 0.0
        self._squares: deque[float] = deque(maxlen=SCATTER_ROWS)

    def add(self, step: int, value: float) -> None:
        """Append a number; keep track of the highest window that does not overlap the newest."""
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
        """Mean over the window that ends before row `end`, a shorter one among the first rows."""
        steps = self.steps[max(0, end - WINDOW) : end]
        return WindowMean(self._window(end) / len(steps), self.scatter() / math.sqrt(len(steps)), steps[0], steps[-1])

    def scatter(self) -> float:
        """Standard deviation of single rows about their trend."""
        return math.sqrt(math.fsum(self._squares) / (2 * len(self._squares))) if self._squares else 0.0

    def best_window(self) -> WindowMean | None:
        """The highest window apart from the newest, the first rows while there is none; None without any."""
        return self.window_mean(self._best) if self._best else self.first_window()

    def first_window(self) -> WindowMean | None:
        """The first window, or as many of its rows as are not in the newest; None without any."""
        end = min(WINDOW, len(self.values) - WINDOW)
        return self.window_mean(end) if end > 0 else None

    def fit_trend(self) -> tuple[float, float]:
        """What the least squares line through two rows or more has gained from first to last, and its error."""
        rows = len(self.values)
        squares = rows * (rows**2 - 1) / 12  # sum of (row - middle)^2
        slope = (self._moment - (rows - 1) / 2 * self._sum) / squares
        return slope * (rows - 1), self.scatter() / math.sqrt(squares) * (rows - 1)

    def _window(self, end: int) -> float:
        return math.fsum(self.values[max(0, end - WINDOW) : end])


class SecondMoment:
    """Adam's average of squared gradient norms, up to a factor, and the step that holds most of it."""

    def __init__(self, decay: float, max_norm: float) -> None:
        """`decay` is Adam's beta2; norms are clipped to `max_norm` first, unless it is 0."""
        self.decay, self.max_norm = decay, max_norm
        self.step, self.norm = 0, 0.0
        self._total, self._peak = 0.0, 0.0

    def add(self, step: int, norm: float) -> None:
        """Take in the gradient norm of a step."""
        square = min(norm, self.max_norm or math.inf) ** 2
        self._total, self._peak = self.decay * self._total + square, self.decay * self._peak
        if square > self._peak:
            self._peak, self.step, self.norm = square, step, norm

    @property
    def peak_share(self) -> float:
        """What the largest step holds of the whole."""
        return self._peak / self._total if self._total > 0 else 0.0


class History:
    """Rows of metrics and of evaluations, in step order."""

    def __init__(self, second_moment: SecondMoment) -> None:
        self.newest_row: Mapping[str, Any] = {}
        self.second_moment = second_moment
        self.evaluations: list[Mapping[str, Any]] = []
        self.repeated_steps: list[tuple[int, int]] = []
        """Steps of a row and of the next one, where that is not a later one."""
        self._series: dict[str, MetricSeries] = {}
        self._rows = 0

    @property
    def threshold(self) -> float:
        """Standard errors that a figure must pass its limit by: 6.0 in the first window, 5.0 at 60 rows, 6.2 at 1000.

        z = sqrt(2 ln(n^2 / 2 / CHANCE)) with n windows, for Gaussian tails exp(-z^2 / 2) and every pair of windows as a
        look; then Student's t in place of z, to first order z + (z^3 + z) / (4 v), since the scatter is an estimate
        too: von Neumann's has v = 2/3 of its differences as degrees of freedom.
        """
        windows = max(self._rows / WINDOW, math.sqrt(2))
        z = math.sqrt(2 * math.log(windows**2 / 2 / FALSE_ALARM_RATE))
        freedom = 2 / 3 * max(1, min(self._rows - 1, SCATTER_ROWS))
        return z + (z**3 + z) / (4 * freedom)

    @property
    def step(self) -> int:
        return step_of(self.newest_row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in one row of metrics; what is no finite number is left out."""
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
        """A metric with a full window and a number in the newest row."""
        series = self._series.get(key)
        is_current = series is not None and len(series.values) >= WINDOW and series.steps[-1] == self.step
        return series if is_current else None

    def newest_window(self, key: str) -> WindowMean | None:
        """The newest window."""
        series = self.current_series(key)
        return series.window_mean(len(series.values)) if series else None

    def first_window(self, key: str) -> WindowMean | None:
        """The first window, as far as the newest does not overlap it."""
        series = self.current_series(key)
        return series.first_window() if series else None

    def best_window(self, key: str) -> WindowMean | None:
        """The highest window that does not overlap the newest."""
        series = self.current_series(key)
        return series.best_window() if series else None

    def find_fall(self, key: str, min_difference: float = 0.0) -> tuple[WindowMean, WindowMean] | None:
        """The highest window and the newest one, if that is lower beyond noise and by more than `least`."""
        best, now = self.best_window(key), self.newest_window(key)
        return (best, now) if best and now and best.is_above(now, self.threshold, min_difference) else None

    def window_ending_at(self, key: str, step: int) -> WindowMean | None:
        """The window that ended with `step`."""
        series = self.current_series(key)
        end = bisect_right(series.steps, step) if series else 0
        return series.window_mean(end) if series and end else None

    def all_values(self, key: str) -> list[float]:
        return self._series[key].values if key in self._series else []

    def newest_values(self, key: str) -> list[float]:
        """The numbers of the newest window; none if it is not full."""
        series = self.current_series(key)
        return series.values[-WINDOW:] if series else []

    def find_labels(self, prefix: str) -> list[str]:
        """What follows the prefix in the names of metrics."""
        return [key.removeprefix(prefix) for key in self._series if key.startswith(prefix)]


def step_of(row: Mapping[str, Any]) -> int:
    """The step of a row, 0 where it has none."""
    step = row.get("step")
    return int(step) if has_finite_square(step) else 0


def has_finite_square(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a number whose square is finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_MAGNITUDE
