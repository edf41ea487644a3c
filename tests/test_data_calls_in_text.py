"""Calls written into text become calls, broken ones are rejected, and answers stay answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_rl.data.schemas import read_tools
from rest_rl.data.shapes.calls_in_text import find_calls
from rest_rl.formats import FORMATS
from rest_rl.response import Gold, ToolCall
from tests.made_up_rows import ARGUMENTS, CALL, QUESTION, WEATHER, load_rows

TOOLS = read_tools([WEATHER, {"name": "stop", "description": "Stop", "parameters": {}}])
OBJECT = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
LLAMA = f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}'
PYTHON = "{'name': 'get_weather', 'arguments': {'city': 'Oslo', 'days': 2}}"
GLAIVE = f"""{{"name": "get_weather", "arguments": '{ARGUMENTS}'}}"""
PARAMETERS = "<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>"
WRITTEN = {
    "hermes": f"<tool_call>\n{OBJECT}\n</tool_call>",
    "hermes, parameters": f"<tool_call>{LLAMA}</tool_call>",
    "hermes, Python": f"<tool_call>\n{PYTHON}\n</tool_call>",
    "hermes, not closed": f"<tool_call>\n{OBJECT}",
    "mistral": f"[TOOL_CALLS] [{OBJECT}]",
    "mistral_v11": f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}",
    "llama3": LLAMA,
    "llama3 with its tag": f"<|python_tag|>{LLAMA}<|eom_id|>",
    "llama3, wrapped": f'{{"type": "function", "function": {LLAMA}}}',
    "llama3, Python": PYTHON,
    "llama3's functions": f"<function=get_weather>{ARGUMENTS}</function>",
    "a list": f"[{OBJECT}]",
    "pythonic": '[get_weather(city="Oslo", days=2)]',
    "pythonic with its tags": '<|python_start|>[get_weather(city="Oslo", days=2)]<|python_end|>',
    "qwen3_coder": f"<tool_call>\n<function=get_weather>\n{PARAMETERS}\n</function>\n</tool_call>",
    "qwen3_coder, bare": f"<function=get_weather>\n{PARAMETERS}\n</function>",
    "Glaive": f"<functioncall> {GLAIVE} <|endoftext|>",
    "Glaive, JSON": f"<functioncall> {OBJECT}",
}
TWICE = {
    "hermes": f"<tool_call>{OBJECT}</tool_call>\n<tool_call>{OBJECT}</tool_call>",
    "lines in one tag": f"<tool_call>\n{OBJECT}\n{PYTHON}\n</tool_call>",
    "llama3": f"{LLAMA}; {LLAMA}",
    "llama3 lines": f"{LLAMA}\n{LLAMA}",
    "Glaive": f"<functioncall> {GLAIVE}\n<functioncall> {GLAIVE}",
    "pythonic": "[get_weather(city='Oslo', days=2), get_weather(city='Oslo', days=2)]",
}
BROKEN = [
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Os',
    "<tool_call>\n",
    "<tool_call>{oops}</tool_call>",
    '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city"',
    '<|python_tag|>brave_search.call(query="Oslo")',
    "<|python_start|>[get_weather(city=Oslo)]<|python_end|>",
    "<functioncall> get_weather",
    "<function=get_weather>\n<parameter=city>\nOslo",
    '{"name": "get_weather", "parameters": {"city": "Oslo"',
    f"{LLAMA} That was the call.",
    f'[{OBJECT}, {{"name": "no_such_tool", "arguments": {{}}}}]',
    "[get_weather(city=Oslo)]",
    '[get_weather("Oslo")]',
]
PLAIN = [
    "It rains.",
    "",
    '{"temperature": 3, "sky": "grey"}',
    '{"name": "Oslo", "parameters": {"population": 700000}}',
    '{"name": "get_weather"}',
    json.dumps(WEATHER),
    json.dumps([WEATHER]),
    json.dumps({"type": "function", "function": WEATHER}),
    '{"name": "stop", "description": "Stop", "parameters": {}}',
    f"{json.dumps(WEATHER)}\n{json.dumps(WEATHER)}",
    "[1, 2, 3]",
    '["get_weather", "stop"]',
    "[1] a source (2024)\n[2] another",
    "[Oslo](https://example.org) is the capital.",
    "[sin(x), cos(x)]",
    "[get_weather] takes a city.",
    "[TOOL_CALLS] is what Mistral's models write.",
    "A call stands in `<tool_call>` tags, or after '<functioncall>'.",
    "The <tool_call> tag opens a call.",
    'In Python:\n```python\nprint(get_weather(city="Oslo", days=2))\n```',
    'In Python:\n```python\n[get_weather(city="Oslo", days=2)]\n```',
    f"Such as:\n```json\n{LLAMA}\n```",
    "{{ a template }} and {braces",
]


@pytest.mark.parametrize("beside", ["", "I look it up."])
@pytest.mark.parametrize("kind", WRITTEN)
def test_calls_in_text_become_calls(kind: str, beside: str) -> None:
    found = find_calls(f"{beside}\n{WRITTEN[kind]}\n", TOOLS)
    assert found is not None
    assert (found.calls, found.said) == ((CALL,), beside)


@pytest.mark.parametrize("kind", TWICE)
def test_several_calls_in_the_text(kind: str) -> None:
    found = find_calls(TWICE[kind], TOOLS)
    assert found is not None
    assert (found.calls, found.said) == ((CALL, CALL), "")


@pytest.mark.parametrize("text", BROKEN)
def test_an_unreadable_call_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        find_calls(text, TOOLS)


@pytest.mark.parametrize("text", PLAIN)
def test_answers_stay_answers(text: str) -> None:
    assert find_calls(text, TOOLS) is None


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "toolrl"])
@given(st.dictionaries(st.sampled_from(["city", "days"]), st.text() | st.integers() | st.lists(st.none())))
def test_calls_written_by_a_format_are_read(name: str, arguments: dict[str, Any]) -> None:
    free = read_tools([{"name": "get_weather", "parameters": {"type": "object"}}])
    call = ToolCall("get_weather", arguments)
    found = find_calls(FORMATS[name].render(None, [call, call], None), free)
    assert found is not None
    assert (found.calls, found.said) == ((call, call), "")


@given(
    st.text(st.sampled_from("[]{}()<>\"=:,;'` \nae|_")) | st.lists(st.sampled_from([*BROKEN, *PLAIN])).map("\n".join)
)
def test_any_text_gives_calls_an_error_or_an_answer(text: str) -> None:
    try:
        found = find_calls(text, TOOLS)
    except ValueError:
        return
    assert found is None or found.calls


def test_a_number_in_a_text_where_the_schema_says_string_stays_text() -> None:
    tools = read_tools([{"name": "post", "parameters": {"zip": {"type": "string"}, "n": {"type": "integer"}}}])
    text = "<function=post>\n<parameter=zip>\n12\n</parameter>\n<parameter=n>\n12\n</parameter>\n</function>"
    found = find_calls(text, tools)
    assert found is not None
    assert found.calls == (ToolCall("post", {"zip": "12", "n": 12}),)


def test_an_apostrophe_in_the_arguments_of_glaive() -> None:
    text = """<functioncall> {"name": "get_weather", "arguments": '{"city": "L'Aquila"}'}"""
    found = find_calls(text, TOOLS)
    assert found is not None
    assert found.calls == (ToolCall("get_weather", {"city": "L'Aquila"}),)


def turns(text: str) -> dict[str, Any]:
    said = {"role": "assistant", "content": f"<think>A call.</think>\n{text}"}
    result, answer = {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "It rains."}
    return {"messages": [QUESTION, said, result, answer], "tools": [WEATHER]}


@pytest.mark.parametrize("sharegpt", [False, True])
def test_gold_and_history_contain_the_calls(tmp_path: Path, sharegpt: bool) -> None:
    row = turns(f"I look.\n{LLAMA}")
    if sharegpt:
        names = {"user": "human", "assistant": "gpt", "tool": "observation"}
        shared = [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]
        row = {"conversations": shared, "tools": json.dumps([WEATHER])}
    (first, second), report = load_rows(tmp_path, row)
    assert (report.repaired, report.reasons) == (1, {"call_as_text": 1})
    assert (first.gold, first.thought, first.preamble) == (Gold((CALL,)), "A call.", "I look.")
    told = second.messages[1]
    assert (told["content"], told["tool_calls"][0]["function"]["arguments"]) == ("I look.", CALL.arguments)


def test_an_unreadable_turn_rejects_itself_and_later_turns(tmp_path: Path) -> None:
    samples, report = load_rows(tmp_path, turns('{"name": "get_weather", "parameters": {"city'))
    assert (samples, report.reasons) == ([], {"bad_turn": 1, "broken_history": 1})


def test_without_tools_only_a_tag_makes_a_call(tmp_path: Path) -> None:
    plain = {"messages": [QUESTION, {"role": "assistant", "content": LLAMA}]}
    tagged = {"messages": [{**QUESTION, "content": "Rome?"}, {"role": "assistant", "content": WRITTEN["hermes"]}]}
    (sample,), report = load_rows(tmp_path, plain, tagged)
    assert sample.gold == Gold((), LLAMA)
    assert report.reasons == {"call_as_text": 1, "unknown_tool": 1}
