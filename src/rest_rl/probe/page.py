"""Show a probe report as tables, as a Markdown page, as plots and as a JSON object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib.figure import Figure

from rest_rl.probe.report import Advice, EnvironmentFacts, ProbeReport
from rest_rl.probe.variance import Estimate
from rest_rl.report.palette import REGION_COLORS, SERIES_COLORS
from rest_rl.report.plots import INK, legend_style, new_axes, save_figure, style_bare_axes
from rest_rl.report.tables import markdown_table
from rest_rl.response import Region

MAX_VIOLIN_TOKENS = 20_000
"""Tokens of a region from which its violin is drawn."""
MAX_PLOTTED_VALUE = 5.0
"""Relative figures beyond ±500 % are left out of the plots, where they would squeeze all others."""
DASH = "–"
MAX_TABLE_VALUE = 9.995
"""Relative figures beyond ±999 % show as a dash in the tables."""
REGIONS_NOTE = (
    "± is one standard error over prompts (jackknife). |g|²: share of the squared norm of the policy gradient. Signal: "
    "share of the first-order improvement of the expected reward, estimated from pairs of different prompts. SNR: "
    "squared mean divided by variance of one prompt's gradient. Differs: how often the best and the worst response to "
    'a prompt differ in the region. AUC: how well "the region differs" predicts "the reward differs" for two responses '
    "to a prompt; 0.5 is chance."
)
RULES_NOTE = (
    "Compared with uniform weights on the same responses. Adam, plain: predicted improvement per step of fixed length "
    "under Adam and under plain gradient ascent. Cosine: between the mean gradient and the gradient of the expected "
    "reward. var/|mean|²: noise of a step's gradient; less noise is not better by itself, because weights also turn "
    "the gradient. The rules `permuted` are controls: the weights of `rest`, assigned to regions at random. A dash (–) "
    "means that the prompts do not determine the figure."
)


class Table(NamedTuple):
    """A table for the terminal and for the page."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def build_formats_table(reports: Sequence[ProbeReport]) -> Table:
    """Build the table that compares the reports of several tool-call formats."""
    rows = []
    for report in reports:
        own, advice = report.sampled, report.advice
        shares = (own.exact_match, own.s_format, own.no_spread, own.truncated)
        rest = next(rule for rule in report.rules if rule.name == "rest")
        gain = format_percent(rest.adam_gain, sign="+")
        rows.append((report.format, *(f"{100 * share:.1f}" for share in shares), gain, advice.preset, advice.sureness))
    header = ("format", "exact %", "S_format %", "no spread %", "cut off %", "rest, Adam %", "preset", "how sure")
    return Table("formats", header, rows)


def build_tables(report: ProbeReport) -> list[Table]:
    """Build the tables of one format: tokens, signal, weights and rules."""
    tokens, signal = [], []
    for label, (own, differences, gradient) in report.regions.items():
        entropy, collision = format_estimate(own.entropy, 3), format_estimate(own.collision, 3)
        tokens.append((label, str(own.number), format_percent(own.share), entropy, f"{own.entropy_p90:.3f}", collision))
        shares = (
            format_percent(gradient.norm_share),
            format_percent(gradient.signal_share),
            format_estimate(gradient.snr, 4),
        )
        signal.append((label, *shares, format_percent(differences.best_worst), format_estimate(differences.auc, 2)))
    weights = [(rule.name, *(f"{rule.weights[label]:.2f}" for label in report.regions)) for rule in report.rules]
    rules = []
    for rule in report.rules:
        gains = (format_percent(rule.adam_gain, sign="+"), format_percent(rule.gain, sign="+"))
        noise = format_estimate(hide_noisy_ratio(rule.noise_ratio), 1)
        rules.append((rule.name, *gains, format_estimate(hide_noisy_cosine(rule.cosine), 2), noise))
    prompts = f"{report.prompts_per_step} prompt{'s' * (report.prompts_per_step > 1)}"
    step = f"predicted gain over uniform weights per step of {prompts}"
    parts = {
        "tokens": (("region", "tokens", "share %", "entropy (nats)", "p90", "1 - Σp²"), tokens),
        "signal": (("region", "|g|² %", "signal %", "SNR", "differs %", "AUC"), signal),
        "mean weight by rule": (("rule", *report.regions), weights),
        step: (("rule", "Adam %", "plain %", "cosine", "var/|mean|²"), rules),
    }
    return [Table(f"{report.format}: {title}", header, rows) for title, (header, rows) in parts.items()]


