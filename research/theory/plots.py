"""Plots of the theory checks: variance by group size, gradient size by uncertainty, the bound, gains of the rules."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from research.theory.measure import Theory
from rest_rl.probe.rules import UNIFORM
from rest_rl.report.palette import REGION_COLORS, SERIES_COLORS
from rest_rl.report.plots import FAINT, INK, legend_style, new_axes, save_figure, style_bare_axes


def draw_theory(theory: Theory, folder: Path) -> list[Path]:
    """Draw all plots; return their names within the folder."""
    drawn = {
        "group-size": draw_group_size(theory),
        "gradient-per-uncertainty": draw_regions(theory),
        **({"bound": draw_bound(theory)} if theory.bounds else {}),
        "rules": draw_rules(theory),
    }
    return [Path(save_figure(figure, folder / f"{name}.png").name) for name, figure in drawn.items()]


def draw_group_size(theory: Theory) -> Figure:
    figure, axes = new_axes(5.6, 3.2)
    for curve, color in zip(theory.group_size, SERIES_COLORS, strict=False):
        first = curve.variances[0].value
        if first > 0:  # advantages that are 0 in every group have no curve
            values = [one.value / first for one in curve.variances]
            label = f"{curve.advantage}, slope {curve.slope.value:.2f}"
            axes.plot(curve.sizes, values, marker="o", markersize=4, color=color, label=label)
    sizes = theory.group_size[0].sizes
    axes.plot(
        sizes, [sizes[0] / size for size in sizes], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label="1 / G"
    )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [f"G = {size}" for size in sizes])
    halves = [2.0**-k for k in range(len(sizes) + 1)]
    axes.set_yticks(halves, [f"{half:g}" for half in halves])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.legend(**{**legend_style(), "loc": "best"})
    style_bare_axes(axes, f"Lemma 1: variance within prompts relative to G = {sizes[0]}")
    return figure


def draw_regions(theory: Theory) -> Figure:
    rows = [row for row in theory.regions if row.square_per_bound.value > 0]
    figure, axes = new_axes(5.6, 3.0)
    values = [row.square_per_bound.value for row in rows]
    # On a logarithmic axis a lower error bar must not reach 0.
    errors = [[min(row.square_per_bound.error, 0.9 * row.square_per_bound.value) for row in rows],
              [row.square_per_bound.error for row in rows]]  # fmt: skip
    axes.bar(range(len(rows)), values, 0.6, color=[REGION_COLORS[row.region] for row in rows], yerr=errors,
             ecolor=INK, error_kw={"elinewidth": 0.9, "capsize": 2})  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [f"{row.region}\n{row.tokens:,}" for row in rows])
    style_bare_axes(axes, "E|s|² / (1 - exp(-H)) by region (number of tokens below)")
    return figure


def draw_bound(theory: Theory) -> Figure:
    figure, axes = new_axes(6.4, 1.0 + 0.26 * len(theory.bounds))
    places = range(len(theory.bounds))
    measured = [chain.measured.value for chain in theory.bounds.values()]
    bounds = [chain.bound.value for chain in theory.bounds.values()]
    axes.hlines(places, measured, bounds, color=FAINT, linewidth=2, zorder=1)
    for name, values, color in (("measured", measured, SERIES_COLORS[0]), ("bound", bounds, SERIES_COLORS[1])):
        axes.plot(values, places, "o", color=color, label=name, markersize=5)
    axes.set_xscale("log")
    axes.set_yticks(places, list(theory.bounds))
    axes.invert_yaxis()
    axes.legend(**{**legend_style(), "loc": "best"})
    style_bare_axes(axes, "Theorem 1: second moment of a response's gradient", grid="x")
    return figure


def draw_rules(theory: Theory) -> Figure:
    rules = [rule for rule in theory.rules if rule.name != UNIFORM]
    figure, axes = new_axes(6.8, 1.2 + 0.3 * len(rules))
    axes.axvspan(-2, 2, color=FAINT, alpha=0.5, linewidth=0)
    kinds = (
        ("under Adam", SERIES_COLORS[0], "o", [rule.plain.adam_lead for rule in rules]),
        ("under Adam, norms capped", SERIES_COLORS[0], "x", [rule.capped.adam_lead for rule in rules]),
        ("plain", SERIES_COLORS[3], "o", [rule.plain.lead for rule in rules]),
        ("plain, norms capped", SERIES_COLORS[3], "x", [rule.capped.lead for rule in rules]),
    )
    for row, (name, color, marker, leads) in enumerate(kinds):
        values = [one.value / one.error if one.error > 0 else math.nan for one in leads]
        places = [at + 0.15 * (row - 1.5) for at in range(len(rules))]
        axes.plot(values, places, marker, color=color, label=name, markersize=4)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rules)), [rule.name for rule in rules])
    axes.invert_yaxis()
    axes.legend(**legend_style(), bbox_to_anchor=(1.01, 1.0))
    style_bare_axes(axes, "improvement per step: difference from uniform weights, in standard errors", grid="x")
    return figure
