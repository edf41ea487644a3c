"""The rules of probe and theory are those that a grid trains."""

from __future__ import annotations

import pytest

from research.theory.measure import AUTHORS_RULE, select_theory_rules
from rest_rl.compare.grid import read_grid
from rest_rl.probe.rules import NO_REASONING, SHUFFLED, UNIFORM, built_in_rules, candidate_rules
from rest_rl.weights import WeightConfig


@pytest.mark.parametrize(
    ("rival", "method"),
    [
        (UNIFORM, "grpo"),
        ("rest", "rest"),
        ("rest_live", "rest_live"),
        ("authors-code", "authors-code"),
        ("inverted", "inverted"),
        ("top_entropy", "top_entropy"),
        (SHUFFLED[1], "permuted"),
    ],
)
def test_a_probe_rule_equals_the_rule_that_a_grid_trains(rival: str, method: str) -> None:
    trained = read_grid(None, methods=["grpo", method] if method != "grpo" else [method]).run_config(method, "", 2)
    assert built_in_rules()[rival] == trained.rest.resolve().weights


def test_no_reasoning_is_uniform_except_for_the_reasoning() -> None:
    weights = built_in_rules()[NO_REASONING]
    assert isinstance(weights, WeightConfig)
    assert (weights.rule, weights.dropped) == ("uniform", ("reasoning",))
    assert (weights.decay_format, weights.gain_arguments, weights.gain_reasoning) == (0, 0, 0)


def test_probe_and_theory_share_one_table() -> None:
    every = built_in_rules()
    assert next(iter(every)) == UNIFORM
    assert set(candidate_rules()) < set(every)
    own = select_theory_rules()
    assert next(iter(own)) == UNIFORM
    assert {name: config for name, config in own.items() if name != AUTHORS_RULE}.items() <= every.items()
    assert {"rest", "rest_live", "rest_live, collision", "inverted", NO_REASONING, SHUFFLED[0]} < set(own)
