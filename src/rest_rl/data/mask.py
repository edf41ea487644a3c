"""Function masking (Hammer, arXiv 2410.04587): random names, so that a model must read the descriptions.

A share of the samples gets its tool and argument names replaced, the same everywhere in the sample: tools, history,
gold, and what is thought and said beside calls. Descriptions and other texts of the dialogue stay.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from rest_rl.data.samples import ToolSample, digest_of
from rest_rl.response import Gold, ToolCall

_FIRST = string.ascii_letters + "_"
_REST = string.ascii_letters + string.digits + "_"
_LIKE_NO_WORD = re.compile(r"\w[_.]\w|[a-z0-9][A-Z]")


class Names(NamedTuple):
    """New names: of tools, and of each tool's arguments under its old name."""

    tools: dict[str, str]
    arguments: dict[str, dict[str, str]]


def masked(sample: ToolSample, share: float, seed: int) -> ToolSample:
    """The sample, masked if its id falls into the share; the same for the same seed and id, whatever stands around it.

    A sample whose messages describe its tools is left as it is.
    """
    rng = random.Random(digest_of([seed, sample.id]))
    if rng.random() >= share or sample.tools_in_prompt:
        return sample
    return renamed(sample, draw_names(sample, rng))


def draw_names(sample: ToolSample, rng: random.Random) -> Names:
    """Random names for all tools and arguments, unlike each other and unlike any that the sample has."""
    arguments = {_name(tool): list(_properties(tool)) for tool in sample.tools}
    for call in [*sample.gold.calls, *_history_calls(sample)]:
        known = arguments.setdefault(call.name, [])
        known += [key for key in call.arguments if key not in known]
    taken = {*arguments, *(name for names in arguments.values() for name in names)}
    return Names(
        {tool: _draw(rng, taken) for tool in arguments},
        {tool: {name: _draw(rng, taken) for name in names} for tool, names in arguments.items()},
    )


def _draw(rng: random.Random, taken: set[str]) -> str:
    while True:
        name = rng.choice(_FIRST) + "".join(rng.choices(_REST, k=rng.randint(4, 11)))
        if name not in taken:
            taken.add(name)
            return name


def renamed(sample: ToolSample, names: Names) -> ToolSample:
    """The sample under other names; a name that the map does not have stays."""
    calls = tuple(_renamed_call(call, names) for call in sample.gold.calls)
    called = [call.name for call in sample.gold.calls]
    return replace(
        sample,
        messages=tuple(_renamed_message(message, names) for message in sample.messages),
        tools=tuple(_renamed_tool(tool, names) for tool in sample.tools),
        gold=Gold(calls, sample.gold.answer),
        thought=None if sample.thought is None else _renamed_text(sample.thought, called, names),
        preamble=None if sample.preamble is None else _renamed_text(sample.preamble, called, names),
    )


def _renamed_call(call: ToolCall, names: Names) -> ToolCall:
    keys = names.arguments.get(call.name, {})
    arguments = {keys.get(key, key): value for key, value in call.arguments.items()}
    return ToolCall(names.tools.get(call.name, call.name), arguments)


def _renamed_message(message: Mapping[str, Any], names: Names) -> dict[str, Any]:
    new = dict(message)
    if message["role"] == "tool" and isinstance(message.get("name"), str):
        new["name"] = names.tools.get(message["name"], message["name"])
    if message.get("tool_calls"):
        called = [call["function"]["name"] for call in message["tool_calls"]]
        if message.get("content"):
            new["content"] = _renamed_text(message["content"], called, names)
        new["tool_calls"] = [
            {**call, "function": _renamed_function(call["function"], names)} for call in message["tool_calls"]
        ]
    return new


def _renamed_function(function: Mapping[str, Any], names: Names) -> dict[str, Any]:
    call = _renamed_call(ToolCall(function["name"], function["arguments"]), names)
    return {**function, "name": call.name, "arguments": dict(call.arguments)}


def _renamed_tool(tool: Mapping[str, Any], names: Names) -> dict[str, Any]:
    if "function" in tool:
        return {**tool, "function": _renamed_tool(tool["function"], names)}
    keys = names.arguments.get(tool["name"], {})
    new = {**tool, "name": names.tools.get(tool["name"], tool["name"])}
    schema = tool.get("parameters")
    if isinstance(schema, Mapping):
        schema = dict(schema)
        if isinstance(schema.get("properties"), Mapping):
            schema["properties"] = {keys.get(key, key): value for key, value in schema["properties"].items()}
        if isinstance(schema.get("required"), list):
            schema["required"] = [keys.get(key, key) for key in schema["required"]]
        new["parameters"] = schema
    return new


def _renamed_text(text: str, called: Iterable[str], names: Names) -> str:
    """Free text under new names, where a name cannot be taken for a word and has one new name only.

    A name is one in quotes or backticks, or one that no word is written like (`get_weather`, `api.get`, `getWeather`).
    The tools that are called come first: `city` is theirs, whatever another tool calls `city`; a name of several of
    them stays.
    """
    own = [names.arguments.get(tool, {}) for tool in called]
    new = _unambiguous(names.tools, *names.arguments.values()) | _unambiguous(names.tools, *own)
    for name in {key for each in own for key in each} - set(_unambiguous(names.tools, *own)):
        new.pop(name, None)
    if not new:
        return text
    bare = _any_of(filter(_LIKE_NO_WORD.search, new)) or "(?!)"
    pattern = rf"""(["'`])(?P<quoted>{_any_of(new)})\1|(?<![\w.])(?P<bare>{bare})(?!\w|\.\w)"""

    def put(match: re.Match[str]) -> str:
        return new[match["bare"]] if match["bare"] else f"{match[1]}{new[match['quoted']]}{match[1]}"

    return re.sub(pattern, put, text)


def _unambiguous(*maps: Mapping[str, str]) -> dict[str, str]:
    """The old names that have one new name in all maps."""
    news: dict[str, set[str]] = {}
    for names in maps:
        for old, new in names.items():
            news.setdefault(old, set()).add(new)
    return {old: min(new) for old, new in news.items() if len(new) == 1}


def _any_of(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(filter(None, words), key=len, reverse=True)))


def _history_calls(sample: ToolSample) -> list[ToolCall]:
    functions = [call["function"] for message in sample.messages for call in message.get("tool_calls") or ()]
    return [ToolCall(function["name"], function["arguments"]) for function in functions]


def _name(tool: Mapping[str, Any]) -> str:
    return tool.get("function", tool)["name"]


def _properties(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = tool.get("function", tool).get("parameters")
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}
