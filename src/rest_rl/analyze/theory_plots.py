"""Pictures of the measured theory: variance by group size, gradient per uncertainty, the bound, what rules gain."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from rest_rl.analyze.palette import REGION_COLOURS, SERIES_COLOURS
from rest_rl.analyze.plots import FAINT, INK, legend_style, save
from rest_rl.analyze.probe_plots import new_axes, readable_percent, style
from rest_rl.analyze.theory import UNIFORM, Theory


def draw_theory(theory: Theory, folder: Path) -> list[Path]:
    """All pictures, as names within the folder."""
    drawn = {
        "group-size": draw_group_size(theory),
        "gradient-per-uncertainty": draw_regions(theory),
        "bound": draw_bound(theory),
        "rules": draw_rules(theory),
    }
    return [Path(save(figure, folder / f"{name}.png").name) for name, figure in drawn.items()]


def draw_group_size(theory: Theory) -> Figure:
    """Lemma 1: variance against G on logarithmic axes, relative to the smallest group, beside 1 / G."""
    figure, axes = new_axes(5.6, 3.2)
    for curve, colour in zip(theory.group_size, SERIES_COLOURS, strict=False):
        first = curve.variances[0].value
        if first > 0:
            values = [one.value / first for one in curve.variances]
            label = f"{curve.advantage}, slope {curve.slope.value:.2f}"
            axes.plot(curve.sizes, values, marker="o", markersize=4, color=colour, label=label)
    sizes = theory.group_size[0].sizes
    axes.plot(
        sizes, [sizes[0] / size for size in sizes], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label="1 / G"
    )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [f"G = {size}" for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(**{**legend_style(), "loc": "best"})
    style(axes, f"Lemma 1: variance within prompts, over that at G = {sizes[0]}")
    return figure


def draw_regions(theory: Theory) -> Figure:
    """E|s|² over 1 - exp(-H) by region: flat if uncertainty alone made gradients large."""
    rows = [row for row in theory.regions if row.square_per_bound.value > 0]
    figure, axes = new_axes(5.6, 3.0)
    values = [row.square_per_bound.value for row in rows]
    errors = [[min(row.square_per_bound.error, 0.9 * row.square_per_bound.value) for row in rows],
              [row.square_per_bound.error for row in rows]]  # fmt: skip
    axes.bar(range(len(rows)), values, 0.6, color=[REGION_COLOURS[row.region] for row in rows], yerr=errors,
             ecolor=INK, error_kw={"elinewidth": 0.9, "capsize": 2})  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [f"{row.region}\n{row.tokens:,}" for row in rows])
    style(axes, "E|s|² of a token per unit of 1 - exp(-H) (± one standard error; tokens below)")
    return figure


def draw_bound(theory: Theory) -> Figure:
    """Theorem 1: measured second moment and bound, a point per rule, on logarithmic axes."""
    figure, axes = new_axes(5.6, 3.4)
    measured = [chain.measured.value for chain in theory.bounds.values()]
    bounds = [chain.bound.value for chain in theory.bounds.values()]
    axes.scatter(measured, bounds, color=SERIES_COLOURS[0], s=18, zorder=3)
    for name, chain in theory.bounds.items():
        axes.annotate(name, (chain.measured.value, chain.bound.value), xytext=(5, 2), textcoords="offset points",
                      fontsize=7, color=INK)  # fmt: skip
    axes.set(xscale="log", yscale="log")
    ends = [min(measured), max(measured)]
    axes.plot(ends, ends, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("measured E|g|² of a response (dashed: bound = measured)", fontsize=8, color=INK)
    axes.margins(x=0.15)
    style(axes, "Theorem 1: bound against measured second moment, by rule")
    return figure


def draw_rules(theory: Theory) -> Figure:
    """Gains against uniform weights under Adam and for plain steps, norms capped."""
    rules = [rule for rule in theory.rules if rule.name != UNIFORM]
    figure, axes = new_axes(7.2, 1.0 + 0.28 * len(rules))
    kinds = (("under Adam", "eff_adam_gain", SERIES_COLOURS[0], -0.12), ("plain", "eff_gain", SERIES_COLOURS[3], 0.12))
    for name, field, colour, shift in kinds:
        readable = [readable_percent(getattr(rule.capped, field)) for rule in rules]
        axes.errorbar(
            [value for value, _ in readable], [at + shift for at in range(len(rules))],
            xerr=[2 * error for _, error in readable], fmt="o", color=colour, label=name, markersize=4, elinewidth=1.4,
        )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rules)), [rule.name for rule in rules])
    axes.invert_yaxis()
    axes.legend(**{**legend_style(), "loc": "best"})
    style(axes, "expected improvement per step against uniform weights, norms capped, per cent (± 2 errors)")
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.grid(visible=False, axis="y")
    return figure
