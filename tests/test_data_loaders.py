"""Every loader on rows of the shape that its data set documents; the rows are made up."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_rl.data.check import CheckConfig, Report, read_checked
from rest_rl.data.loaders import SOURCES, source_of
from rest_rl.data.samples import ToolSample, to_json
from rest_rl.data.tool_schemas import json_type, read_tools
from rest_rl.data.tool_world import tool_world
from rest_rl.response import Gold, ToolCall

WEATHER = {
    "name": "get_weather",
    "description": "The weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
WRAPPED = {"type": "function", "function": WEATHER}
CALL = ToolCall("get_weather", {"city": "Oslo", "days": 2})
ASKED = {"role": "user", "content": "Weather in Oslo?"}
ARGUMENTS = '{"city": "Oslo", "days": 2}'


def read(tmp_path: Path, *rows: Any, **settings: Any) -> tuple[list[ToolSample], Report]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return read_checked(str(path), CheckConfig(**settings))


def one(tmp_path: Path, row: Any, **settings: Any) -> ToolSample:
    (sample,), report = read(tmp_path, row, **settings)
    assert report.reasons == {}
    assert sum(report.sources.values()) == 1
    return sample


# messages


@pytest.mark.parametrize("tools", [[WRAPPED], [WEATHER], json.dumps([WEATHER]), [json.dumps(WRAPPED)], WRAPPED])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_as_they_are_written(tmp_path: Path, tools: Any, key: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
    row = {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}], key: tools}
    sample = one(tmp_path, row)
    assert sample.tools == (WRAPPED,)
    assert (sample.messages, sample.gold) == ((ASKED,), Gold((CALL,), None))


TURNS = {
    "text arguments": {"tool_calls": [{"function": {"name": "get_weather", "arguments": ARGUMENTS}}]},
    "object arguments": {"tool_calls": [{"function": {"name": "get_weather", "arguments": json.loads(ARGUMENTS)}}]},
    "bare calls": {"tool_calls": [{"name": "get_weather", "arguments": json.loads(ARGUMENTS)}]},
    "calls as text": {"tool_calls": json.dumps([{"name": "get_weather", "parameters": json.loads(ARGUMENTS)}])},
    "one call": {"tool_calls": {"name": "get_weather", "arguments": ARGUMENTS}},
    "function_call": {"content": None, "function_call": {"name": "get_weather", "arguments": ARGUMENTS}},
    "hermes": {"content": f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'},
}


@pytest.mark.parametrize("kind", TURNS)
def test_calls_as_they_are_written(tmp_path: Path, kind: str) -> None:
    sample = one(tmp_path, {"messages": [ASKED, {"role": "assistant", **TURNS[kind]}], "tools": [WEATHER]})
    assert sample.gold == Gold((CALL,), None)


def test_sharegpt_roles(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Weather in Oslo?"},
        {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": json.loads(ARGUMENTS)})},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Rain."},
    ]
    (first, second), report = read(tmp_path, {"conversations": turns, "tools": json.dumps([WEATHER])})
    assert report.sources == {"messages": 1}
    assert (first.gold.calls, second.gold.answer) == ((CALL,), "Rain.")
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("given_role", "role"), [("developer", "system"), ("function", "tool"), ("ipython", "tool"), ("human", "user")]
)
def test_roles_have_one_name(tmp_path: Path, given_role: str, role: str) -> None:
    first = {"role": given_role, "content": "x", "name": "n", "tool_call_id": "c"}
    sample = one(tmp_path, {"messages": [first, {"role": "assistant", "content": "y"}]})
    assert sample.messages == ({"role": role, "content": "x", "name": "n", "tool_call_id": "c"},)


def test_content_parts_are_joined_if_they_are_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Weather "}, "in Oslo?"]
    assert one(
        tmp_path, {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "y"}]}
    ).messages == (ASKED,)
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    _, report = read(
        tmp_path, {"messages": [{"role": "user", "content": picture}, {"role": "assistant", "content": "y"}]}
    )
    assert report.reasons == {"bad_turn": 1, "broken_history": 1}


def test_an_empty_tool_result_and_objects_are_results(tmp_path: Path) -> None:
    call = {
        "role": "assistant",
        "tool_calls": [{"id": "c", "function": {"name": "get_weather", "arguments": ARGUMENTS}}],
    }
    results = [{"role": "tool", "content": None, "tool_call_id": "c"}, {"role": "tool", "content": {"sky": "grey"}}]
    (_, last), report = read(
        tmp_path, {"messages": [ASKED, call, *results, {"role": "assistant", "content": "."}], "tools": [WEATHER]}
    )
    assert report.kept == 1
    assert last.messages[1]["tool_calls"][0]["id"] == "c"
    assert last.messages[2:] == (
        {"role": "tool", "content": "", "tool_call_id": "c"},
        {"role": "tool", "content": '{"sky": "grey"}'},
    )


def test_arguments_written_as_python_are_repaired(tmp_path: Path) -> None:
    call = {"function": {"name": "get_weather", "arguments": "{'city': 'Oslo', 'days': 2}"}}
    (sample,), report = read(
        tmp_path, {"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}], "tools": [WEATHER]}
    )
    assert sample.gold.calls == (CALL,)
    assert (report.repaired, report.reasons) == (1, {"arguments_as_python": 1})


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_the_thought(tmp_path: Path, field: str) -> None:
    turn = {"role": "assistant", "content": "y", field: "I know."}
    assert one(tmp_path, {"messages": [ASKED, turn]}).thought == "I know."


@pytest.mark.parametrize(
    "tools",
    [
        "[{",
        "get_weather",
        [3],
        [{"description": "nameless"}],
        [{"name": "f", "parameters": "city"}],
        [{"name": "f", "parameters": ["city"]}],
        [{"name": "f", "parameters": {"type": "object", "properties": ["city"]}}],
        [{"name": "f", "parameters": {"type": "object", "properties": {"city": "string"}}}],
        [{"name": "f", "parameters": {"city": "string"}}],
        [{"name": "f", "parameters": {"type": 3, "properties": {}}}],
        [{"name": "f", "parameters": {"type": "object", "properties": {}, "required": "city"}}],
        [{"name": "f", "parameters": {"type": "object", "properties": {"c": {"enum": "ab"}}}}],
    ],
)
def test_a_tool_schema_that_is_no_schema(tmp_path: Path, tools: Any) -> None:
    turns = [ASKED, {"role": "assistant", "content": "y"}]
    samples, report = read(tmp_path, {"messages": turns}, {"messages": turns, "tools": tools})
    assert (len(samples), report.kept, report.reasons) == (1, 1, {"bad_tool_schema": 1})
    assert report.findings[0].row == 2


# K assistant turns


@st.composite
def dialogues(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turns whose texts are all different, so that a leak or a loss shows."""
    kinds = draw(st.lists(st.sampled_from(["user", "assistant", "call", "tool", "empty", "stray"]), max_size=9))
    messages: list[dict[str, Any]] = [{"role": "user", "content": "<0>"}]
    for number, kind in enumerate(kinds, 1):
        call = {
            "function": {"name": "stray" if kind == "stray" else "get_weather", "arguments": {"city": f"<{number}>"}}
        }
        messages.append(
            {"role": "assistant", "content": None, "tool_calls": [call]}
            if kind in ("call", "stray")
            else {"role": "assistant", "content": ""}
            if kind == "empty"
            else {"role": kind, "content": f"<{number}>"}
        )
    return messages


