"""Radar charts of evaluations of one benchmark: one axis per group that all models share, one polygon per model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from rest_rl.errors import UserError
from rest_rl.evaluate.harness import OVERALL
from rest_rl.evaluate.tables import Column, Summary, build_sections, column_scores, describe_prompt, group_by_edition
from rest_rl.jsonl import describe_os_error
from rest_rl.report.plots import FAINT, INK, save_figure, series_colors

MIN_AXES = 3
"""Fewer groups are drawn as bars."""
TICKS = (20, 40, 60, 80, 100)


class Accuracy(NamedTuple):
    accuracy: float
    low: float
    high: float


def draw_radars(summaries: Sequence[Summary], folder: str | Path) -> Iterator[str]:
    """Draw one figure per benchmark and pin (version of data and checker); yield its path, or why there is none."""
    editions = [[summary for _, summary in models] for models in group_by_edition(summaries)]
    for edition in editions:
        slug = "-".join(re.findall(r"[a-z0-9]+", str(edition[0].get("pin")).lower()))[:60]
        name = "radar.png" if len(editions) == 1 else f"radar-{edition[0]['benchmark']}-{slug}.png"
        if shared_columns(edition):
            yield str(draw_radar(edition, Path(folder) / name))
        else:
            many, single = "the evaluations share no group with a scored sample", "no sample was scored"
            yield f"no radar figure: {many if len(edition) > 1 else single} ({edition[0].get('pin')})"


def draw_radar(summaries: Sequence[Summary], path: str | Path) -> Path:
    """Draw each model's accuracy (headline metric) in the groups of `shared_columns`; return the path."""
    if not (columns := shared_columns(summaries)):
        raise UserError("the evaluations share no group", remedy="evaluate the same categories")
    (models,) = group_by_edition(summaries)
    metric = str((summaries[0].get("metrics") or ["correct"])[0])
    cells = {name: [column_scores(summary, column, metric) for column in columns] for name, summary in models}
    figure = Figure(figsize=(7.2, 6.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, and no display needed
    shares = {
        name: [Accuracy(cell["accuracy"], cell["low"], cell["high"]) for cell in own] for name, own in cells.items()
    }
    axes = (draw_polygons if len(columns) >= MIN_AXES else draw_bars)(
        figure, [column.label for column in columns], shares
    )
    prompts = {describe_prompt(summary) for summary in summaries}
    asked = prompts.pop() if len(prompts) == 1 else "prompts and formats differ"
    is_partial = any(cell["n"] < cell["of"] for own in cells.values() for cell in own)
    partial = "; not all samples evaluated" if is_partial else ""
    title = f"{summaries[0].get('pin')}\n{asked}; {metric} in per cent{partial}"
    figure.suptitle(escape_label(title), fontsize=9, color=INK)
    style = {"fontsize": 9, "frameon": False, "labelcolor": INK}
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2 if sum(map(len, cells)) < 70 else 1, **style)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return save_figure(figure, Path(path))
    except OSError as error:
        raise UserError(f"cannot write {path} ({describe_os_error(error)})", remedy="pass another path") from error


def shared_columns(summaries: Sequence[Summary]) -> list[Column]:
    """Return the columns of the groups that all evaluations scored, in the first evaluation's order; no totals."""
    if not summaries:
        raise UserError("no evaluations given", remedy="pass the folders of finished evaluations")
    if len(models := group_by_edition(summaries)) > 1:
        pins = ", ".join(str(edition[0][1].get("pin")) for edition in models)
        raise UserError(
            f"evaluations with different pins ({pins})", "comparable evaluations", "draw each pin separately"
        )
    is_bfcl = summaries[0].get("benchmark") == "bfcl"
    labels = {
        column.group: column._replace(label=f"{section.title} {column.label}" if is_bfcl else column.label)
        for section in build_sections(models[0])
        for column in section.columns
        if not column.is_average
    }
    groups = [(summary.get("groups") or {}) for summary in summaries]
    return [labels[name] for name in groups[0] if name != OVERALL and all(own.get(name, {}).get("n") for own in groups)]


def draw_polygons(figure: Figure, labels: Sequence[str], models: Mapping[str, Sequence[Accuracy]]) -> Axes:
    """Draw one closed line per model on radial axes from 0 (center) to 100."""
    axes = figure.add_subplot(projection="polar")
    assert isinstance(axes, PolarAxes)
    angles = [2 * math.pi * i / len(labels) for i in range(len(labels))]
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    for (name, own), color in zip(models.items(), series_colors(len(models)), strict=True):
        values = [100 * share.accuracy for share in own]
        style = {"color": color, "linewidth": 1.6, "marker": "."}
        axes.plot([*angles, angles[0]], [*values, values[0]], label=escape_label(name), **style)
        axes.fill(angles, values, color=color, alpha=0.16 / len(models))
    axes.set_ylim(0, 100)
    axes.set_yticks(TICKS, [str(tick) if tick < 100 else "" for tick in TICKS], fontsize=7, color=INK)
    axes.set_rlabel_position(180 / len(labels))
    axes.set_xticks(angles, [label.replace(" ", "\n", 1) if len(label) > 10 else label for label in labels])
    axes.tick_params(axis="x", pad=4, labelsize=8, labelcolor=INK)
    for text, angle in zip(axes.get_xticklabels(), angles, strict=True):  # align labels away from the circle
        across = math.sin(angle)
        text.set_horizontalalignment("center" if abs(across) < 0.1 else "left" if across > 0 else "right")
    axes.grid(color=FAINT, linewidth=0.6)
    axes.spines["polar"].set_color(FAINT)
    return axes


def draw_bars(figure: Figure, labels: Sequence[str], models: Mapping[str, Sequence[Accuracy]]) -> Axes:
    """Draw one bar per model in each group, with its 95 % interval."""
    axes = figure.add_subplot()
    width = 0.8 / len(models)
    for index, ((name, own), color) in enumerate(zip(models.items(), series_colors(len(models)), strict=True)):
        places = [i + (index - (len(models) - 1) / 2) * width for i in range(len(labels))]
        below = [max(0.0, 100 * (share.accuracy - share.low)) for share in own]
        above = [max(0.0, 100 * (share.high - share.accuracy)) for share in own]
        style = {"color": color, "label": escape_label(name), "ecolor": INK, "capsize": 3}
        axes.bar(places, [100 * share.accuracy for share in own], 0.9 * width, yerr=[below, above], **style)
    axes.set_xticks(range(len(labels)), labels, fontsize=9, color=INK)
    axes.set_xlim(-0.8, len(labels) - 0.2)
    axes.set_ylim(0, 100)
    axes.tick_params(labelsize=9, colors=INK, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return axes


def escape_label(name: str) -> str:
    """Escape a name for matplotlib: `$` would start a formula, and a leading `_` would hide the legend entry."""
    text = name.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
