"""Histories that chat templates can render: results in the order of their calls, repaired calls in every prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_rl.data.samples import to_json
from rest_rl.data.shapes import RowContext
from rest_rl.data.shapes.chat import order_results
from tests.made_up_rows import QUESTION, WEATHER, load_rows

SAID = {"role": "assistant", "content": "Rain."}


def calling(*ids: Any, **arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"city": "Oslo", **arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": one, "function": function} for one in ids]}


def result(identity: Any, text: str = "rain") -> dict[str, Any]:
    return {"role": "tool", "content": text} | ({} if identity is None else {"tool_call_id": identity})


def texts(messages: Any) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "tool"]


@pytest.mark.parametrize(
    ("calls", "results", "order", "reasons"),
    [
        (["a", "b"], ["a", "b"], [0, 1], {}),
        (["a", "b"], ["b", "a"], [1, 0], {"results_reordered": 1}),
        ([7, 8], [8, 7], [1, 0], {"results_reordered": 1}),
        (["a", "a"], ["a", "a"], [0, 1], {}),
        (["a", "a", "b"], ["b", "a", "a"], [1, 2, 0], {"results_reordered": 1}),
        (["a", "b"], ["a", "x"], [0, 1], {"orphan_result": 1, "missing_result": 1}),
        (["a", "b"], ["b", "x", "a"], [2, 1, 0], {"results_reordered": 1, "orphan_result": 1}),
        (["a"], ["a", "a"], [0, 1], {"orphan_result": 1}),
        (["a", "b"], ["b"], [0], {"missing_result": 1}),
        (["a", "b"], [None, None], [0, 1], {}),
        (["a", "b"], [None], [0], {}),  # one text may answer all
        ([None, None], ["b", "a"], [0, 1], {}),
        (["a"], [], [], {"missing_result": 1}),
    ],
)
def test_results_follow_the_order_of_the_calls(
    tmp_path: Path, calls: list[Any], results: list[Any], order: list[int], reasons: dict[str, int]
) -> None:
    given_ones = [result(identity, str(number)) for number, identity in enumerate(results)]
    row = {"messages": [QUESTION, calling(*calls), *given_ones, SAID], "tools": [WEATHER]}
    samples, report = load_rows(tmp_path, row)
    assert texts(samples[-1].messages) == [str(number) for number in order]
    assert report.reasons == reasons
    assert report.repaired == ("results_reordered" in reasons)
    again, report = load_rows(tmp_path, *map(to_json, samples))
    assert again == samples
    assert "results_reordered" not in report.reasons


def test_a_dialogue_may_end_in_calls_and_begin_with_a_result(tmp_path: Path) -> None:
    assert load_rows(tmp_path, {"messages": [QUESTION, calling("a")], "tools": [WEATHER]})[1].reasons == {}
    samples, report = load_rows(tmp_path, {"messages": [result("a"), QUESTION, result(None, "x"), SAID]})
    assert (texts(samples[0].messages), report.occurrences) == (["rain", "x"], {"orphan_result": 2})


@given(st.permutations(range(5)))
def test_any_order_becomes_that_of_the_calls(order: list[int]) -> None:
    messages = [calling(*map(str, range(5))), *(result(str(number), str(number)) for number in order), SAID]
    context = RowContext("x")
    ordered = order_results(messages, context)
    assert texts(ordered) == list("01234")
    assert len(context.findings) == (order != sorted(order))
    context.findings.clear()
    assert order_results(ordered, context) == ordered
    assert context.findings == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"days": "2"}, "number_as_string"), ("{'city': 'Oslo', 'days': 2}", "arguments_as_python")],
)
@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_repairs_appear_in_the_prompts_of_later_turns(tmp_path: Path, arguments: Any, reason: str, mask: float) -> None:
    first = calling("a", **arguments) if isinstance(arguments, dict) else calling("a")
    if isinstance(arguments, str):
        first["tool_calls"][0]["function"]["arguments"] = arguments
    row = {"messages": [QUESTION, first, result("a"), SAID, QUESTION, SAID], "tools": [WEATHER]}
    samples, report = load_rows(tmp_path, row, mask_names=mask)
    assert report.occurrences == {reason: 1}
    for sample in samples[1:]:
        shown = sample.messages[1]["tool_calls"][0]["function"]["arguments"]
        assert sorted(map(str, shown.values())) == ["2", "Oslo"]
        assert any(value == 2 and isinstance(value, int) for value in shown.values())
        assert sample.messages[1]["tool_calls"][0]["id"] == "a"


def test_allowed_defects_stay_in_histories(tmp_path: Path) -> None:
    row = {"messages": [QUESTION, calling("a", days="2"), result("a"), SAID], "tools": [WEATHER]}
    samples, _ = load_rows(tmp_path, row, allow=("number_as_string",))
    assert samples[1].messages[1]["tool_calls"][0]["function"]["arguments"]["days"] == "2"
