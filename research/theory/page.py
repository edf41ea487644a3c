"""Show the results of the theory checks: tables, findings in words, the Markdown page, the JSON object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research.theory.estimates import GradientFigures, critical_value
from research.theory.group_size import FIXED_BASELINE
from research.theory.measure import RuleFigures, Theory
from research.theory.optimal_weights import NO_SPREAD_NOTE, ClosedFormCheck, RegionOptimum
from research.theory.token_bounds import spearman
from rest_rl.probe.page import (
    DASH,
    Table,
    format_estimate,
    format_percent,
    hide_noisy_cosine,
    hide_noisy_ratio,
    to_plain,
)
from rest_rl.probe.rules import UNIFORM
from rest_rl.probe.variance import Estimate
from rest_rl.report.tables import markdown_table

SLOPE_TOLERANCE, MAX_SLOPE_ERROR = 0.05, 0.1
"""Distance of a slope from -1, and its error, up to which the slope agrees with -1."""
NOTES = {
    "Lemma 1": "Trace of the covariance of one prompt's gradient, within prompts, for groups of G responses. The "
    f"lemma predicts a slope of -1, which the {FIXED_BASELINE} has by construction. Everywhere, ± is one standard "
    "error over prompts (jackknife).",
    "Lemma 2": "E|s|²: expected squared norm of a token's gradient in all parameters, over all tokens of the "
    "vocabulary.",
    "Theorem 1": "E|g|² of one response's gradient A / T Σ w s, and its bound A_max² L² Σ w² (1 - exp(-H)) / T². The "
    "looseness is the product of four factors: the largest advantage instead of each response's, uncorrelated tokens, "
    "the largest gain L² instead of each token's, and 1 - exp(-H) instead of 1 - Σp². The errors treat L² as fixed.",
    "Theorem 2": "Second moment of the gradient relative to uniform weights: the theorem's prediction, and the "
    "measurement on prompts that the weights were not computed from.",
    "Rules": "For a step of {batch}. eff: expected improvement per step of fixed length, <E g, t> / sqrt(E|g|² "
    "|t|²), where t is the gradient of the expected reward; Adam: the same after Adam's scaling of each coordinate. "
    "Gains compare a rule with uniform weights on the same responses, with and without the norm cap. Largest: the "
    "largest share of one prompt in the squared norms.",
}


def build_tables(theory: Theory) -> list[Table]:
    """Build the tables of all parts."""
    return [
        build_lemma_one_table(theory),
        Table(
            "Lemma 2: uncertainty by region",
            ("region", "tokens", "entropy (nats)", "1 - Σp²", "1 - exp(-H)"),
            [
                (row.region, str(row.tokens), *(format_estimate(x, 4) for x in (row.entropy, row.collision, row.bound)))
                for row in theory.regions
            ],
        ),
        Table(
            "Lemma 2: squared gradient of a token by region",
            ("region", "share %", "E|s|²", "E|s|² / (1 - exp(-H))"),
            [
                (
                    row.region,
                    f"{100 * row.share:.1f}",
                    format_significant(row.square),
                    format_significant(row.square_per_bound),
                )
                for row in theory.regions
            ],
        ),
        *(build_bound_tables(theory) if theory.bounds else []),
        *(build_optimum_tables(theory, theory.optimum) if theory.optimum else []),
        *build_rule_tables(theory.rules),
    ]


def build_lemma_one_table(theory: Theory) -> Table:
    sizes = theory.group_size[0].sizes
    return Table(
        "Lemma 1: variance within prompts by group size",
        ("advantage", *(f"G = {size}" for size in sizes), "slope"),
        [
            (curve.advantage, *(format_significant(x) for x in curve.variances), format_estimate(curve.slope, 2))
            for curve in theory.group_size
        ],
    )


def build_bound_tables(theory: Theory) -> list[Table]:
    return [
        Table(
            "Theorem 1: bound and measured second moment",
            ("rule", "E|g|²", "bound", "looseness"),
            [
                (name, format_significant(chain.measured), format_significant(chain.bound), f"{chain.looseness:.3g}")
                for name, chain in theory.bounds.items()
            ],
        ),
        Table(
            "Theorem 1: the factors of the looseness",
            ("rule", "largest advantage", "uncorrelated tokens", "largest gain", "entropy bound"),
            [
                (
                    name,
                    *(format_significant(x) for x in (chain.advantage, chain.cross_terms, chain.gain, chain.entropy)),
                )
                for name, chain in theory.bounds.items()
            ],
        ),
    ]


def build_optimum_tables(theory: Theory, optimum: RegionOptimum) -> list[Table]:
    regions = list(next(iter(optimum.weights.values())))
    return [
        Table(
            "Theorem 2: region weights of mean 1",
            ("solution", *regions),
            [
                (name, *(f"{weights[region] / mean_weight(theory, weights):.3g}" for region in regions))
                for name, weights in optimum.weights.items()
            ],
        ),
        Table(
            "Theorem 2: second moment relative to uniform weights",
            ("solution", "predicted", "measured"),
            [
                (name, f"{optimum.predicted[name]:.3g}", format_significant(optimum.second_moment[name]))
                for name in optimum.weights
            ],
        ),
    ]


def mean_weight(theory: Theory, weights: dict[str, float]) -> float:
    """Return the mean weight of a token, given the weight of each region."""
    shares = {row.region: row.share for row in theory.regions}
    return sum(shares[region] * weight for region, weight in weights.items()) / sum(shares[r] for r in weights)


def build_rule_tables(rules: Sequence[RuleFigures]) -> list[Table]:
    labels = list(rules[0].weights)
    return [
        Table(
            "Rules: mean weight by region", ("rule", *labels),
            [(rule.name, *(f"{rule.weights[label]:.2f}" for label in labels)) for rule in rules],
        ),
        Table(
            "Rules: variance and direction",
            ("rule", "variance", "|mean|²", "var/|mean|²", "cosine"),
            [(rule.name, *direction_cells(rule.plain)) for rule in rules],
        ),
        Table(
            "Rules: expected improvement per step",
            ("rule", "eff", "eff, Adam", "largest %"),
            [
                (
                    rule.name,
                    format_estimate(rule.plain.eff, 3),
                    format_estimate(rule.plain.eff_adam, 4),
                    format_whole_percent(rule.plain.largest_share),
                )
                for rule in rules
            ],
        ),
        Table(
            "Rules: difference from uniform weights in standard errors",
            ("rule", "plain", "Adam", "plain, capped", "Adam, capped"),
            [
                (rule.name, *(format_lead(x) for own in (rule.plain, rule.capped) for x in (own.lead, own.adam_lead)))
                for rule in rules
                if rule.name != UNIFORM
            ],
        ),
        Table(
            "Rules: gain over uniform weights in %",
            ("rule", "plain", "Adam", "plain, capped", "Adam, capped"),
            [
                (
                    rule.name,
                    *(
                        format_percent(x, sign="+")
                        for own in (rule.plain, rule.capped)
                        for x in (own.eff_gain, own.eff_adam_gain)
                    ),
                )
                for rule in rules
                if rule.name != UNIFORM
            ],
        ),
    ]  # fmt: skip


def direction_cells(own: GradientFigures) -> tuple[str, ...]:
    return (
        *(format_significant(x) for x in (own.variance, own.mean_square, hide_noisy_ratio(own.ratio))),
        format_estimate(hide_noisy_cosine(own.cosine), 2),
    )


def format_whole_percent(share: float) -> str:
    """Return `42`, or a dash for NaN."""
    return f"{100 * share:.0f}" if math.isfinite(share) else DASH


def format_significant(estimate: Estimate) -> str:
    """Return `0.0123 ± 0.0045`, rounded to the second digit of the error, or a dash if undefined."""
    if not math.isfinite(estimate.value) or not estimate.error > 0 or math.isinf(estimate.error):
        return format_estimate(estimate, 3)
    # log10 of the error gives its first digit; one more digit is kept.
    return format_estimate(estimate, min(6, max(0, 1 - math.floor(math.log10(estimate.error)))))


def format_lead(lead: Estimate) -> str:
    """Return a lead over uniform weights in units of its standard error, or a dash if the error is 0."""
    return f"{lead.value / lead.error:+.1f}" if lead.error > 0 else format_estimate(Estimate(math.nan, math.nan), 1)


def findings(theory: Theory) -> list[str]:
    """Return sentences on where theory and measurement agree and where they differ."""
    return [
        *lemma_findings(theory),
        *(theorem_one_findings(theory) if theory.bounds else []),
        closed_form_finding(theory.closed_form),
        NO_SPREAD_NOTE if theory.optimum is None else optimum_finding(theory.optimum, critical_value(theory.pilot)),
        *rule_findings(theory.rules, critical_value(theory.blocks)),
    ]


def lemma_findings(theory: Theory) -> list[str]:
    errors = critical_value(theory.pilot)
    lines = [
        f"Lemma 1 {judge_slope(curve.slope, errors)} for the advantage {curve.advantage}: the slope is "
        f"{format_estimate(curve.slope, 2)}, the lemma predicts -1"
        for curve in theory.group_size
        if curve.advantage != FIXED_BASELINE
    ]
    own = theory.lemma_two
    state = "holds on all" if own.violations == 0 else f"fails on {own.violations} of"
    lines.append(
        f"Lemma 2 {state} {own.tokens} tokens; 1 - Σp² is {own.tightness:.0%} of 1 - exp(-H). The mean |e_y - p|² of "
        f"the sampled tokens differs from 1 - Σp² by {own.z:+.1f} standard errors"
        + ("" if abs(own.z) < 4 else ": the tokens were not drawn from this policy at temperature 1")
    )
    if (found := theory.contrast) is not None:
        times = f"{math.exp(found.log_ratio.value):.2g} times"
        lines.append(
            f"The size of a token's gradient is not proportional to its uncertainty: E|s|² / (1 - exp(-H)) is {times} "
            f"as large in {found.high} as in {found.low}"
            if found.is_sure
            else "The data do not decide whether the size of a token's gradient is proportional to its uncertainty: "
            f"E|s|² / (1 - exp(-H)) is {times} as large in {found.high} as in {found.low}, which may be chance"
        )
        lines[-1] += f". Spearman's rank correlation of both over tokens is {theory.rank_correlation:.2f}"
    return lines


def judge_slope(slope: Estimate, errors: float) -> str:
    """Return whether a slope agrees with the lemma's -1; a large error leaves it undecided."""
    # A slope that differs significantly is no failure of the lemma within the tolerance, and a slope close to -1 is no
    # confirmation if its error is large.
    off = abs(slope.value + 1)
    if off > max(errors * slope.error, SLOPE_TOLERANCE):
        return "fails"
    return "holds" if slope.error < MAX_SLOPE_ERROR else "is undecided"


