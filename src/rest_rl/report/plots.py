"""Plots of runs as small PNG files: learning curves, evaluations, entropy and weight by region, parts of the reward.

Each group of runs is one line with its spread over seeds. Region plots have one panel per group, all on one scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rest_rl.report.palette import REGION_COLORS, SERIES_COLORS
from rest_rl.report.tables import (
    Curve,
    RunGroup,
    evaluation_curve,
    headline_key,
    headline_turn,
    metric_curve,
    running_mean,
)

REGION_METRIC = "rest/{quantity}/{region}"
LEARNING_METRICS = {
    "reward": "reward",
    "rest/accuracy": "S_acc",
    "rest/format": "S_format",
    "rest/exact_match": "exact match",
    "rest/exact_match_answers": "exact match, answer turns",
}
REWARD_METRICS = {
    "reward": ("reward", SERIES_COLORS[0]),
    "rest/accuracy": ("S_acc", SERIES_COLORS[1]),
    "rest/format": ("S_format", SERIES_COLORS[2]),
    "frac_reward_zero_std": ("groups with equal rewards", SERIES_COLORS[3]),
    "completions/clipped_ratio": ("truncated", SERIES_COLORS[4]),
    "rest/call_rate": ("responses with a call", SERIES_COLORS[5]),
}
"""The reward, its parts, and what limits learning: groups with equal rewards, truncation, the call rate."""
MAX_PANELS = 4
INK, FAINT = "#2b2b2b", "#d9d9d9"


def draw_all(groups: Sequence[RunGroup], folder: Path) -> dict[str, Path]:
    """Draw every plot for which the runs have values, and return the files by title."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "Learning": draw_learning(groups, folder / "learning.png"),
        "Held-out slice during training": draw_evaluations(groups, folder / "evaluations.png"),
        "Entropy by region": draw_panels(groups, region_keys("entropy"), "entropy in nats", folder / "entropy.png"),
        "Weight by region": draw_panels(
            groups, region_keys("weight"), "gradient weight", folder / "weights.png", level=1.0
        ),
        "Share of tokens by region": draw_panels(
            groups, region_keys("share"), "share of tokens", folder / "shares.png"
        ),
        "Parts of the reward": draw_panels(groups, REWARD_METRICS, "reward and shares", folder / "reward.png"),
    }
    return {title: path for title, path in drawn.items() if path}


def region_keys(quantity: str) -> dict[str, tuple[str, str]]:
    return {
        REGION_METRIC.format(quantity=quantity, region=region): (region, color)
        for region, color in REGION_COLORS.items()
    }


def draw_learning(groups: Sequence[RunGroup], path: Path) -> Path | None:
    runs = [run for group in groups for run in group.runs]
    titles = {headline_key(runs, key): title for key, title in LEARNING_METRICS.items()}
    keys = {key: title for key, title in titles.items() if any(metric_curve(group.runs, key).steps for group in groups)}
    # If call turns are not logged separately, the headline covers all turns: a panel of answer turns would repeat it.
    if "rest/exact_match" in keys:
        keys.pop("rest/exact_match_answers", None)
    if not keys:
        return None
    figure, panels = new_figure(len(keys))
    for axes, (key, title) in zip(panels, keys.items(), strict=True):
        for group, color in zip(groups, series_colors(len(groups)), strict=True):
            draw_curve(axes, metric_curve(group.runs, key), color, group.label)
        style_axes(axes, f"{title}, call turns" if key.endswith("_calls") else title)
    if len(groups) > 1:
        panels[0].legend(**legend_style())
    return save_figure(figure, path)


def draw_evaluations(groups: Sequence[RunGroup], path: Path) -> Path | None:
    # The band is the spread over the runs of a group; for a single run it is the standard error over prompts.
    if not any(run.evaluations for group in groups for run in group.runs):
        return None
    figure, panels = new_figure(2, share=True)
    turn = headline_turn(row for group in groups for run in group.runs for row in run.evaluations)
    for axes, greedy in zip(panels, (True, False), strict=True):
        for group, color in zip(groups, series_colors(len(groups)), strict=True):
            draw_curve(axes, evaluation_curve(group.runs, turn, greedy=greedy), color, group.label, smooth=False)
        what = "exact match, call turns" if turn else "exact match"
        style_axes(axes, f"{what}, {'greedy' if greedy else 'sampled at T = 1'}")
    if len(groups) > 1:
        panels[0].legend(**legend_style())
    return save_figure(figure, path)


