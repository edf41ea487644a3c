"""The measured theory in words: tables for the terminal and for Markdown, findings, the page, the JSON object."""

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
"""How far a slope may be from -1, and how large its error may be, to be called -1."""
NOTES = {
    "Lemma 1": "Trace of the covariance of one prompt's gradient, within prompts, for groups of G responses. The "
    f"lemma's slope is -1, which the {FIXED_BASELINE} has by construction. ± is one standard error over prompts "
    "(jackknife), here as everywhere.",
    "Lemma 2": "E|s|²: the expected squared norm of a token's gradient over all tokens that could have come, in all "
    "parameters.",
    "Theorem 1": "E|g|² of one response's gradient A / T Σ w s, and its bound A_max² L² Σ w² (1 - exp(-H)) / T². The "
    "factors, whose product is the looseness: the largest advantage for each one's own, tokens taken as uncorrelated, "
    "the largest gain L² for each token's, and 1 - exp(-H) for 1 - Σp². The errors hold L² fixed.",
    "Theorem 2": "Second moment of the gradient relative to uniform weights: what the theorem expects, and what is "
    "measured on prompts that the weights were not computed from.",
    "Rules": "For a step of {batch}. eff: expected improvement per step of given length, <E g, t> / sqrt(E|g|² "
    "|t|²), t the gradient of the expected reward; Adam: after its scaling by coordinate. Gains are against uniform "
    "weights on the same responses, with the norms of prompts as they are and capped. Largest: the heaviest prompt's "
    "share of the squared norms.",
}


def build_tables(theory: Theory) -> list[Table]:
    """One table or two for each part of the theory."""
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
    """Variance by group size."""
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
    """Theorem 1 and what its looseness is made of."""
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
            ("rule", "advantage", "uncorrelated", "gain", "entropy"),
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
    """The solutions of Theorem 2: their weights by region, and what they make of the second moment."""
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
            ("solution", "expected", "measured"),
            [
                (name, f"{optimum.predicted[name]:.3g}", format_significant(optimum.second_moment[name]))
                for name in optimum.weights
            ],
        ),
    ]


def mean_weight(theory: Theory, weights: dict[str, float]) -> float:
    """The token mean of region weights."""
    shares = {row.region: row.share for row in theory.regions}
    return sum(shares[region] * weight for region, weight in weights.items()) / sum(shares[r] for r in weights)