def theorem_one_findings(theory: Theory) -> list[str]:
    chains = list(theory.bounds.values())
    broken = [name for name, chain in theory.bounds.items() if chain.looseness < 1]
    loosest = [chain.looseness for chain in chains]
    held = f"fails for {'; '.join(broken)}" if broken else f"holds for all {len(chains)} rules"
    measured, bound = ([getattr(chain, name).value for chain in chains] for name in ("measured", "bound"))
    uniform = theory.bounds[UNIFORM]
    parts = {"advantages": uniform.advantage, "the gain": uniform.gain, "entropy": uniform.entropy}
    costs = ", ".join(f"{estimate.value:.2g} from {name}" for name, estimate in parts.items())
    line = (
        f"The bound of Theorem 1 {held} and is {min(loosest):.2g} to {max(loosest):.2g} times the measured second "
        f"moment (uniform weights: {costs}; cross terms {uniform.cross_terms.value:.2f}). Across rules, bound and "
        f"measurement have a rank correlation of {spearman(measured, bound):.2f}"
    )
    return [line]


def closed_form_finding(check: ClosedFormCheck) -> str:
    # Either sign counts: above 0 scipy stopped early, below 0 the closed form would not be the minimum.
    worst = max(abs(check.entropy_excess), abs(check.gradient_excess))
    return f"The closed form of Theorem 2 agrees with scipy's minimum within {worst:.0e} on {check.responses} responses"


