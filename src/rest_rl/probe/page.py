"""A probe in words: tables for the terminal and for Markdown, the page, the JSON object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rest_rl.probe.advice import Advice, advice_on, verdict
from rest_rl.probe.figures import GroupTokens, Probe, RegionFacts, RuleFacts
from rest_rl.probe.variance import Estimate
from rest_rl.report.palette import REGION_COLOURS, SERIES_COLOURS
from rest_rl.report.plots import INK, bare_style, legend_style, new_axes, save
from rest_rl.report.tables import markdown_table
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


DASH = "–"
FAR = 9.995
"""Relative figures beyond ±999 % are not worth their digits."""
READING = (
    "± is one standard error over prompts (jackknife). |g|²: share of the squared norm of the policy gradient. Signal: "
    "share of the first-order improvement of the expected reward, from pairs of different prompts. SNR: squared mean "
    "over variance of one prompt's gradient. Differs: how often the best and the worst response to a prompt differ in "
    'the region. AUC: how well "the region differs" tells "the reward differs" between two responses to a prompt; 0.5 '
    "tells nothing."
)
RULES_READING = (
    "Against uniform weights on the same responses: improvement per step of given length, under Adam and under plain "
    "gradient ascent; cosine of the mean gradient to that of the expected reward; variance / |mean|² of a step's "
    "gradient (less is not by itself better, since weights turn the gradient, too). The rules `permuted` are controls: "
    "the weights of `rest`, dealt to regions by chance. – stands where the prompts do not determine a figure."
)


class Table(NamedTuple):
    """What the terminal and the page show alike."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def format_table(probes: Sequence[Probe]) -> Table:
    """The formats side by side."""
    rows = []
    for probe in probes:
        own, advice = probe.sampled, advice_on(probe)
        rest = next(rule for rule in probe.rules if rule.name == "rest")
        scores = (f"{100 * own.exact_match:.1f}", f"{100 * own.s_format:.1f}", f"{100 * own.no_spread:.1f}")
        cut = f"{100 * own.truncated:.1f}"
        rows.append((probe.format, *scores, cut, in_percent(rest.adam_gain, sign="+"), advice.preset, advice.sureness))
    header = ("format", "exact %", "S_format %", "no spread %", "cut off %", "rest, Adam %", "preset", "how sure")
    return Table("formats", header, rows)


def probe_tables(probe: Probe) -> list[Table]:
    """Tokens, signal, weights and rules of one format."""
    labels, step = list(probe.regions), numbered(probe.prompts_per_step, "prompt")
    return [
        Table(
            f"{probe.format}: tokens",
            ("region", "tokens", "share %", "entropy (nats)", "p90", "1 - Σp²"),
            [token_row(label, facts) for label, facts in probe.regions.items()],
        ),
        Table(
            f"{probe.format}: signal",
            ("region", "|g|² %", "signal %", "SNR", "differs %", "AUC"),
            [signal_row(label, facts) for label, facts in probe.regions.items()],
        ),
        Table(
            f"{probe.format}: mean weight by rule",
            ("rule", *labels),
            [(rule.name, *(f"{rule.weights[label]:.2f}" for label in labels)) for rule in probe.rules],
        ),
        Table(
            f"{probe.format}: predicted improvement per step of {step}, against uniform",
            ("rule", "Adam %", "plain %", "cosine", "var/|mean|²"),
            [rule_row(rule) for rule in probe.rules],
        ),
    ]


def token_row(label: str, facts: RegionFacts) -> tuple[str, ...]:
    """What a region's tokens are like."""
    own = facts.tokens
    entropy, collision = in_digits(own.entropy, 3), in_digits(own.collision, 3)
    return (label, str(own.number), in_percent(own.share), entropy, f"{own.entropy_p90:.3f}", collision)


def signal_row(label: str, facts: RegionFacts) -> tuple[str, ...]:
    """What a region means for reward and gradient."""
    gradient, differences = facts.gradient, facts.differences
    shares = (in_percent(gradient.norm_share), in_percent(gradient.signal_share), in_digits(gradient.snr, 4))
    return (label, *shares, in_percent(differences.best_worst), in_digits(differences.auc, 2))


