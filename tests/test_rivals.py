"""The rules of probe and theory are those that a grid trains."""

from __future__ import annotations

import pytest

from research.theory.measure import CONSTANTS, theory_rules
from rest_rl.compare.grid import read_grid
from rest_rl.probe.rules import NO_REASONING, SHUFFLED, UNIFORM, candidates, rivals
from rest_rl.weights import WeightConfig


@pytest.mark.parametrize(
    ("rival", "method"),
    [
        (UNIFORM, "grpo"),
        ("rest", "rest"),
        ("paper", "paper"),
        ("authors-code", "authors-code"),
        ("inverted", "inverted"),
        ("top_entropy", "top_entropy"),
        (SHUFFLED[1], "permuted"),
    ],
)
def test_a_rule_is_what_a_grid_trains(rival: str, method: str) -> None:
    trained = read_grid(None, methods=["grpo", method] if method != "grpo" else [method]).run(method, "", 2)
    assert rivals()[rival] == trained.rest.resolve().weights


def test_no_reasoning_is_uniform_but_for_the_reasoning() -> None:
    weights = rivals()[NO_REASONING]
    assert isinstance(weights, WeightConfig)
    assert (weights.rule, weights.dropped) == ("uniform", ("reasoning",))
    assert (weights.decay_format, weights.gain_arguments, weights.gain_reasoning) == (0, 0, 0)


def test_probe_and_theory_read_one_table() -> None:
    every = rivals()
    assert next(iter(every)) == UNIFORM
    assert set(candidates()) < set(every)
    own = theory_rules()
    assert next(iter(own)) == UNIFORM
    assert {name: config for name, config in own.items() if name != CONSTANTS}.items() <= every.items()
    assert {"rest", "rest, collision", "paper", "inverted", NO_REASONING, SHUFFLED[0]} < set(own)