@given(dialogues(), st.integers(0, 12))
def test_k_turns_are_k_samples(
    tmp_path_factory: pytest.TempPathFactory, messages: list[dict[str, Any]], broken_at: int
) -> None:
    """Each turn gives its sample or its finding; no prompt has its own turn, and each is the beginning of the next."""
    if broken_at < len(messages) and messages[broken_at].get("tool_calls"):
        messages[broken_at]["tool_calls"][0]["function"]["arguments"] = "{broken"
    row = {"messages": messages, "tools": [WEATHER]}
    samples, report = read(tmp_path_factory.mktemp("dialogue"), row)
    turns = sum(message["role"] == "assistant" for message in messages)
    lost = [f for _, _, f in report.findings if f.severity == "rejected" and f.reason != "no_assistant_turn"]
    assert len(samples) + len(lost) == turns
    assert report.rows == report.kept + report.repaired + report.rejected == 1
    assert report.kept == (turns > 0 and not lost)
    read_messages = messages[:broken_at] if any(f.reason == "bad_turn" for f in lost) else messages
    for before, sample in itertools.pairwise(samples):
        assert sample.messages[: len(before.messages)] == before.messages
    for sample in samples:
        own = json.dumps([sample.gold.answer, [call.arguments for call in sample.gold.calls]])
        shown = json.dumps(sample.messages)
        marks = [f"<{n}>" for n in range(len(messages)) if f"<{n}>" in own]
        assert len(marks) == 1
        assert marks[0] not in shown
        assert [m["role"] for m in sample.messages] == [m["role"] for m in read_messages[: len(sample.messages)]]
        for message, kept in zip(messages, sample.messages, strict=False):
            assert not message.get("content") or message["content"] == kept["content"]
            calls = [call["function"]["arguments"] for call in kept.get("tool_calls", ())]
            assert calls == [call["function"]["arguments"] for call in message.get("tool_calls") or ()]