def rule_row(rule: RuleFacts) -> tuple[str, ...]:
    """What a rule is predicted to do."""
    gains = (in_percent(rule.adam_gain, sign="+"), in_percent(rule.gain, sign="+"))
    return (rule.name, *gains, in_digits(bounded(rule.cosine), 2), in_digits(unless_lost(rule.noise_ratio), 1))


def unless_lost(ratio: Estimate) -> Estimate:
    """Not defined for a ratio with an error beyond itself: what it divides by is not told from 0."""
    return ratio if ratio.error <= ratio.value else Estimate(math.nan, math.nan)


def bounded(cosine: Estimate) -> Estimate:
    """Not defined for a figure in [-1, 1] with an error beyond 1."""
    return cosine if cosine.error <= 1 else Estimate(math.nan, math.nan)


def numbered(number: int, noun: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def in_digits(estimate: Estimate, digits: int, sign: str = "") -> str:
    """`0.42 ± 0.03`; a dash where the data do not determine it or its error."""
    if not math.isfinite(estimate.value) or not math.isfinite(estimate.error):
        return DASH
    value = round(estimate.value, digits) + 0.0  # no -0.0
    return f"{value:{sign}.{digits}f} ± {estimate.error:.{digits}f}"


def in_percent(estimate: Estimate, sign: str = "") -> str:
    """`42 ± 3`; a dash where it is not defined, or so noisy that its digits say nothing."""
    if not abs(estimate.value) < FAR or not estimate.error < FAR:
        return DASH
    digits = 0 if estimate.error >= 0.02 else 1
    return in_digits(Estimate(100 * estimate.value, 100 * estimate.error), digits, sign)


def sampled_line(probe: Probe) -> str:
    """What was sampled, in one line."""
    own = probe.sampled
    return (
        f"{probe.format}: {own.prompts} prompts × {own.group_size} responses of {own.mean_tokens:.0f} tokens; exact "
        f"match {own.exact_match:.1%}, S_acc {own.s_acc:.3f}, S_format {own.s_format:.3f}; no spread in "
        f"{own.no_spread:.1%} of groups, {own.truncated:.1%} of responses cut off"
    )


def gradient_line(probe: Probe) -> str:
    """Of what the gradients were taken."""
    part = "all" if probe.coordinates == probe.parameters else f"{probe.coordinates:,} random ones of"
    return (
        f"Gradients of {part} {probe.parameters:,} parameters, progress {probe.progress:g}; SNR of one prompt "
        f"{in_digits(probe.snr, 4)}, the heaviest prompt makes {probe.heaviest:.0%} of the squared norm."
    )


def page(title: str, probes: Sequence[Probe], pictures: Mapping[str, Sequence[Path]]) -> str:
    """The Markdown page; `pictures` by format, as paths relative to it."""
    parts = [f"# {title}"]
    if len(probes) > 1:
        formats = format_table(probes)
        parts.append(markdown_table(formats.header, formats.rows))
    for probe in probes:
        parts += [
            f"## {probe.format}",
            sampled_line(probe) + ".",
            bullets(verdict(probe)),
            advice_text(advice_on(probe)),
        ]
        parts += [f"![]({path.as_posix()})" for path in pictures.get(probe.format, ())]
        tables = probe_tables(probe)
        for table in tables:
            parts += [f"### {table.title.partition(': ')[2].capitalize()}", markdown_table(table.header, table.rows)]
        parts += [READING, RULES_READING, gradient_line(probe)]
    return "\n\n".join(parts) + "\n"


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"* {line}" for line in lines)


def advice_text(advice: Advice) -> str:
    """The recommendation as a paragraph of Markdown."""
    return f"**Recommendation ({advice.sureness}): {advice.what}.** {advice.why}"


def plain_advice_text(advice: Advice) -> str:
    """The same for the terminal."""
    return advice_text(advice).replace("**", "")


def as_mapping(probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """The probes as JSON objects: an estimate is [value, error]."""
    return [
        {**plain(probe), "verdict": verdict(probe), "recommendation": advice_on(probe)._asdict()} for probe in probes
    ]


def plain(value: Any) -> Any:
    """Dataclasses and named tuples as mappings, an estimate as a pair."""
    if isinstance(value, Estimate):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: plain(item) for key, item in value._asdict().items()}  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
