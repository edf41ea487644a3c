"""The categories of BFCL, how users select them, and the averages that the official table makes of them.

An average over categories of which one is missing or cut short would look like the official number and be another
(upstream counts a missing category as 0), so only complete ones are averaged, and v4's overall score, 40 % of which is
its agentic part, is never given.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rest_rl.errors import UserError
from rest_rl.evaluate.benchmarks.bfcl.package import Version
from rest_rl.statistics import Interval, weighted_mean, wilson

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
"""No tool on offer helps: right is whoever makes no call."""
RELEVANCE = "live_relevance"
"""Some tool helps: right is whoever makes any call."""


class Score(NamedTuple):
    """Of one complete category: samples that are correct, and all."""

    correct: int
    number: int

    @property
    def estimate(self) -> Interval:
        """The share with its Wilson interval."""
        return Interval(self.correct / self.number, *wilson(self.correct, self.number))


def categories(version: Version) -> tuple[str, ...]:
    """All seventeen, in the order of the official table."""
    return (*NON_LIVE[version], *LIVE, *MULTI_TURN)


def named_groups(version: Version) -> dict[str, tuple[str, ...]]:
    """What a name of several categories stands for."""
    return {
        "all": categories(version),
        "non_live": NON_LIVE[version],
        "live": LIVE,
        "multi_turn": MULTI_TURN,
    }


def select_categories(version: Version, names: Sequence[str] | None) -> tuple[str, ...]:
    """The categories of the given names (of categories or groups), once each, in official order; all for None.

    ValueError for a name that this version does not have.
    """
    groups, known = named_groups(version), categories(version)
    wanted: set[str] = set()
    for name in names if names is not None else ["all"]:
        if name not in groups and name not in known:
            near = difflib.get_close_matches(name, [*known, *groups], n=1)
            hint = f"did you mean {near[0]}?" if near else "pick one of these"
            raise UserError(f"category {name!r} of BFCL {version}", f"one of {', '.join([*groups, *known])}", f"{hint}")
        wanted.update(groups.get(name, (name,)))
    if not wanted:
        raise UserError(f"no category of BFCL {version}", "at least one", "name some, or leave it out for all")
    return tuple(category for category in known if category in wanted)


def official_averages(version: Version, complete: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """The group averages of the official table, of those groups whose categories are all `complete`.

    Each has `accuracy` (a share), its 95 % interval `low` and `high` over the categories' Wilson intervals (see
    `weighted_mean`), `of` (its categories) and their `weights`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, weights in average_weights(version, {name: score.number for name, score in complete.items()}).items():
        if all(category in complete for category in weights):
            share = weighted_mean((weight, complete[category].estimate) for category, weight in weights.items())
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
    first, *plain = mean(*each(NON_LIVE[version][:3])), *each(NON_LIVE[version][3:])
    if version == "v4":
        non_live, live = mean(first, *plain[:-1]), by_samples(LIVE[:4], numbers)
        irrelevance = mean(*each(UNANSWERED))
        return {"Non-Live": non_live, "Live": live, "Irrelevance": irrelevance, "Multi-Turn": mean(*each(MULTI_TURN))}
    parts = {"Non-Live": mean(first, *plain), "Live": by_samples(LIVE, numbers), "Multi-Turn": mean(*each(MULTI_TURN))}
    return {**parts, "Overall": mean(*parts.values())}


def each(names: Sequence[str]) -> list[Mapping[str, float]]:
    """The weights of single categories."""
    return [{name: 1.0} for name in names]


def mean(*parts: Mapping[str, float]) -> Mapping[str, float]:
    """The weights in the unweighted mean of parts that share no category."""
    return {name: weight / len(parts) for part in parts for name, weight in part.items()}


def by_samples(names: Sequence[str], numbers: Mapping[str, int]) -> Mapping[str, float]:
    """The weights in the share over all samples; 0 for categories without any."""
    total = sum(numbers.get(name, 0) for name in names) or 1
    return {name: numbers.get(name, 0) / total for name in names}