def optimum_finding(optimum: RegionOptimum, errors: float) -> str:
    closed = optimum.second_moment["closed form"]
    promised = optimum.predicted["closed form"]
    differ = abs(closed.value - promised) > errors * closed.error
    return (
        f"By region, Theorem 2 predicts {promised:.3g} times the second moment under uniform weights; on other prompts "
        f"it is {format_significant(closed)} times{': theory and measurement differ' if differ else ''}. Cross terms "
        f"between regions contribute {format_percent(optimum.cross_share)} % of the second moment"
    )


def rule_findings(rules: Sequence[RuleFigures], errors: float) -> list[str]:
    lines = []
    # Ratios whose error exceeds their value divide by noise and cannot be ranked.
    known = [rule for rule in rules if 0 < rule.plain.ratio.error < rule.plain.ratio.value]
    if known:
        calmest, best = min(known, key=lambda rule: rule.plain.ratio.value), max(rules, key=eff_adam_or_neg_inf)
        lines.append(
            f"{calmest.name} has the smallest variance / |mean|² (eff under Adam "
            f"{format_estimate(calmest.plain.eff_adam, 3)}); {best.name} has the largest eff under Adam "
            f"({format_estimate(best.plain.eff_adam, 3)})"
        )
    if len(known) < len(rules):
        lines.append(
            f"For {len(rules) - len(known)} of {len(rules)} rules the mean gradient cannot be distinguished from "
            "noise; measure more prompts"
        )
    for kind, field in (("under Adam", "adam_lead"), ("under plain gradient ascent", "lead")):
        for word, sign in (("beat", 1), ("trail", -1)):
            sure = [rule.name for rule in rules if is_resolved(rule, field, sign, errors)]
            lines.append(f"Rules that {word} uniform weights {kind} by more than {errors:.1f} standard errors, with "
                         f"and without the norm cap: {'; '.join(sure) or 'none'}")  # fmt: skip
    if dominated := [rule.name for rule in rules if rule.plain.is_dominated]:
        lines.append(
            f"WARNING: one prompt contributes more than half of the squared norm under {', '.join(dominated)}; use "
            "the figures with capped norms instead, or measure more prompts"
        )
    return lines


