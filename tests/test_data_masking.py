"""Masked names are consistent within a sample and reversible."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_rl.data.gold import check_against_tools
from rest_rl.data.mask import NameMap, draw_names, mask_names, rename_sample
from rest_rl.data.samples import Dialogue, ToolSample, decompose
from rest_rl.data.tool_world import tool_world
from rest_rl.response import Gold, ToolCall

PROPERTY = st.fixed_dictionaries({"type": st.just("string"), "description": st.text()})
NAMES = st.text("abcdefgh_.- /", min_size=1, max_size=6)
SCHEMAS = st.dictionaries(NAMES, PROPERTY, max_size=3)


@st.composite
def samples(draw: st.DrawFn) -> ToolSample:
    """The last turn of a dialogue of calls and results, with names that occur in its texts as well."""
    schemas = draw(st.dictionaries(NAMES, SCHEMAS, min_size=1, max_size=3))
    tools = tuple(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": name,
                "parameters": {"type": "object", "properties": p, "required": list(p)[:1]},
            },
        }
        for name, p in schemas.items()
    )
    messages: list[dict[str, Any]] = [{"role": "user", "content": " ".join(schemas)}]
    for name in draw(st.lists(st.sampled_from(sorted(schemas)), min_size=1, max_size=3)):
        call = {"function": {"name": name, "arguments": dict.fromkeys(schemas[name], "v")}}
        thought = f'I call {name} with "{next(iter(schemas[name]), "")}".'
        messages += [
            {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [call]},
            {"role": "tool", "name": name, "content": name},
        ]
    return decompose(Dialogue(draw(st.text(min_size=1)), tuple(messages), tools))[-1]


def names_in(sample: ToolSample) -> Iterator[str]:
    for tool in sample.tools:
        yield tool["function"]["name"]
        yield from tool["function"]["parameters"]["properties"]
        yield from tool["function"]["parameters"]["required"]
    for call in sample.gold.calls:
        yield call.name
        yield from call.arguments
    for message in sample.messages:
        yield from [message["name"]] if "name" in message else []
        for call in message.get("tool_calls", ()):
            yield call["function"]["name"]
            yield from call["function"]["arguments"]


@given(samples(), st.integers())
def test_the_inverse_map_restores(sample: ToolSample, seed: int) -> None:
    sample = replace(sample, thought=None)
    names = draw_names(sample, random.Random(seed))
    new = rename_sample(sample, names)
    back = {names.tools[tool]: {new: old for old, new in keys.items()} for tool, keys in names.arguments.items()}
    assert rename_sample(new, NameMap({new: old for old, new in names.tools.items()}, back)) == sample
    assert not set(names_in(new)) & set(names_in(sample))
    assert len(set(names.tools.values())) == len(names.tools)


@given(samples(), st.integers())
def test_a_masked_sample_stays_valid(sample: ToolSample, seed: int) -> None:
    """Its gold fits its tools as it did, and nothing but names has changed."""
    new = mask_names(sample, 1.0, seed)
    assert [found.reason for found in check_against_tools(new)[1]] == [
        found.reason for found in check_against_tools(sample)[1]
    ]
    assert [tool["function"]["description"] for tool in new.tools] == [
        tool["function"]["description"] for tool in sample.tools
    ]
    assert [message["content"] for message in new.messages] == [message["content"] for message in sample.messages]
    assert [list(call.arguments.values()) for call in new.gold.calls] == [
        list(call.arguments.values()) for call in sample.gold.calls
    ]


def test_the_share_is_kept_and_drawn_by_seed_and_id() -> None:
    world = tool_world(0, 2000)
    new = [mask_names(sample, 0.3, 0) for sample in world]
    count = sum(a != b for a, b in zip(world, new, strict=True))
    # 0.3 * 2000 = 600 with a standard deviation of sqrt(2000 * 0.3 * 0.7) = 20.5; five of them
    assert abs(count - 600) < 103
    assert [mask_names(sample, 0.3, 0) for sample in reversed(world)][::-1] == new
    assert [mask_names(sample, 0.3, 1) for sample in world] != new
    assert [mask_names(sample, 0.0, 0) for sample in world] == world
    assert all(a != b for a, b in zip(world, (mask_names(sample, 1.0, 0) for sample in world), strict=True))


def test_the_reasoning_uses_the_new_names() -> None:
    sample = next(each for each in tool_world(0, 20) if each.gold.calls and each.thought)
    new = mask_names(sample, 1.0, 0)
    (call, *_), (old, *_) = new.gold.calls, sample.gold.calls
    assert new.thought is not None
    assert f'"{call.name}"' in new.thought
    assert all(f'"{key}"' in new.thought for key in call.arguments)
    assert old.name not in json.dumps([new.thought, new.tools])


def test_the_preamble_uses_the_new_names() -> None:
    sample = next(each for each in tool_world(0, 20) if each.gold.calls)
    new = mask_names(replace(sample, thought=None, preamble=f"I use `{sample.gold.calls[0].name}`."), 1.0, 0)
    assert (new.thought, new.preamble) == (None, f"I use `{new.gold.calls[0].name}`.")


def tool(name: str, *arguments: str) -> dict[str, Any]:
    properties = {argument: {"type": "string"} for argument in arguments}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = (tool("weather", "city", "day"), tool("trains", "city", "from_time"), tool("search", "city", "search"))
NEW_NAMES = NameMap(
    {"weather": "T1", "trains": "T2", "search": "T3"},
    {
        "weather": {"city": "A1", "day": "A2"},
        "trains": {"city": "B1", "from_time": "B2"},
        "search": {"city": "C1", "search": "C2"},
    },
)


def thought_of(text: str, *called: str) -> str | None:
    calls = tuple(ToolCall(name, {"city": "Oslo"}) for name in called)
    sample = ToolSample("s", ({"role": "user", "content": "?"},), TOOLS, Gold(calls), text)
    new = rename_sample(sample, NEW_NAMES)
    assert [call.arguments for call in new.gold.calls] == [
        {NEW_NAMES.arguments[name]["city"]: "Oslo"} for name in called
    ]
    return new.thought


@pytest.mark.parametrize(
    ("called", "old", "new"),
    [
        (["weather"], "I give `city` and `day`.", "I give `A1` and `A2`."),
        (["trains"], "I give `city` and `day`.", "I give `B1` and `A2`."),  # only weather has a day
        (["weather", "trains"], "I give 'city' and 'day'.", "I give 'city' and 'A2'."),
        ([], 'No "city" for "day".', 'No "city" for "A2".'),
        (["search"], 'I "search" for "city".', 'I "search" for "C1".'),  # the tool or its argument
        (["weather"], 'The "trains" tool.', 'The "T2" tool.'),
    ],
)
def test_an_argument_takes_the_new_name_of_the_called_tool(called: list[str], old: str, new: str) -> None:
    assert thought_of(old, *called) == new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("I search for the weather of the day in the city.", None),
        ("It trains, weather or not; don't search.", None),
        ("The from_time is 9, not my_from_time or from_times.", "The B2 is 9, not my_from_time or from_times."),
        ("First from_time. Then `weather`.", "First B2. Then `T1`."),
    ],
)
def test_ordinary_words_stay(old: str, new: str | None) -> None:
    assert thought_of(old, "trains") == (new or old)


@pytest.mark.parametrize("name", ["getWeather", "get_weather", "api.get", "GetWeather2"])
def test_identifiers_are_renamed_without_quotes(name: str) -> None:
    sample = ToolSample("s", ({"role": "user", "content": "?"},), (tool(name),), Gold(), f"I use {name}.")
    assert rename_sample(sample, NameMap({name: "T"}, {name: {}})).thought == "I use T."


@pytest.mark.parametrize("name", ["weather", "Weather", "API", "get weather", "get-weather", "a."])
def test_names_that_look_like_words_need_quotes(name: str) -> None:
    sample = ToolSample("s", ({"role": "user", "content": "?"},), (tool(name),), Gold(), f"I use {name} and `{name}`.")
    assert rename_sample(sample, NameMap({name: "T"}, {name: {}})).thought == f"I use {name} and `T`."


def test_text_next_to_earlier_calls_is_renamed() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    said = {"role": "assistant", "content": "I give `city` to `weather`.", "tool_calls": [call]}
    answer = {"role": "assistant", "content": "The `city` is wet."}
    new = rename_sample(ToolSample("s", (said, answer), TOOLS, Gold((), "y")), NEW_NAMES)
    assert [message["content"] for message in new.messages] == ["I give `A1` to `T1`.", "The `city` is wet."]


def test_a_prompt_that_describes_its_tools_is_not_masked() -> None:
    sample = replace(tool_world(0, 1)[0], tools_in_prompt=True)
    assert mask_names(sample, 1.0, 0) == sample
