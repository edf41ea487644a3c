"""A probe in words: tables for the terminal and for Markdown, the page, the JSON object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rest_rl.analyze.estimates import Estimate
from rest_rl.analyze.probe import Probe, RegionFacts, RuleFacts
from rest_rl.analyze.probe_advice import Advice, advice_on, verdict
from rest_rl.analyze.tables import markdown_table

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