def is_resolved(rule: RuleFigures, field: str, sign: int, errors: float) -> bool:
    """Return whether a lead has this sign by more than `errors` standard errors, both with and without the norm cap."""
    leads: list[Estimate] = [getattr(own, field) for own in (rule.plain, rule.capped)]
    return rule.name != UNIFORM and all(sign * lead.value > errors * lead.error for lead in leads)


def eff_adam_or_neg_inf(rule: RuleFigures) -> float:
    value = rule.plain.eff_adam.value
    return value if math.isfinite(value) else -math.inf


def render_page(title: str, what: str, theory: Theory, batch: int, pictures: Sequence[Path]) -> str:
    """Return the Markdown page; `pictures` are paths relative to the page."""
    parts = [f"# {title}", what, "\n".join(f"* {line}." for line in findings(theory))]
    parts += [f"![]({path.as_posix()})" for path in pictures]
    tables = build_tables(theory)
    for name, reading in NOTES.items():
        own = [table for table in tables if table.title.startswith(f"{name}: ")]
        if own:
            parts += [f"## {name}", reading.format(batch="1 prompt" if batch == 1 else f"{batch} prompts")]
        for table in own:
            caption = table.title.removeprefix(f"{name}: ")
            parts += [f"**{caption.capitalize()}**", markdown_table(table.header, table.rows)]
    return "\n\n".join(parts) + "\n"


def to_mapping(theory: Theory, settings: Any) -> dict[str, Any]:
    """Return the results as values for JSON, with each estimate as a pair [value, error]."""
    return {"settings": to_plain(settings), **to_plain(theory), "findings": findings(theory)}
