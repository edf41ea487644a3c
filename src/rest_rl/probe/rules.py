"""The weight rules that are held against uniform weights: those of `rest`, its rivals, and controls."""

from __future__ import annotations

from dataclasses import replace

from rest_rl.errors import UserError
from rest_rl.objects import name_of
from rest_rl.presets import PRESETS
from rest_rl.response import Region
from rest_rl.weights import Rule, WeightConfig, WeightRule

UNIFORM, NO_REASONING = "uniform", "no reasoning"
ENTROPY_RULES: tuple[Rule, ...] = ("one_minus_exp", "inverse", "collision")
SHUFFLED = ("permuted 1", "permuted 2", "permuted 3")
"""The controls: weights of `rest`, dealt to regions by chance."""


def select_rules(tool_format: str, run_rule: WeightRule) -> dict[str, WeightRule]:
    """The rules that can weigh responses in a format, uniform weights first; the run's own last, if it is another."""
    rules = built_in_rules()
    if run_rule not in rules.values():
        rules["this run" if isinstance(run_rule, WeightConfig) else name_of(run_rule)] = run_rule
    return {name: rule for name, rule in rules.items() if supports_format(rule, tool_format)}


def supports_format(rule: WeightRule, tool_format: str) -> bool:
    try:
        getattr(rule, "check", lambda *_: None)(tool_format, False)
    except UserError:
        return False
    return True


def built_in_rules() -> dict[str, WeightRule]:
    """The built-in rules by name, uniform first; `inverted` and `permuted` change nothing else of `rest`."""
    own = rest_weights()
    return {
        UNIFORM: PRESETS["grpo"].weights,
        "paper": PRESETS["paper"].weights,
        "authors-code": PRESETS["authors-code"].weights,
        **candidate_rules(),
        "inverted": replace(own, rule="inverted"),
        "top_entropy": WeightConfig(rule="top_entropy"),
        NO_REASONING: WeightConfig(rule="uniform", dropped=(Region.REASONING.label,)),
        **{name: replace(own, rule="permuted", seed=seed) for seed, name in enumerate(SHUFFLED, start=1)},
    }


def candidate_rules() -> dict[str, WeightConfig]:
    """The weights that may be recommended: those of `rest`, at other strengths, and by other rules of entropy."""
    own = rest_weights()
    strengths = [strength for strength in (0.25, 0.5, 1.0) if strength != own.strength]
    others: list[Rule] = [rule for rule in ENTROPY_RULES if rule != own.rule]
    return {
        "rest": own,
        **{f"rest, strength {strength:g}": replace(own, strength=strength) for strength in strengths},
        **{f"rest, {rule}": replace(own, rule=rule) for rule in others},
    }


def rest_weights() -> WeightConfig:
    own = PRESETS["rest"].weights
    assert isinstance(own, WeightConfig)
    return own