def render_page(title: str, reports: Sequence[ProbeReport], pictures: Mapping[str, Sequence[Path]]) -> str:
    """Return the Markdown page; `pictures` are paths relative to the page, by format."""
    parts = [f"# {title}"]
    if len(reports) > 1:
        formats = build_formats_table(reports)
        parts.append(markdown_table(formats.header, formats.rows))
    for report in reports:
        verdict = "\n".join(f"* {remark.text}" for remark in report.verdict)
        parts += [f"## {report.format}", f"{describe_samples(report)}.", verdict, format_advice(report.advice)]
        parts += [f"![]({path.as_posix()})" for path in pictures.get(report.format, ())]
        for table in build_tables(report):
            parts += [f"### {table.title.partition(': ')[2].capitalize()}", markdown_table(table.header, table.rows)]
        parts += [REGIONS_NOTE, RULES_NOTE, describe_gradients(report)]
    return "\n\n".join(parts) + "\n"


def describe_samples(report: ProbeReport) -> str:
    """Describe the sampled responses in one sentence."""
    own = report.sampled
    if report.environment is not None:
        return describe_rollouts(report, report.environment)
    return (
        f"{report.format}: {own.prompts} prompts × {own.group_size} responses of {own.mean_tokens:.0f} tokens; exact "
        f"match {own.exact_match:.1%}, S_acc {own.s_acc:.3f}, S_format {own.s_format:.3f}; no "
        f"spread of rewards in {own.no_spread:.1%} of groups, {own.truncated:.1%} of responses cut off"
    )


def describe_rollouts(report: ProbeReport, world: EnvironmentFacts) -> str:
    own = report.sampled
    return (
        f"{report.format}: {own.prompts} tasks of {world.name} × {own.group_size} rollouts of {world.turns:.1f} turns, "
        f"{world.calls:.1f} calls and {own.mean_tokens:.0f} sampled tokens; success {world.success:.1%}, mean reward "
        f"{own.reward:.3f}, {own.s_format:.1%} of the turns readable; no advantages in {own.no_spread:.1%} of groups, "
        f"{world.turn_limit:.1%} of rollouts reached the turn limit, {own.truncated:.1%} cut off; credit {world.credit}"
    )


def describe_gradients(report: ProbeReport) -> str:
    """Describe which parameters the gradients cover and how noisy they are."""
    part = "all" if report.coordinates == report.parameters else f"{report.coordinates:,} random entries of"
    return (
        f"Gradients of {part} {report.parameters:,} trained parameters at progress {report.progress:g}. "
        f"One prompt has an SNR of {format_estimate(report.snr, 4)}; the largest one contributes "
        f"{report.heaviest:.0%} of the squared norm."
    )


def format_advice(advice: Advice) -> str:
    return f"**Recommendation ({advice.sureness}): {advice.what}.** {advice.why}"


def format_estimate(estimate: Estimate, digits: int, sign: str = "") -> str:
    """Return `0.42 ± 0.03`, or a dash if the data do not determine the value or its error."""
    if not math.isfinite(estimate.value) or not math.isfinite(estimate.error):
        return DASH
    value = round(estimate.value, digits) + 0.0  # no -0.0
    return f"{value:{sign}.{digits}f} ± {estimate.error:.{digits}f}"


def format_percent(estimate: Estimate, sign: str = "") -> str:
    """Return `42 ± 3`, or a dash if the share is undefined or too large to be meaningful."""
    if not abs(estimate.value) < MAX_TABLE_VALUE or not estimate.error < MAX_TABLE_VALUE:
        return DASH
    digits = 0 if estimate.error >= 0.02 else 1
    return format_estimate(Estimate(100 * estimate.value, 100 * estimate.error), digits, sign)


def hide_noisy_ratio(ratio: Estimate) -> Estimate:
    """Return NaN for a ratio whose error exceeds its value: its divisor cannot be distinguished from 0."""
    return ratio if ratio.error <= ratio.value else Estimate(math.nan, math.nan)


def hide_noisy_cosine(cosine: Estimate) -> Estimate:
    """Return NaN for a cosine whose error exceeds 1."""
    return cosine if cosine.error <= 1 else Estimate(math.nan, math.nan)


