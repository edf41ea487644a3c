"""Pictures of a probe: entropy by region, where tokens, gradient and signal are, what each rule is predicted to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rest_rl.analyze.estimates import Estimate
from rest_rl.analyze.palette import REGION_COLOURS, SERIES_COLOURS
from rest_rl.analyze.plots import INK, bare_style, legend_style, new_axes, save
from rest_rl.analyze.probe import GroupTokens, Probe
from rest_rl.response import Region

DRAWN_TOKENS = 20_000
"""Of a region, for the shape of its violin."""
UNREADABLE = 5.0
"""Relative figures beyond ± 500 % would leave the others no room."""


def draw_probe(probe: Probe, tokens: Sequence[GroupTokens], folder: Path) -> list[Path]:
    """The pictures of one format, as names within the folder."""
    stem = "".join(character if character.isalnum() else "-" for character in probe.format)
    drawn = {"entropy": draw_entropies(probe, tokens), "shares": draw_shares(probe), "rules": draw_rules(probe)}
    paths = [save(figure, folder / f"{stem}-{name}.png") for name, figure in drawn.items()]
    return [Path(path.name) for path in paths]


def draw_entropies(probe: Probe, tokens: Sequence[GroupTokens]) -> Figure:
    """The distribution of the token entropies of each region, its mean as a mark (Figure 4 of the paper)."""
    labels, (figure, axes) = list(probe.regions), new_axes(7.2, 3.2)
    regions_T = np.concatenate([group.regions_T for group in tokens])
    entropies_T = np.concatenate([group.entropies_T for group in tokens])
    by_label = {region.label: np.sort(entropies_T[regions_T == region]) for region in Region}
    for at, label in enumerate(labels):
        own_T = by_label[label]
        drawn_T = own_T[:: math.ceil(len(own_T) / DRAWN_TOKENS)]
        draw_violin(axes, at, drawn_T, REGION_COLOURS[label])
        mean = probe.regions[label].tokens.entropy.value
        axes.plot([at], [mean], marker="o", color=INK, markersize=4, zorder=4)
        axes.plot([at], [np.quantile(own_T, 0.9)], marker="_", color=INK, markersize=10, zorder=4)
    axes.set_xticks(range(len(labels)), [f"{label}\n{probe.regions[label].tokens.number:,}" for label in labels])
    bare_style(axes, f"{probe.format}: token entropy by region, nats (● mean, – 90th percentile; tokens below)")
    return figure


def draw_violin(axes: Axes, at: float, values_T: np.ndarray, colour: str) -> None:
    """The shape of a distribution; values that are all the same have none and are a line."""
    if np.ptp(values_T) == 0:
        axes.plot([at - 0.35, at + 0.35], [values_T[0]] * 2, color=colour, linewidth=2)
        return
    drawn = axes.violinplot(values_T, positions=[at], widths=0.8, showextrema=False, points=200, bw_method=0.15)
    for body in cast(list[Any], drawn["bodies"]):
        body.set(facecolor=colour, alpha=0.75, edgecolor="none")


def draw_shares(probe: Probe) -> Figure:
    """Shares of tokens, squared gradient norm and signal by region, with their standard errors."""
    labels, (figure, axes) = list(probe.regions), new_axes(7.2, 3.2)
    facts = [probe.regions[label] for label in labels]
    series = {
        "tokens": [one.tokens.share for one in facts],
        "squared gradient norm": [one.gradient.norm_share for one in facts],
        "reward signal": [one.gradient.signal_share for one in facts],
    }
    for index, (name, estimates) in enumerate(series.items()):
        places = [at + 0.27 * (index - 1) for at in range(len(labels))]
        readable = [readable_percent(estimate) for estimate in estimates]
        values, errors = [value for value, _ in readable], [error for _, error in readable]
        axes.bar(places, values, 0.25, color=SERIES_COLOURS[(5, 3, 0)[index]], label=name, yerr=errors, ecolor=INK,
                 error_kw={"elinewidth": 0.9, "capsize": 2})  # fmt: skip
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels)
    axes.legend(**{**legend_style(), "loc": "best"})
    bare_style(axes, f"{probe.format}: share by region, per cent (± one standard error)")
    return figure


def draw_rules(probe: Probe) -> Figure:
    """The predicted improvement of each rule against uniform weights, under Adam and under plain gradient ascent."""
    rules = probe.rules[1:]
    figure, axes = new_axes(7.2, 1.0 + 0.28 * len(rules))
    kinds = (("under Adam", "adam_gain", SERIES_COLOURS[0], -0.12), ("plain", "gain", SERIES_COLOURS[3], 0.12))
    for name, field, colour, shift in kinds:
        readable = [readable_percent(getattr(rule, field)) for rule in rules]
        places = [at + shift for at in range(len(rules))]
        values, errors = [value for value, _ in readable], [2 * error for _, error in readable]
        axes.errorbar(values, places, xerr=errors, fmt="o", color=colour, label=name, markersize=4, elinewidth=1.4)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rules)), [rule.name for rule in rules])
    axes.invert_yaxis()
    axes.legend(**{**legend_style(), "loc": "best"})
    bare_style(axes, f"{probe.format}: predicted gain over uniform weights, per cent (± 2 standard errors)", grid="x")
    return figure


def readable_percent(estimate: Estimate) -> tuple[float, float]:
    """(value, error) in per cent; NaN where a figure is not defined or beyond reading."""
    value, error = estimate
    if not abs(value) < UNREADABLE or not error < UNREADABLE:
        return math.nan, math.nan
    return 100 * value, 100 * error
