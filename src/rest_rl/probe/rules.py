"""The weight rules that are held against uniform weights: those of `rest`, its rivals, and controls."""

from __future__ import annotations

from dataclasses import replace

from rest_rl.presets import PRESETS, Preset
from rest_rl.response import Region
from rest_rl.weights import Rule, WeightConfig

UNIFORM, NO_REASONING = "uniform", "no reasoning"
ENTROPY_RULES: tuple[Rule, ...] = ("one_minus_exp", "inverse", "collision")
SHUFFLED = ("permuted 1", "permuted 2", "permuted 3")
"""The controls: weights of `rest`, dealt to regions by chance."""


def rivals() -> dict[str, Preset]:
    """All rules by name, uniform weights first; `inverted` and `permuted` change nothing else of `rest`."""
    own = rest_weights()
    rules: dict[str, WeightConfig] = {
        **candidates(),
        "inverted": replace(own, rule="inverted"),
        "top_entropy": WeightConfig(rule="top_entropy"),
        NO_REASONING: WeightConfig(rule="uniform", dropped=(Region.REASONING.label,)),
        **{name: replace(own, rule="permuted", seed=seed) for seed, name in enumerate(SHUFFLED, start=1)},
    }
    return {
        UNIFORM: PRESETS["grpo"],
        "paper": PRESETS["paper"],
        "authors-code": PRESETS["authors-code"],
        **{name: replace(PRESETS["rest"], weights=config) for name, config in rules.items()},
    }


def candidates() -> dict[str, WeightConfig]:
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
    """The weights of the preset `rest`."""
    own = PRESETS["rest"].weights
    assert isinstance(own, WeightConfig)
    return own
