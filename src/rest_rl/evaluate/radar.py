"""A picture of evaluations of one benchmark: an axis per group that all models share, a polygon per model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from rest_rl.errors import UserError
from rest_rl.evaluate.layout import OVERALL, Cell, Column, cell_of, column_labels, edition, how_asked, model_names
from rest_rl.jsonl import reason
from rest_rl.report.plots import FAINT, INK, colours, save

MIN_AXES = 3
"""Fewer make no polygon; they become bars."""
TICKS = (20, 40, 60, 80, 100)
LONG_LABEL, WIDE_LEGEND = 10, 70


def draw_radar(summaries: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw the accuracy of each model in the groups that all have, in per cent, headline metric; returns the file.

    ValueError without summaries, for several pins, or when the models share no group.
    """
    groups = shared_groups(summaries)
    if not groups:
        raise UserError("evaluations that share no group", "at least one", "evaluate the same categories")
    labels = column_labels(summaries[0], groups)
    metric = str((summaries[0].get("metrics") or ["correct"])[0])
    models = {
        name: [cell for group in groups if (cell := cell_of(summary, Column(group, (group,)), metric))]
        for name, summary in zip(model_names(summaries), summaries, strict=True)
    }
    figure = Figure(figsize=(7.2, 6.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    draw = draw_polygons if len(groups) >= MIN_AXES else draw_bars
    axes = draw(figure, labels, models)
    ways = list(dict.fromkeys(how_asked(summary) for summary in summaries))
    partial = "; a part of the samples only" if any(cell.is_partial for own in models.values() for cell in own) else ""
    asked = ways[0] if len(ways) == 1 else "prompts and formats differ"
    title = f"{summaries[0].get('pin')}\n{asked}; {metric} in per cent{partial}"
    figure.suptitle(plain(title), fontsize=9, color=INK)
    columns = 2 if sum(map(len, models)) < WIDE_LEGEND else 1
    style = {"fontsize": 9, "frameon": False, "labelcolor": INK}
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=columns, **style)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return save(figure, Path(path))
    except OSError as error:
        raise UserError(f"{path} ({reason(error)})", "a path to write to", "pass another") from error


def shared_groups(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The groups with a score in every summary, in the order of the first; not what sums them up.

    ValueError without summaries and for several pins.
    """
    if not summaries:
        raise UserError("no evaluation", "at least one", "pass the folders of finished evaluations")
    if len(editions := {edition(summary): summary.get("pin") for summary in summaries}) > 1:
        raise UserError(
            f"evaluations of {', '.join(map(str, editions.values()))}",
            "one: numbers of different pins do not compare",
            "draw them one by one",
        )
    return [
        str(name)
        for name in summaries[0].get("groups") or {}
        if name != OVERALL and all((summary.get("groups") or {}).get(name, {}).get("n") for summary in summaries)
    ]


def draw_polygons(figure: Figure, labels: Sequence[str], models: Mapping[str, Sequence[Cell]]) -> Axes:
    """One closed line per model over a circle of axes, from 0 in the middle to 100."""
    axes = figure.add_subplot(projection="polar")
    assert isinstance(axes, PolarAxes)
    angles = [2 * math.pi * i / len(labels) for i in range(len(labels))]
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    for (name, own), colour in zip(models.items(), colours(len(models)), strict=True):
        values = [100 * cell.accuracy for cell in own]
        axes.plot(
            [*angles, angles[0]], [*values, values[0]], color=colour, linewidth=1.6, marker=".", label=plain(name)
        )
        axes.fill(angles, values, color=colour, alpha=0.16 / len(models))
    axes.set_ylim(0, 100)
    axes.set_yticks(TICKS, [str(tick) if tick < 100 else "" for tick in TICKS], fontsize=7, color=INK)
    axes.set_rlabel_position(180 / len(labels))
    axes.set_xticks(angles, [in_lines(label) for label in labels], fontsize=8, color=INK)
    axes.tick_params(axis="x", pad=4)
    for text, angle in zip(axes.get_xticklabels(), angles, strict=True):
        text.set_horizontalalignment(side_of(angle))
    axes.grid(color=FAINT, linewidth=0.6)
    axes.spines["polar"].set_color(FAINT)
    return axes


def in_lines(label: str) -> str:
    """A long label in two lines."""
    return label.replace(" ", "\n", 1) if len(label) > LONG_LABEL else label


def side_of(angle: float) -> Literal["left", "center", "right"]:
    """How a label beside the circle is aligned, so that it grows away from it."""
    across = math.sin(angle)
    return "center" if abs(across) < 0.1 else "left" if across > 0 else "right"


def draw_bars(figure: Figure, labels: Sequence[str], models: Mapping[str, Sequence[Cell]]) -> Axes:
    """A bar per model in each group, with its interval."""
    axes = figure.add_subplot()
    width = 0.8 / len(models)
    for index, ((name, own), colour) in enumerate(zip(models.items(), colours(len(models)), strict=True)):
        places = [i + (index - (len(models) - 1) / 2) * width for i in range(len(labels))]
        values = [100 * cell.accuracy for cell in own]
        sides = [
            [max(0.0, 100 * (cell.accuracy - (cell.accuracy if cell.low is None else cell.low))) for cell in own],
            [max(0.0, 100 * ((cell.accuracy if cell.high is None else cell.high) - cell.accuracy)) for cell in own],
        ]
        axes.bar(places, values, 0.9 * width, color=colour, label=plain(name), yerr=sides, ecolor=INK, capsize=3)
    axes.set_xticks(range(len(labels)), labels, fontsize=9, color=INK)
    axes.set_xlim(-0.8, len(labels) - 0.2)
    axes.set_ylim(0, 100)
    axes.tick_params(labelsize=9, colors=INK, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return axes


def plain(name: str) -> str:
    """A name as matplotlib shows it: `$` starts no formula, a leading `_` does not hide it from the legend."""
    text = name.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
