"""Every row shape reads made-up rows in the documented form of its data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_rl.data.check import CheckConfig
from rest_rl.data.samples import to_json
from rest_rl.data.shapes import SHAPES, find_shape, get_shapes
from rest_rl.data.tool_world import tool_world
from rest_rl.response import Gold, ToolCall
from tests.made_up_rows import CALL, HISTORY, QUESTION, RAW, ROWS, SYSTEM, load_one, load_rows


def source_of(row: dict[str, Any]) -> str | None:
    shape = find_shape(row, get_shapes("auto"))
    return shape and shape.name


@pytest.mark.parametrize("kind", ROWS)
def test_toolrl(tmp_path: Path, kind: str) -> None:
    (sample,), report = load_rows(tmp_path, ROWS[kind])
    assert (report.sources, report.reasons) == ({"toolrl": 1}, {"thought_quotes_tags": 1})
    assert sample.gold == Gold((ToolCall("get weather", {"city": "Rome"}),), None)
    assert sample.thought is not None
    assert sample.thought.startswith("I could write <tool_call>")
    names = [tool["function"]["name"] for tool in sample.tools]
    assert names == ["get weather", "stop"]
    assert sample.tools[0]["function"]["parameters"]["properties"]["days"] == {"type": "integer", "default": ""}
    assert [message["role"] for message in sample.messages] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
        "tool",
    ]
    assert sample.messages[1] == {"role": "assistant", "content": "Hi"}
    assert sample.messages[4] == {
        "role": "tool",
        "content": '{"sky": "grey"}',
        "name": "get weather",
        "tool_call_id": "call00000",
    }
    assert sample.messages[5]["content"] == "ok"


def test_toolrl_with_its_own_prompts(tmp_path: Path) -> None:
    (sample,), _ = load_rows(tmp_path, RAW, keep_prompts=True)
    assert [message["content"] for message in sample.messages] == [SYSTEM, HISTORY]
    assert sample.tools_in_prompt
    assert len(sample.tools) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": "<think> a </think>\n<tool_call>\n{broken\n</tool_call>"}, "bad_gold"),
        ({"output": "<think> a </think>\n<tool_call>\n"}, "bad_gold"),
        ({"output": "no tags"}, "bad_gold"),
        ({"input": "**Dialogue Records History**\n<user> a </user> stray"}, "bad_history"),
        ({"input": "**Dialogue Records History**\n<user> a <obs> b </user>"}, "bad_history"),
        ({"input": "<user> a </user>\n<tool_call>\n{broken\n</tool_call>"}, "bad_history"),
        ({"instruction": "no tools"}, "bad_tool_schema"),
        ({"instruction": SYSTEM.replace("Parameters: {}", "Parameters: {oops")}, "bad_tool_schema"),
        ({"input": 3}, "bad_row"),
    ],
)
def test_toolrl_rows_that_cannot_be_read(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    samples, report = load_rows(tmp_path, RAW, {**RAW, **change}, allow=("duplicate",))
    assert (len(samples), report.rejected, report.findings[-1].finding.reason) == (1, 1, reason)


@pytest.mark.parametrize("many", [True, False])
def test_api_bank(tmp_path: Path, many: bool) -> None:
    answer = {"name": "Book", "parameters": {"rooms": "2"}}
    parameters = "{'rooms': {'type': 'int', 'description': \"how many\"}}"
    system = f"..following tools:\n1. Book: Books rooms\nParameters: {parameters}\n\n**Steps"
    user = "***Dialogue Records History**\n<user> A room. </user>\n<user> One call. </user>\n"
    (sample,), report = load_rows(
        tmp_path, {"system": system, "user": user, "answer": [answer] if many else answer, "other": {}}
    )
    assert sample.gold.calls == (ToolCall("Book", {"rooms": "2"}),)  # as published, though the schema wants a number
    assert sample.messages == ({"role": "user", "content": "A room.\nOne call."},)
    assert sample.tools[0]["function"]["description"] == "Books rooms"
    assert (report.kept, report.reasons) == (1, {"number_as_string": 1})


def test_toolace(tmp_path: Path) -> None:
    tool = {
        "name": "Get Team Stats",
        "description": "d",
        "parameters": {"type": "dict", "properties": {"team": {"type": "string"}}, "required": ["team"]},
    }
    system = f"You are an expert [really]. Here is a list of functions:\n{json.dumps([tool])}. \nAnswer with [f(a=b)]."
    turns = [
        {"from": "user", "value": "Stats of Ajax?"},
        {"from": "assistant", "value": '[Get Team Stats(team="Ajax"), Get Team Stats(team="PSV")]'},
        {
            "from": "tool",
            "value": '[{"name": "Get Team Stats", "results": 1}, {"name": "Get Team Stats", "results": 2}]',
        },
        {"from": "assistant", "value": "One and two."},
    ]
    (first, second), report = load_rows(tmp_path, {"system": system, "conversations": turns})
    assert (report.sources, report.kept) == ({"toolace": 1}, 1)
    assert [call.arguments for call in first.gold.calls] == [{"team": "Ajax"}, {"team": "PSV"}]
    assert first.tools[0]["function"]["parameters"]["type"] == "object"
    assert [message.get("content") for message in second.messages] == ["Stats of Ajax?", "", "1", "2"]
    turns[1]["value"] = "[Get Team Stats(team=]"
    samples, report = load_rows(tmp_path, {"system": system, "conversations": turns})
    assert (samples, report.reasons) == ([], {"bad_turn": 1, "broken_history": 1})


def test_a_system_text_without_tools_is_sharegpt(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Salve."}]
    sample = load_one(tmp_path, {"system": "Speak Latin [always].", "conversations": turns})
    assert sample.messages[0] == {"role": "system", "content": "Speak Latin [always]."}
    assert source_of({"system": "Speak Latin.", "conversations": turns}) == "messages"
    assert source_of({"system": 'Use [{"name": "f"}].', "conversations": turns}) == "toolace"
    _, report = load_rows(tmp_path, {"system": "Speak Latin.", "conversations": turns}, source="toolace")
    assert report.reasons == {"bad_tool_schema": 1}


def test_toolace_with_its_own_prompts(tmp_path: Path) -> None:
    system = 'Functions: [{"name": "f", "parameters": {"type": "dict", "properties": {}}}]'
    turns = [{"from": "user", "value": "?"}, {"from": "assistant", "value": "[f()]"}]
    sample = load_one(tmp_path, {"system": system, "conversations": turns}, keep_prompts=True)
    assert sample.tools_in_prompt
    assert sample.messages[0]["content"] == system


def test_xlam(tmp_path: Path) -> None:
    arguments = {"city": {"type": "str", "description": "c"}, "days": {"type": "int, optional", "default": 1}}
    row = {
        "id": 7,
        "query": "Weather?",
        "tools": json.dumps([{"name": "get_weather", "description": "d", "parameters": arguments}]),
        "answers": json.dumps([{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}]),
    }
    sample = load_one(tmp_path, row)
    assert (sample.id, sample.kind, sample.gold.calls) == ("7", "single", (CALL,))
    schema = sample.tools[0]["function"]["parameters"]
    assert (schema["required"], schema["properties"]["days"]["type"]) == (["city"], "integer")
    _, report = load_rows(
        tmp_path, {**row, "answers": "[{"}, {**row, "answers": '[{"name": 3}]'}, {**row, "query": None}
    )
    assert report.reasons == {"bad_gold": 2, "bad_row": 1}


def test_api_bank_training(tmp_path: Path) -> None:
    searcher = {"apiCode": "ToolSearcher", "description": "d", "parameters": {"keywords": {"type": "str"}}}
    found = "{'name': 'Route', 'description': 'd', 'input_parameters': {'to': {'type': 'str'}}}"
    search = f"API-Request: [ToolSearcher(keywords='route')]->{found}"
    given_text = f"{json.dumps(searcher)}\nUser: The way to Rome?\n{search}\nGenerate API Request: "
    instruction = "Generate an API request ...\nAPI-Request: [ApiName(key1='value1')]\n\nAPI descriptions:\n"
    rows = [
        {"instruction": instruction, "input": given_text, "output": output}
        for output in (
            "API-Request: [Route(to='Rome')]",
            "API-Request: [Route(to=Rome, Italy)]",
            "API-Request: Route",
            "AI: There.",
        )
    ]
    samples, report = load_rows(tmp_path, *rows)
    assert report.sources == {"api_bank_train": 4}
    assert report.reasons == {"unquoted_value": 1, "bad_gold": 1, "other_gold": 2}
    assert [sample.gold for sample in samples] == [
        Gold((ToolCall("Route", {"to": "Rome"}),)),
        Gold((ToolCall("Route", {"to": "Rome, Italy"}),)),
        Gold((), "There."),
    ]
    assert [message["role"] for message in samples[0].messages] == ["user", "assistant", "tool"]
    assert [tool["function"]["name"] for tool in samples[0].tools] == ["ToolSearcher", "Route"]
    kept, _ = load_rows(tmp_path, rows[0], keep_prompts=True)
    assert kept[0].messages[0]["content"] == instruction + given_text


def test_our_own_rows(tmp_path: Path) -> None:
    samples = tool_world(0, 5)
    read_back, report = load_rows(tmp_path, *map(to_json, samples))
    assert (read_back, report.sources) == (samples, {"samples": 5})


def test_a_named_source_is_used(tmp_path: Path) -> None:
    assert (
        load_one(
            tmp_path,
            {"conversations": [QUESTION, {"role": "assistant", "content": "y"}], "system": "Be brief."},
            source="messages",
        ).messages[0]["role"]
        == "system"
    )
    _, report = load_rows(tmp_path, RAW, source="xlam")
    assert report.reasons == {"bad_row": 1}
    with pytest.raises(ValueError, match="expected auto, samples"):
        CheckConfig(source="csv")


def test_shapes_are_recognized_by_their_keys() -> None:
    assert set(SHAPES) == {"samples", "messages", "toolrl", "toolace", "xlam", "api_bank", "api_bank_train"}
    assert source_of({"question": 1}) is None
    assert source_of({"messages": []}) == "messages"
