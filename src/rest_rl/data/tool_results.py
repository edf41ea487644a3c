"""Tool results in the order of the calls they answer, as chat templates without ids need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rest_rl.data.reasons import Finding, finding


def in_order_of_calls(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The messages, with the results behind each turn in the order of its calls where ids show another, and findings.

    Results are matched by id, several calls of one id in their order, and results without an id in the order of the
    calls that are left. Results of no call and calls without a result are noted and stay where they are. One result
    without an id may answer all calls of its turn, and the last turn of a dialogue waits for its results.
    """
    ordered = list(messages)
    found: list[Finding] = []
    for at, end in _blocks(messages):
        calls = _calls(messages[at]) if at >= 0 else []
        if calls is None:  # calls that cannot be read, which is said elsewhere
            continue
        results = messages[at + 1 : end]
        matched = _matched(calls, results)
        slots = [slot for slot, call in enumerate(matched) if call is not None]
        by_call = sorted(slots, key=lambda slot: matched[slot] or 0)
        if by_call != slots:
            shown = ", ".join(str(results[slot].get("tool_call_id")) for slot in slots)
            found.append(finding("results_reordered", f"got the results of message {at} in the order {shown}"))
            for slot, taken in zip(slots, by_call, strict=True):
                ordered[at + 1 + slot] = results[taken]
        found += _unmatched(at, calls, results, matched, is_last=end == len(messages))
    return ordered, found


def _blocks(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int]]:
    """(position of a turn with calls, or -1 or of another message before stray results; end of the results behind)."""
    at = -1
    while at < len(messages):
        end = at + 1
        while end < len(messages) and messages[end].get("role") == "tool":
            end += 1
        if end > at + 1 or (at >= 0 and messages[at].get("tool_calls")):
            yield at, end
        at = end


def _calls(message: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    calls = message.get("tool_calls") or []
    is_readable = isinstance(calls, (list, tuple)) and all(isinstance(call, Mapping) for call in calls)
    return list(calls) if is_readable else None


def _matched(calls: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """For each result the number of its call, or None."""
    left = list(range(len(calls)))
    have_ids = any(call.get("id") is not None for call in calls)
    matched: list[int | None] = [None] * len(results)
    for with_ids in (True, False):
        for slot, result in enumerate(results):
            identity = result.get("tool_call_id") if have_ids else None
            if (identity is not None) != with_ids:
                continue
            fitting = (number for number in left if identity is None or calls[number].get("id") == identity)
            matched[slot] = next(fitting, None)
            left = [number for number in left if number != matched[slot]]
    return matched


def _unmatched(
    at: int,
    calls: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    matched: Sequence[int | None],
    *,
    is_last: bool,
) -> Iterator[Finding]:
    for slot, result in enumerate(results):
        if matched[slot] is None:
            shown = f"{result.get('tool_call_id')}: {result.get('content')!r:.80}"
            yield finding("orphan_result", f"got message {at + 1 + slot}, a result that answers no call: {shown}")
    answers_all = any(result.get("tool_call_id") is None for result in results)
    missing = [number for number in range(len(calls)) if number not in matched]
    if missing and not answers_all and not (is_last and not results):
        shown = ", ".join(str(calls[number].get("id")) for number in missing)
        yield finding("missing_result", f"got no result for {len(missing)} calls of message {at} ({shown})")
