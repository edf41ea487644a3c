"""The categories of BFCL, how users select them, and the averages that the official table makes of them.

An average over categories of which one is missing or cut short would look like the official number and be another
(upstream counts a missing category as 0), so only complete ones are averaged, and v4's overall score, 40 % of which is
its agentic part, is never given.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Version = Literal["v3", "v4"]
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
    def accuracy(self) -> float:
        """The share."""
        return self.correct / self.number


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
            raise ValueError(
                f"got category {name!r} of BFCL {version}, expected one of {', '.join([*groups, *known])}; {hint}"
            )
        wanted.update(groups.get(name, (name,)))
    if not wanted:
        raise ValueError(
            f"got no category of BFCL {version}, expected at least one; name some, or leave it out for all"
        )
    return tuple(category for category in known if category in wanted)


def official_averages(version: Version, complete: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """The group averages of the official table, of those groups whose categories are all `complete`.

    v3: Non-Live is the mean of Simple (itself a mean of three), multiple, parallel, parallel_multiple and irrelevance;
    Live the share over the samples of its six categories; Multi-Turn the mean of four; Overall the mean of the three.
    v4 takes the two (ir)relevance categories out of Non-Live and Live, and gives the mean of the two irrelevance ones
    as a part of its own. Each has `accuracy` (a share) and `of` (its categories).
    """
    simple, plain = NON_LIVE[version][:3], NON_LIVE[version][3:]
    live = LIVE
    if version == "v4":
        plain, live = plain[:-1], LIVE[:4]
    averages = {
        "Non-Live": ((*simple, *plain), lambda: mean([_mean_of(complete, simple), *_each(complete, plain)])),
        "Live": (live, lambda: sum(complete[c].correct for c in live) / sum(complete[c].number for c in live)),
        "Irrelevance": (UNANSWERED, lambda: _mean_of(complete, UNANSWERED)),
        "Multi-Turn": (MULTI_TURN, lambda: _mean_of(complete, MULTI_TURN)),
    }
    if version == "v3":
        del averages["Irrelevance"]
    found = {
        name: {"accuracy": average(), "of": list(parts)}
        for name, (parts, average) in averages.items()
        if all(part in complete for part in parts)
    }
    if version == "v3" and len(found) == len(averages):
        overall = mean([average["accuracy"] for average in found.values()])
        found["Overall"] = {"accuracy": overall, "of": list(categories(version))}
    return found


def mean(shares: Sequence[float]) -> float:
    """Unweighted."""
    return sum(shares) / len(shares)


def _each(complete: Mapping[str, Score], names: Sequence[str]) -> list[float]:
    return [complete[name].accuracy for name in names]


def _mean_of(complete: Mapping[str, Score], names: Sequence[str]) -> float:
    return mean(_each(complete, names))