def test_a_turn_that_is_wrong_as_gold_is_still_history(tmp_path: Path) -> None:
    call = {"function": {"name": "no_such_tool", "arguments": "{}"}}
    turns = [
        ASKED,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "?"},
        {"role": "assistant", "content": "Sorry."},
    ]
    (sample,), report = read(tmp_path, {"messages": turns, "tools": [WEATHER]})
    assert (sample.gold.answer, len(sample.messages)) == ("Sorry.", 3)
    assert (report.repaired, report.reasons) == (1, {"unknown_tool": 1})
    assert report.findings[0].finding.sample == "rows-1/0"


# published shapes

SYSTEM = """You are a helpful assistant.

**Available Tools**
In your response, you can use the following tools:
1. Name: get weather
Description: The weather
of a city
Parameters: {"city": {"type": "string", "default": ""}, "days": {"type": "int, optional", "default": ""}}
2. Name: stop
Description: Stop
Parameters: {}

**Steps for Each Turn**
1. **Think:** ..."""
HISTORY = """**Dialogue Records History**
<user> Hello </user>

<think> greet </think>
<response> Hi </response>

<user> Oslo? </user>

<think> call </think>
<tool_call>
{"name": "get weather", "parameters": {"city": "Oslo"}}
{"name": "stop", "parameters": {}}
</tool_call>
<obs> [{"name": "get weather", "results": {"sky": "grey"}}, {"name": "stop", "results": "ok"}] </obs>
"""
OUTPUT = """<think> I could write <tool_call> {"name": "stop", "parameters": {}} </tool_call> here. </think>
<tool_call>
{"name": "get weather", "parameters": {"city": "Rome"}}
</tool_call>"""
RAW = {"instruction": SYSTEM, "input": HISTORY, "output": OUTPUT}
ROWS = {
    "raw": RAW,
    "parquet": {
        "data_source": "rlla",
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": HISTORY}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": OUTPUT},
        "extra_info": {"split": "train", "index": 0, "instruction": SYSTEM, "input": HISTORY, "output": OUTPUT},
    },
}


@pytest.mark.parametrize("kind", ROWS)
def test_toolrl(tmp_path: Path, kind: str) -> None:
    (sample,), report = read(tmp_path, ROWS[kind])
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
    (sample,), _ = read(tmp_path, RAW, keep_prompts=True)
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
    samples, report = read(tmp_path, RAW, {**RAW, **change}, keep=("duplicate",))
    assert (len(samples), report.rejected, report.findings[-1].finding.reason) == (1, 1, reason)


