"""The categories of BFCL, their selection, and the averages of the official table.

An average over incomplete categories would look like the official number without being comparable to it (BFCL itself
counts a missing category as 0). Averages are therefore only computed from complete categories. The overall score of v4
is never reported, because 40 % of it comes from the agentic part, which this package does not support.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from rest_rl.envs.bfcl_sandbox.package import Version
from rest_rl.errors import UserError
from rest_rl.statistics import Interval, weighted_mean, wilson_interval

NON_LIVE: Mapping[Version, tuple[str, ...]] = {
    "v3": ("simple", "java", "javascript", "multiple", "parallel", "parallel_multiple", "irrelevance"),
    "v4": (
        *("simple_python", "simple_java", "simple_javascript"),
        *("multiple", "parallel", "parallel_multiple", "irrelevance"),
    ),
}
"""In the order of the official table; the first three form its column Simple."""
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance")
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
UNANSWERED = ("irrelevance", "live_irrelevance")
"""No offered tool helps; a response is correct if it contains no call."""
RELEVANCE = "live_relevance"
"""Some offered tool helps; a response is correct if it calls any of them."""


def select_categories(version: Version, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the selected categories in official order. `names` are categories or groups; None selects all."""
    parts = {"non_live": NON_LIVE[version], "live": LIVE, "multi_turn": MULTI_TURN}
    known = tuple(category for part in parts.values() for category in part)
    groups = {"all": known, **parts}
    wanted: set[str] = set()
    for name in names if names is not None else ["all"]:
        if name not in groups and name not in known:
            near = difflib.get_close_matches(name, [*known, *groups], n=1)
            hint = f"did you mean {near[0]}?" if near else "correct the name"
            expected = f"one of {', '.join([*groups, *known])}"
            raise UserError(f"BFCL {version} has no category {name!r}", expected, hint)
        wanted.update(groups.get(name, (name,)))
    if not wanted:
        raise UserError(f"no category of BFCL {version} given", remedy="name some, or remove the option for all")
    return tuple(category for category in known if category in wanted)


def official_averages(version: Version, complete: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """Return the averages of the official table whose categories are all in `complete`.

    `complete` maps categories to (correct samples, all samples). Each average has `accuracy`, a 95 % interval from
    `low` to `high` (`weighted_mean` of its categories' Wilson intervals), its categories (`of`), and their `weights`.
    """
    shares = {name: Interval(right / n, *wilson_interval(right, n)) for name, (right, n) in complete.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, weights in average_weights(version, {name: number for name, (_, number) in complete.items()}).items():
        if complete.keys() >= weights.keys():
            share = weighted_mean((weight, shares[category]) for category, weight in weights.items())
            numbers = {"accuracy": share.value, "low": share.low, "high": share.high}
            found[name] = {**numbers, "of": list(weights), "weights": dict(weights)}
    return found


def average_weights(version: Version, numbers: Mapping[str, int]) -> dict[str, Mapping[str, float]]:
    """Return the weight of each category in each average of the official table.

    v3: Non-Live is the mean of Simple (a mean of three categories), multiple, parallel, parallel_multiple, irrelevance.
    Live is the accuracy over all samples of its six categories, Multi-Turn the mean of its four categories, Overall the
    mean of these three averages. v4: Non-Live and Live exclude relevance and irrelevance, and Irrelevance is a separate
    average. `numbers` contains the number of samples of each category.
    """
    simple, plain = mean_weights(*NON_LIVE[version][:3]), NON_LIVE[version][3:]
    if version == "v4":
        parts = {"Non-Live": mean_weights(simple, *plain[:-1]), "Live": weights_by_samples(LIVE[:4], numbers)}
        return {**parts, "Irrelevance": mean_weights(*UNANSWERED), "Multi-Turn": mean_weights(*MULTI_TURN)}
    parts = {"Non-Live": mean_weights(simple, *plain), "Live": weights_by_samples(LIVE, numbers)}
    parts["Multi-Turn"] = mean_weights(*MULTI_TURN)
    return {**parts, "Overall": mean_weights(*parts.values())}


def mean_weights(*parts: str | Mapping[str, float]) -> Mapping[str, float]:
    """Return the weight of each category in the mean of `parts`: categories, or averages (given as weights)."""
    weights = [{part: 1.0} if isinstance(part, str) else part for part in parts]
    return {name: weight / len(parts) for part in weights for name, weight in part.items()}


def weights_by_samples(names: Sequence[str], numbers: Mapping[str, int]) -> Mapping[str, float]:
    """Return weights proportional to the numbers of samples, for the accuracy over all samples."""
    total = sum(numbers.get(name, 0) for name in names) or 1
    return {name: numbers.get(name, 0) / total for name in names}
