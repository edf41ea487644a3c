"""What responses to held-out prompts were worth, summed up: means and standard errors, per kind and per split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What one response to a prompt was worth."""

    kind: str
    split: str
    prompt: int
    exact_match: float
    s_acc: float
    s_format: float


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over all outcomes, per kind of task and per split."""
    return {
        **means(outcomes),
        "kinds": {kind: means(group) for kind, group in grouped(outcomes, "kind").items()},
        "splits": {split: means(group) for split, group in grouped(outcomes, "split").items()},
    }


def grouped(outcomes: Sequence[Outcome], name: str) -> dict[str, list[Outcome]]:
    """Outcomes by one of their fields, in alphabetical order."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: str(getattr(outcome, name))):
        groups.setdefault(str(getattr(outcome, name)), []).append(outcome)
    return groups


def means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean scores, the number of responses and the standard error of the exact match over prompts."""
    n = len(outcomes)
    if n == 0:
        return {"n": 0}
    return {
        "exact_match": sum(outcome.exact_match for outcome in outcomes) / n,
        "s_acc": sum(outcome.s_acc for outcome in outcomes) / n,
        "s_format": sum(outcome.s_format for outcome in outcomes) / n,
        "exact_match_error": standard_error(outcomes),
        "n": n,
    }


def standard_error(outcomes: Sequence[Outcome]) -> float:
    """Standard error of the mean exact match: sd over prompts / sqrt(prompts), draws of one prompt averaged first.

    0 for fewer than two prompts.
    """
    by_prompt: Mapping[str, list[Outcome]] = grouped(outcomes, "prompt")
    values = [sum(outcome.exact_match for outcome in group) / len(group) for group in by_prompt.values()]
    n = len(values)
    if n < 2:
        return 0.0
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
