"""Chat rows in all their spellings: tools, calls, roles, contents and reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_rl.response import Gold
from tests.made_up_rows import ARGUMENTS, CALL, QUESTION, TURNS, WEATHER, WRAPPED, load_one, load_rows


@pytest.mark.parametrize("tools", [[WRAPPED], [WEATHER], json.dumps([WEATHER]), [json.dumps(WRAPPED)], WRAPPED])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_spellings_of_tools(tmp_path: Path, tools: Any, key: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
    row = {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}], key: tools}
    sample = load_one(tmp_path, row)
    assert sample.tools == (WRAPPED,)
    assert (sample.messages, sample.gold) == ((QUESTION,), Gold((CALL,), None))


@pytest.mark.parametrize("kind", TURNS)
def test_spellings_of_calls(tmp_path: Path, kind: str) -> None:
    (sample,), report = load_rows(
        tmp_path, {"messages": [QUESTION, {"role": "assistant", **TURNS[kind]}], "tools": [WEATHER]}
    )
    assert sample.gold == Gold((CALL,), None)
    assert report.reasons == ({"call_as_text": 1} if kind == "hermes" else {})


def test_sharegpt_roles(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Weather in Oslo?"},
        {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": json.loads(ARGUMENTS)})},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Rain."},
    ]
    (first, second), report = load_rows(tmp_path, {"conversations": turns, "tools": json.dumps([WEATHER])})
    assert report.sources == {"messages": 1}
    assert (first.gold.calls, second.gold.answer) == ((CALL,), "Rain.")
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("given_role", "role"), [("developer", "system"), ("function", "tool"), ("ipython", "tool"), ("human", "user")]
)
def test_role_names_are_unified(tmp_path: Path, given_role: str, role: str) -> None:
    first = {"role": given_role, "content": "x", "name": "n", "tool_call_id": "c"}
    (sample,), _ = load_rows(tmp_path, {"messages": [first, {"role": "assistant", "content": "y"}]})
    assert sample.messages == ({"role": role, "content": "x", "name": "n", "tool_call_id": "c"},)


def test_content_parts_are_joined_if_they_are_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Weather "}, "in Oslo?"]
    assert load_one(
        tmp_path, {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "y"}]}
    ).messages == (QUESTION,)
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    _, report = load_rows(
        tmp_path, {"messages": [{"role": "user", "content": picture}, {"role": "assistant", "content": "y"}]}
    )
    assert report.reasons == {"bad_turn": 1, "broken_history": 1}


def test_an_empty_tool_result_and_objects_are_results(tmp_path: Path) -> None:
    call = {
        "role": "assistant",
        "tool_calls": [{"id": "c", "function": {"name": "get_weather", "arguments": ARGUMENTS}}],
    }
    results = [{"role": "tool", "content": None, "tool_call_id": "c"}, {"role": "tool", "content": {"sky": "grey"}}]
    (_, last), report = load_rows(
        tmp_path,
        {"messages": [QUESTION, call, *results, {"role": "assistant", "content": "."}], "tools": [WEATHER]},
    )
    assert report.kept == 1
    assert last.messages[1]["tool_calls"][0]["id"] == "c"
    assert last.messages[2:] == (
        {"role": "tool", "content": "", "tool_call_id": "c"},
        {"role": "tool", "content": '{"sky": "grey"}'},
    )


def test_arguments_written_as_python_are_repaired(tmp_path: Path) -> None:
    call = {"function": {"name": "get_weather", "arguments": "{'city': 'Oslo', 'days': 2}"}}
    (sample,), report = load_rows(
        tmp_path, {"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}], "tools": [WEATHER]}
    )
    assert sample.gold.calls == (CALL,)
    assert (report.repaired, report.reasons) == (1, {"arguments_as_python": 1})


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_the_thought(tmp_path: Path, field: str) -> None:
    turn = {"role": "assistant", "content": "y", field: "I know."}
    assert load_one(tmp_path, {"messages": [QUESTION, turn]}).thought == "I know."