def draw_panels(
    groups: Sequence[RunGroup],
    keys: Mapping[str, tuple[str, str]],
    title: str,
    path: Path,
    *,
    level: float | None = None,
) -> Path | None:
    curves = [(group, {key: line for key in keys if (line := metric_curve(group.runs, key)).steps}) for group in groups]
    drawable = [(group, lines) for group, lines in curves if lines][:MAX_PANELS]
    if not drawable:
        return None
    figure, panels = new_figure(len(drawable), share=True)
    for axes, (group, lines) in zip(panels, drawable, strict=True):
        for key, line in lines.items():
            label, color = keys[key]
            draw_curve(axes, line, color, label)
        if level is not None:
            axes.axhline(level, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        style_axes(axes, f"{title}: {group.label}" if len(groups) > 1 else title)
    panels[-1].legend(**legend_style(), bbox_to_anchor=(1.01, 1.0))
    return save_figure(figure, path)


def new_figure(panels: int, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a white figure with panels in a row, without touching the global state of matplotlib."""
    figure = white_figure(max(5.2, 3.1 * panels + 1.0), 3.0)
    grid = figure.subplots(1, panels, squeeze=False, sharey=share)
    return figure, list(grid[0])


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = white_figure(width, height)
    return figure, figure.subplots()


def white_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curve(axes: Axes, line: Curve, color: str, label: str, *, smooth: bool = True) -> None:
    """Draw the smoothed mean over the raw mean, with a band for the spread over runs.

    Missing steps leave a gap in the line. Without smoothing, every step has a marker.
    """
    if not line.steps:
        return
    window = len(line.steps) // 8 | 1 if smooth else 1
    breaks = find_gaps(line.steps)
    steps = with_gaps(line.steps, breaks)
    if window > 1:
        axes.plot(steps, with_gaps(line.mean, breaks), color=color, linewidth=0.7, alpha=0.25)
    mean = with_gaps(running_mean(line.mean, window), breaks)
    marker = "." if len(line.steps) == 1 or not smooth else ""
    axes.plot(steps, mean, color=color, linewidth=1.8, label=label, marker=marker)
    if line.low != line.high:
        low, high = (with_gaps(running_mean(side, window), breaks) for side in (line.low, line.high))
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


def find_gaps(steps: Sequence[int]) -> list[int]:
    """Return the positions of the steps that follow a gap: more than four times the smallest distance between steps."""
    distances = [after - before for before, after in pairwise(steps)]
    usual = min(distances, default=1)
    return [i for i, distance in enumerate(distances, start=1) if distance > 4 * usual]


def with_gaps(values: Sequence[float], breaks: Sequence[int]) -> list[float]:
    """Return the values with a NaN before each position in `breaks`, where matplotlib then interrupts the line."""
    return [item for i, value in enumerate(values) for item in ((math.nan, value) if i in breaks else (value,))]


def style_axes(axes: Axes, title: str) -> None:
    style_bare_axes(axes, title, grid="both")
    axes.set_xlabel("step", fontsize=8, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.margins(x=0.02)


def style_bare_axes(axes: Axes, title: str, grid: Literal["x", "y", "both"] = "y") -> None:
    """Set a title on the left, a light grid, and no box."""
    axes.set_title(title, loc="left", fontsize=9, color=INK, fontweight="bold")
    axes.grid(axis=grid, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)


def legend_style() -> Mapping[str, Any]:
    return {"fontsize": 8, "frameon": False, "labelcolor": INK, "handlelength": 1.4, "loc": "upper left"}


def series_colors(count: int) -> list[str]:
    return [SERIES_COLORS[i % len(SERIES_COLORS)] for i in range(count)]


def save_figure(figure: Figure, path: Path) -> Path:
    figure.savefig(path, format="png", facecolor="white")
    return path