def to_mapping(report: ProbeReport) -> dict[str, Any]:
    """Return the report as values for JSON, with each estimate as a pair [value, error]."""
    hidden = {"tokens", *(["environment"] if report.environment is None else [])}
    names = [field.name for field in dataclasses.fields(report) if field.name not in hidden]
    figures = {name: to_plain(getattr(report, name)) for name in names}
    return {**figures, "verdict": [remark.text for remark in report.verdict], "recommendation": report.advice._asdict()}


def to_plain(value: Any) -> Any:
    """Turn dataclasses and named tuples into mappings, and estimates into pairs, recursively."""
    if isinstance(value, Estimate):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: to_plain(item) for key, item in value._asdict().items()}  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def draw_probe(report: ProbeReport, folder: Path) -> list[Path]:
    """Draw the plots of one format; return their names within the folder."""
    stem = "".join(character if character.isalnum() else "-" for character in report.format)
    facts, rules = report.regions.values(), report.rules[1:]
    drawn = {
        "entropy": draw_entropies(report),
        "shares": draw_estimates(
            f"{report.format}: share by region in % (± 1 standard error)",
            list(report.regions),
            {
                "tokens": [own.tokens.share for own in facts],
                "squared gradient norm": [own.gradient.norm_share for own in facts],
                "reward signal": [own.gradient.signal_share for own in facts],
            },
        ),
        "rules": draw_estimates(
            f"{report.format}: predicted gain over uniform weights in % (± 2 standard errors)",
            [rule.name for rule in rules],
            {"under Adam": [rule.adam_gain for rule in rules], "plain": [rule.gain for rule in rules]},
            errors=2,
        ),
    }
    return [Path(save_figure(figure, folder / f"{stem}-{name}.png").name) for name, figure in drawn.items()]


def draw_entropies(report: ProbeReport) -> Figure:
    # Figure 4 of the paper.
    figure, axes = new_axes(7.2, 3.2)
    codes = {region.label: region for region in Region}
    for at, (label, facts) in enumerate(report.regions.items()):
        own_T = np.sort(report.tokens.entropies_T[report.tokens.regions_T == codes[label]])
        # Every k-th of the sorted entropies keeps the shape of the distribution.
        drawn_T = own_T[:: math.ceil(len(own_T) / MAX_VIOLIN_TOKENS)]
        if np.ptp(drawn_T) == 0:  # the kernel density of equal values is singular
            axes.plot([at - 0.35, at + 0.35], [drawn_T[0]] * 2, color=REGION_COLORS[label], linewidth=2)
        else:
            violin = axes.violinplot(drawn_T, positions=[at], widths=0.8, showextrema=False, points=200, bw_method=0.15)
            for body in cast(list[Any], violin["bodies"]):
                body.set(facecolor=REGION_COLORS[label], alpha=0.75, edgecolor="none")
        axes.plot([at], [facts.tokens.entropy.value], marker="o", color=INK, markersize=4, zorder=4)
        axes.plot([at], [np.quantile(own_T, 0.9)], marker="_", color=INK, markersize=10, zorder=4)
    names = [f"{label}\n{facts.tokens.number:,}" for label, facts in report.regions.items()]
    axes.set_xticks(range(len(names)), names)
    style_bare_axes(axes, f"{report.format}: token entropy by region in nats (● mean, – 90th percentile; tokens below)")
    return figure


def draw_estimates(
    title: str, names: Sequence[str], series: Mapping[str, Sequence[Estimate]], errors: float = 1.0
) -> Figure:
    figure, axes = new_axes(7.2, 1.0 + 0.32 * len(names))
    for index, (label, estimates) in enumerate(series.items()):
        percents_X2 = 100 * np.array(estimates)
        # A NaN fails the comparison too, and matplotlib skips NaN.
        percents_X2[~(np.abs(percents_X2) < 100 * MAX_PLOTTED_VALUE).all(1)] = math.nan
        places = np.arange(len(names)) + 0.24 * (index - (len(series) - 1) / 2)
        axes.errorbar(
            percents_X2[:, 0], places, xerr=errors * percents_X2[:, 1], fmt="o", label=label, markersize=4,
            color=SERIES_COLORS[3 * index % len(SERIES_COLORS)], elinewidth=1.4,
        )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.legend(**{**legend_style(), "loc": "best"})
    style_bare_axes(axes, title, grid="x")
    return figure
