"""The categories of BFCL, how users select them, and the averages that the official table makes of them.

An average over categories of which one is missing or cut short would look like the official number and be another
(upstream counts a missing category as 0), so only complete ones are averaged, and v4's overall score, 40 % of which is
its agentic part, is never given.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from rest_rl.errors import UserError
from rest_rl.evaluate.benchmarks.bfcl.package import Version
from rest_rl.statistics import Interval, weighted_mean, wilson_interval

NON_LIVE: Mapping[Version, tuple[str, ...]] = {
    "v3": ("simple", "java", "javascript", "multiple", "parallel", "parallel_multiple", "irrelevance"),
    "v4": (
        *("simple_python", "simple_java", "simple_javascript"),
        *("multiple", "parallel", "parallel_multiple", "irrelevance"),
    ),
}
"""In the order of the official table; the first three are its column Simple."""
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance")
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
UNANSWERED = ("irrelevance", "live_irrelevance")
"""No tool on offer helps: a response without a call is right."""
RELEVANCE = "live_relevance"
"""Some tool helps: a response with any call is right."""


def select_categories(version: Version, names: Sequence[str] | None) -> tuple[str, ...]:
    """The categories of the given names (of categories or groups), once each, in official order; all for None."""
    parts = {"non_live": NON_LIVE[version], "live": LIVE, "multi_turn": MULTI_TURN}
    known = tuple(category for part in parts.values() for category in part)
    groups = {"all": known, **parts}
    wanted: set[str] = set()
    for name in names if names is not None else ["all"]:
        if name not in groups and name not in known:
            near = difflib.get_close_matches(name, [*known, *groups], n=1)
            hint = f"did you mean {near[0]}?" if near else "pick one of these"
            raise UserError(f"category {name!r} of BFCL {version}", f"one of {', '.join([*groups, *known])}", hint)
        wanted.update(groups.get(name, (name,)))
    if not wanted:
        raise UserError(f"no category of BFCL {version}", "at least one", "name some, or leave it out for all")
    return tuple(category for category in known if category in wanted)


def official_averages(version: Version, complete: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """The group averages of the official table, of those groups whose categories are all `complete` (correct, number).

    Each has `accuracy` (a share), its 95 % interval `low` and `high` over the categories' Wilson intervals (see
    `weighted_mean`), `of` (its categories) and their `weights`.
    """
    shares = {
        name: Interval(right / number, *wilson_interval(right, number)) for name, (right, number) in complete.items()
    }
    found: dict[str, dict[str, Any]] = {}
    for name, weights in average_weights(version, {name: number for name, (_, number) in complete.items()}).items():
        if complete.keys() >= weights.keys():
            share = weighted_mean((weight, shares[category]) for category, weight in weights.items())
            numbers = {"accuracy": share.value, "low": share.low, "high": share.high}
            found[name] = {**numbers, "of": list(weights), "weights": dict(weights)}
    return found


def average_weights(version: Version, numbers: Mapping[str, int]) -> dict[str, Mapping[str, float]]:
    """What each category counts in the averages of the official table; `numbers` holds the categories' samples.

    v3: Non-Live is the mean of Simple (itself a mean of three), multiple, parallel, parallel_multiple and irrelevance;
    Live the share over the samples of its six categories; Multi-Turn the mean of four; Overall the mean of the three.
    v4 takes the two (ir)relevance categories out of Non-Live and Live, and gives the mean of the two irrelevance ones
    as a part of its own.
    """
    simple, plain = mean_weights(*NON_LIVE[version][:3]), NON_LIVE[version][3:]
    if version == "v4":
        parts = {"Non-Live": mean_weights(simple, *plain[:-1]), "Live": weights_by_samples(LIVE[:4], numbers)}
        return {**parts, "Irrelevance": mean_weights(*UNANSWERED), "Multi-Turn": mean_weights(*MULTI_TURN)}
    parts = {
        "Non-Live": mean_weights(simple, *plain),
        "Live": weights_by_samples(LIVE, numbers),
        "Multi-Turn": mean_weights(*MULTI_TURN),
    }
    return {**parts, "Overall": mean_weights(*parts.values())}


def mean_weights(*parts: str | Mapping[str, float]) -> Mapping[str, float]:
    """The weights in the unweighted mean of categories or of parts that share no category."""
    weights = [{part: 1.0} if isinstance(part, str) else part for part in parts]
    return {name: weight / len(parts) for part in weights for name, weight in part.items()}


def weights_by_samples(names: Sequence[str], numbers: Mapping[str, int]) -> Mapping[str, float]:
    """The weights in the share over all samples; 0 for categories without any."""
    total = sum(numbers.get(name, 0) for name in names) or 1
    return {name: numbers.get(name, 0) / total for name in names}