@pytest.mark.parametrize("many", [True, False])
def test_api_bank(tmp_path: Path, many: bool) -> None:
    answer = {"name": "Book", "parameters": {"rooms": "2"}}
    parameters = "{'rooms': {'type': 'int', 'description': \"how many\"}}"
    system = f"..following tools:\n1. Book: Books rooms\nParameters: {parameters}\n\n**Steps"
    user = "***Dialogue Records History**\n<user> A room. </user>\n<user> One call. </user>\n"
    (sample,), report = read(
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
    (first, second), report = read(tmp_path, {"system": system, "conversations": turns})
    assert (report.sources, report.kept) == ({"toolace": 1}, 1)
    assert [call.arguments for call in first.gold.calls] == [{"team": "Ajax"}, {"team": "PSV"}]
    assert first.tools[0]["function"]["parameters"]["type"] == "object"
    assert [message.get("content") for message in second.messages] == ["Stats of Ajax?", "", "1", "2"]
    turns[1]["value"] = "[Get Team Stats(team=]"
    samples, report = read(tmp_path, {"system": system, "conversations": turns})
    assert (samples, report.reasons) == ([], {"bad_turn": 1, "broken_history": 1})


def test_toolace_with_its_own_prompts(tmp_path: Path) -> None:
    system = 'Functions: [{"name": "f", "parameters": {"type": "dict", "properties": {}}}]'
    turns = [{"from": "user", "value": "?"}, {"from": "assistant", "value": "[f()]"}]
    sample = one(tmp_path, {"system": system, "conversations": turns}, keep_prompts=True)
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
    sample = one(tmp_path, row)
    assert (sample.id, sample.kind, sample.gold.calls) == ("7", "single", (CALL,))
    schema = sample.tools[0]["function"]["parameters"]
    assert (schema["required"], schema["properties"]["days"]["type"]) == (["city"], "integer")
    _, report = read(tmp_path, {**row, "answers": "[{"}, {**row, "answers": '[{"name": 3}]'}, {**row, "query": None})
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
    samples, report = read(tmp_path, *rows)
    assert report.sources == {"api_bank_train": 4}
    assert report.reasons == {"unquoted_value": 1, "bad_gold": 1, "other_gold": 2}
    assert [sample.gold for sample in samples] == [
        Gold((ToolCall("Route", {"to": "Rome"}),)),
        Gold((ToolCall("Route", {"to": "Rome, Italy"}),)),
        Gold((), "There."),
    ]
    assert [message["role"] for message in samples[0].messages] == ["user", "assistant", "tool"]
    assert [tool["function"]["name"] for tool in samples[0].tools] == ["ToolSearcher", "Route"]
    kept, _ = read(tmp_path, rows[0], keep_prompts=True)
    assert kept[0].messages[0]["content"] == instruction + given_text


def test_our_own_rows(tmp_path: Path) -> None:
    samples = tool_world(0, 5)
    read_back, report = read(tmp_path, *map(to_json, samples))
    assert (read_back, report.sources) == (samples, {"samples": 5})


def test_a_source_that_is_named_is_used(tmp_path: Path) -> None:
    assert (
        one(
            tmp_path,
            {"conversations": [ASKED, {"role": "assistant", "content": "y"}], "system": "Be brief."},
            source="messages",
        ).messages[0]["role"]
        == "system"
    )
    _, report = read(tmp_path, RAW, source="xlam")
    assert report.reasons == {"bad_row": 1}
    with pytest.raises(ValueError, match="expected auto or one of samples"):
        CheckConfig(source="csv")


def test_shapes_are_told_by_their_keys() -> None:
    assert set(SOURCES) == {"samples", "messages", "toolrl", "toolace", "xlam", "api_bank", "api_bank_train"}
    assert source_of({"question": 1}) is None
    assert source_of({"messages": []}) == "messages"


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("str", {"type": "string"}),
        ("int, optional", {"type": "integer"}),
        ("List[List[float]]", {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
        ("list(str)", {"type": "array", "items": {"type": "string"}}),
        ("Tuple[float, float]", {"type": "array", "items": {"type": "number"}}),
        ("List[Union[int, float]]", {"type": "array", "items": {"type": "number"}}),
        ("Union[str, int]", {"type": ["string", "integer"]}),
        ("Optional[bool]", {"type": "boolean"}),
        ("Dict[str, int]", {"type": "object"}),
        ("['string', 'null']", {"type": ["string", "null"]}),
        ("Callable[[float], float]", {}),
        ("any", {}),
        ("", {}),
    ],
)
def test_types_as_people_write_them(text: str, schema: dict[str, Any]) -> None:
    assert json_type(text) == schema


def test_a_type_that_json_lacks_is_said_in_words() -> None:
    (tool,) = read_tools([{"name": "f", "parameters": {"g": {"type": "Callable", "description": "a function"}}}])
    assert tool["function"]["parameters"]["properties"]["g"] == {"description": "a function (Callable)"}
