"""The weight rules that a probe compares with uniform weights: variants of `rest`, other presets, and controls."""

from __future__ import annotations

from dataclasses import replace

from rest_rl.errors import UserError
from rest_rl.objects import display_name
from rest_rl.presets import PRESETS
from rest_rl.response import Region
from rest_rl.weights import RuleName, WeightConfig, WeightRule

UNIFORM, NO_REASONING = "uniform", "no reasoning"
ENTROPY_RULES: tuple[RuleName, ...] = ("one_minus_exp", "inverse", "collision")
SHUFFLED = ("permuted 1", "permuted 2", "permuted 3")
"""Controls: the weights of `rest`, assigned to regions at random."""


def select_rules(tool_format: str, run_rule: WeightRule, *, by_turn: bool = False) -> dict[str, WeightRule]:
    """Return the built-in rules that support a format, uniform first, and last `run_rule` if it is not built in.

    With `by_turn`, the built-in rules are normalized over each turn, as training does in an environment by default.
    """
    rules = built_in_rules()
    if by_turn:
        rules = {
            name: replace(rule, normalization="turn") if isinstance(rule, WeightConfig) else rule
            for name, rule in rules.items()
        }
    if run_rule not in rules.values():
        rules["this run" if isinstance(run_rule, WeightConfig) else display_name(run_rule)] = run_rule
    return {name: rule for name, rule in rules.items() if supports_format(rule, tool_format)}


def supports_format(rule: WeightRule, tool_format: str) -> bool:
    # `check` is optional in the protocol of weight rules; without it a rule supports every format.
    try:
        getattr(rule, "check", lambda *_: None)(tool_format, False)
    except UserError:
        return False
    return True


def built_in_rules() -> dict[str, WeightRule]:
    """Return the built-in rules by name, uniform first."""
    # `inverted` and `permuted` change only the rule of `rest`, so that any difference is due to which region gets which
    # weight.
    own = preset_weights("rest")
    return {
        UNIFORM: PRESETS["grpo"].weights,
        "authors-code": PRESETS["authors-code"].weights,
        **candidate_rules(),
        "inverted": replace(own, rule="inverted"),
        "top_entropy": WeightConfig(rule="top_entropy"),
        NO_REASONING: WeightConfig(rule="uniform", dropped=(Region.REASONING.label,)),
        **{name: replace(own, rule="permuted", seed=seed) for seed, name in enumerate(SHUFFLED, start=1)},
    }


def candidate_rules() -> dict[str, WeightConfig]:
    """Return the rules that may be recommended: `rest`, and `rest_live` with other strengths and entropy rules."""
    live = preset_weights("rest_live")
    strengths = [strength for strength in (0.25, 0.5, 1.0) if strength != live.strength]
    others: list[RuleName] = [rule for rule in ENTROPY_RULES if rule != live.rule]
    return {
        "rest": preset_weights("rest"),
        "rest_live": live,
        **{f"rest_live, strength {strength:g}": replace(live, strength=strength) for strength in strengths},
        **{f"rest_live, {rule}": replace(live, rule=rule) for rule in others},
    }


def preset_weights(name: str) -> WeightConfig:
    own = PRESETS[name].weights
    assert isinstance(own, WeightConfig)
    return own