def build_rule_tables(rules: Sequence[RuleFigures]) -> list[Table]:
    """Figures of every rule, and the gains with and without the norm cap."""
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
            "Rules: lead over uniform weights in standard errors",
            ("rule", "plain", "Adam", "plain, capped", "Adam, capped"),
            [
                (rule.name, *(format_lead(x) for own in (rule.plain, rule.capped) for x in (own.lead, own.adam_lead)))
                for rule in rules
                if rule.name != UNIFORM
            ],
        ),
        Table(
            "Rules: the same in % of uniform weights",
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
    """Size, noise and direction of one rule's gradient."""
    return (
        *(format_significant(x) for x in (own.variance, own.mean_square, hide_noisy_ratio(own.ratio))),
        format_estimate(hide_noisy_cosine(own.cosine), 2),
    )


def format_whole_percent(share: float) -> str:
    """`42`; a dash where it is not defined."""
    return f"{100 * share:.0f}" if math.isfinite(share) else DASH


def format_significant(estimate: Estimate) -> str:
    """`0.0123 ± 0.0045`, to the second digit of the error; a dash where it is not defined."""
    if not math.isfinite(estimate.value) or not estimate.error > 0 or math.isinf(estimate.error):
        return format_estimate(estimate, 3)
    return format_estimate(estimate, min(6, max(0, 1 - math.floor(math.log10(estimate.error)))))


def format_lead(lead: Estimate) -> str:
    """A difference in its standard errors; a dash where it has none."""
    return f"{lead.value / lead.error:+.1f}" if lead.error > 0 else format_estimate(Estimate(math.nan, math.nan), 1)


def findings(theory: Theory) -> list[str]:
    """Where theory and measurement agree and where they part, in sentences."""
    return [
        *lemma_findings(theory),
        *(theorem_one_findings(theory) if theory.bounds else []),
        closed_form_finding(theory.closed_form),
        NO_SPREAD_NOTE if theory.optimum is None else optimum_finding(theory.optimum, critical_value(theory.pilot)),
        *rule_findings(theory.rules, critical_value(theory.blocks)),
    ]


def lemma_findings(theory: Theory) -> list[str]:
    """Lemmas 1 and 2."""
    errors = critical_value(theory.pilot)
    lines = [
        f"Lemma 1 {judge_slope(curve.slope, errors)} the measurement for the advantage {curve.advantage}: slope "
        f"{format_estimate(curve.slope, 2)}, expected -1"
        for curve in theory.group_size
        if curve.advantage != FIXED_BASELINE
    ]
    own = theory.lemma_two
    state = "holds on all" if own.violations == 0 else f"fails on {own.violations} of"
    lines.append(
        f"Lemma 2 {state} {own.tokens} tokens; 1 - Σp² is {own.tightness:.0%} of 1 - exp(-H). The sampled tokens' mean "
        f"|e_y - p|² is {own.z:+.1f} standard errors from 1 - Σp²"
        + ("" if abs(own.z) < 4 else ": they were not drawn from this policy at temperature 1")
    )
    if (found := theory.contrast) is not None:
        times = f"{math.exp(found.log_ratio.value):.2g} times"
        lines.append(
            f"A token's gradient is not its uncertainty times a constant: E|s|² per unit of 1 - exp(-H) is {times} as "
            f"large in {found.high} as in {found.low}"
            if found.is_sure
            else f"Whether a token's gradient is its uncertainty times a constant cannot be told: E|s|² per unit of "
            f"1 - exp(-H) is {times} as large in {found.high} as in {found.low}, which may be chance"
        )
        lines[-1] += f". In ranks they go together (Spearman {theory.rank_correlation:.2f} over tokens)"
    return lines


def judge_slope(slope: Estimate, errors: float) -> str:
    """What a slope says about the lemma's -1; a large error says nothing."""
    off = abs(slope.value + 1)
    if off > max(errors * slope.error, SLOPE_TOLERANCE):
        return "parts from"
    return "agrees with" if slope.error < MAX_SLOPE_ERROR else "is not decided by"


def theorem_one_findings(theory: Theory) -> list[str]:
    """Whether the bound holds, how loose it is, and whether it orders the rules."""
    chains = list(theory.bounds.values())
    broken = [name for name, chain in theory.bounds.items() if chain.looseness < 1]
    loosest = [chain.looseness for chain in chains]
    held = f"is broken for {', '.join(broken)}" if broken else f"holds for all {len(chains)} rules"
    measured, bound = ([getattr(chain, name).value for chain in chains] for name in ("measured", "bound"))
    uniform = theory.bounds[UNIFORM]
    parts = {"advantages": uniform.advantage, "the gain": uniform.gain, "entropy": uniform.entropy}
    costs = ", ".join(f"{estimate.value:.2g} from {name}" for name, estimate in parts.items())
    line = (
        f"Theorem 1's bound {held} and is {min(loosest):.2g} to {max(loosest):.2g} times the measured second moment "
        f"(uniform weights: {costs}; cross terms {uniform.cross_terms.value:.2f}). It orders the rules with a rank "
        f"correlation of {spearman(measured, bound):.2f}"
    )
    return [line]


def closed_form_finding(check: ClosedFormCheck) -> str:
    """Theorem 2's closed form against the minimiser."""
    worst = max(abs(check.entropy_excess), abs(check.gradient_excess))
    return f"Theorem 2's closed form is scipy's minimum to {worst:.0e} on {check.responses} responses"


def optimum_finding(optimum: RegionOptimum, errors: float) -> str:
    """Theorem 2's promise against the measurement."""
    closed = optimum.second_moment["closed form"]
    promised = optimum.predicted["closed form"]
    parts = abs(closed.value - promised) > errors * closed.error
    return (
        f"By region it promises {promised:.3g} of the second moment under uniform weights; on other prompts it is "
        f"{format_significant(closed)}{' – theory and measurement part' if parts else ''}. Cross terms between "
        f"regions make {format_percent(optimum.cross_share)} % of it"
    )


def rule_findings(rules: Sequence[RuleFigures], errors: float) -> list[str]:
    """Whether low variance is progress, which gains are resolved, which figures one prompt decides."""
    lines = []
    known = [rule for rule in rules if 0 < rule.plain.ratio.error < rule.plain.ratio.value]
    if known:
        calmest, best = min(known, key=lambda rule: rule.plain.ratio.value), max(rules, key=eff_adam_or_neg_inf)
        lines.append(
            f"The least variance / |mean|² has {calmest.name} (eff under Adam "
            f"{format_estimate(calmest.plain.eff_adam, 3)}); the best eff under Adam has {best.name} "
            f"({format_estimate(best.plain.eff_adam, 3)})"
        )
    if len(known) < len(rules):
        lines.append(
            f"The mean gradient is lost in the noise under {len(rules) - len(known)} of {len(rules)} rules; more "
            "prompts would tell"
        )
    for kind, field in (("under Adam", "adam_lead"), ("for plain steps", "lead")):
        for word, sign in (("gain", 1), ("lose", -1)):
            sure = [rule.name for rule in rules if is_resolved(rule, field, sign, errors)]
            lines.append(f"{', '.join(sure) or 'No rule'}: {word} against uniform weights {kind} by more than "
                         f"{errors:.1f} standard errors, with and without the norm cap")  # fmt: skip
    if dominated := [rule.name for rule in rules if rule.plain.is_dominated]:
        lines.append(
            f"WARNING: one prompt makes more than half of the squared norm under {', '.join(dominated)}; their plain "
            "figures say little, read those with capped norms or measure more prompts"
        )
    return lines


def is_resolved(rule: RuleFigures, field: str, sign: int, errors: float) -> bool:
    """Whether a lead has this sign beyond so many standard errors, with and without the cap."""
    leads: list[Estimate] = [getattr(own, field) for own in (rule.plain, rule.capped)]
    return rule.name != UNIFORM and all(sign * lead.value > errors * lead.error for lead in leads)


def eff_adam_or_neg_inf(rule: RuleFigures) -> float:
    """Its eff under Adam, or less than any where that is not defined."""
    value = rule.plain.eff_adam.value
    return value if math.isfinite(value) else -math.inf


def render_page(title: str, what: str, theory: Theory, batch: int, pictures: Sequence[Path]) -> str:
    """The Markdown page; `pictures` are paths relative to it."""
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
    """The JSON object: an estimate is [value, error]."""
    return {"settings": to_plain(settings), **to_plain(theory), "findings": findings(theory)}
