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

from rest_rl.data.samples import ToolSample, compute_digest, get_calls
from rest_rl.response import Gold, ToolCall

_FIRST_CHARACTERS = string.ascii_letters + "_"
_OTHER_CHARACTERS = string.ascii_letters + string.digits + "_"
_IDENTIFIER_LIKE = re.compile(r"\w[_.]\w|[a-z0-9][A-Z]")


class NameMap(NamedTuple):
    """New names: of tools, and of each tool's arguments under its old name."""

    tools: dict[str, str]
    arguments: dict[str, dict[str, str]]


def mask_names(sample: ToolSample, share: float, seed: int) -> ToolSample:
    """The sample, masked if its id falls into the share; the same for the same seed and id, whatever stands around it.

    A sample whose messages describe its tools is left as it is.
    """
    if not share or sample.tools_in_prompt:
        return sample
    rng = random.Random(compute_digest([seed, sample.id]))
    return rename_sample(sample, draw_names(sample, rng)) if rng.random() < share else sample


def draw_names(sample: ToolSample, rng: random.Random) -> NameMap:
    """Random names for all tools and arguments, unlike each other and unlike any that the sample has."""
    functions = [tool.get("function", tool) for tool in sample.tools]
    arguments = {function["name"]: list(_get_properties(function)) for function in functions}
    for call in [*sample.gold.calls, *(call for message in sample.messages for call in get_calls(message))]:
        known = arguments.setdefault(call.name, [])
        known += [key for key in call.arguments if key not in known]
    taken = {*arguments, *(name for names in arguments.values() for name in names)}

    def draw(_: str) -> str:
        while True:
            name = rng.choice(_FIRST_CHARACTERS) + "".join(rng.choices(_OTHER_CHARACTERS, k=rng.randint(4, 11)))
            if name not in taken:
                taken.add(name)
                return name

    tools = {tool: draw(tool) for tool in arguments}
    return NameMap(tools, {tool: {name: draw(name) for name in names} for tool, names in arguments.items()})


def rename_sample(sample: ToolSample, names: NameMap) -> ToolSample:
    """The sample under other names; a name that the map does not have stays."""
    called = [call.name for call in sample.gold.calls]
    thought, preamble = sample.thought, sample.preamble
    return replace(
        sample,
        messages=tuple(_rename_message(message, names) for message in sample.messages),
        tools=tuple(_rename_tool(tool, names) for tool in sample.tools),
        gold=Gold(tuple(_rename_call(call, names) for call in sample.gold.calls), sample.gold.answer),
        thought=None if thought is None else _rename_text(thought, called, names),
        preamble=None if preamble is None else _rename_text(preamble, called, names),
    )


def _rename_call(call: ToolCall, names: NameMap) -> ToolCall:
    return ToolCall(names.tools.get(call.name, call.name), _rename_keys(call.arguments, call.name, names))


def _rename_keys(arguments: Mapping[str, Any], tool: str, names: NameMap) -> dict[str, Any]:
    keys = names.arguments.get(tool, {})
    return {keys.get(key, key): value for key, value in arguments.items()}


def _rename_message(message: Mapping[str, Any], names: NameMap) -> dict[str, Any]:
    new = dict(message)
    if message["role"] == "tool" and isinstance(message.get("name"), str):
        new["name"] = names.tools.get(message["name"], message["name"])
    if calls := get_calls(message):
        if message.get("content"):
            new["content"] = _rename_text(message["content"], [call.name for call in calls], names)
        renamed = [_rename_call(call, names) for call in calls]
        new["tool_calls"] = [
            {**old, "function": {**old["function"], "name": call.name, "arguments": dict(call.arguments)}}
            for old, call in zip(message["tool_calls"], renamed, strict=True)
        ]
    return new


def _rename_tool(tool: Mapping[str, Any], names: NameMap) -> dict[str, Any]:
    if "function" in tool:
        return {**tool, "function": _rename_tool(tool["function"], names)}
    name, keys = tool["name"], names.arguments.get(tool["name"], {})
    new = {**tool, "name": names.tools.get(name, name)}
    if isinstance(tool.get("parameters"), Mapping):
        schema = new["parameters"] = dict(tool["parameters"])
        if properties := _get_properties(tool):
            schema["properties"] = _rename_keys(properties, name, names)
        if isinstance(schema.get("required"), list):
            schema["required"] = [keys.get(key, key) for key in schema["required"]]
    return new


def _get_properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _rename_text(text: str, called: Iterable[str], names: NameMap) -> str:
    """Free text under new names, where a name cannot be taken for a word and has one new name only.

    A name is one in quotes or backticks, or one that no word is written like (`get_weather`, `api.get`, `getWeather`).
    The tools that are called come first: `city` is theirs, whatever another tool calls `city`; a name of several of
    them stays.
    """
    own = [names.arguments.get(tool, {}) for tool in called]
    clear = _find_unambiguous(names.tools, *own)
    new = _find_unambiguous(names.tools, *names.arguments.values()) | clear
    for name in {key for each in own for key in each} - set(clear):
        new.pop(name, None)
    if not new:
        return text
    bare = _alternatives(filter(_IDENTIFIER_LIKE.search, new)) or "(?!)"
    pattern = rf"""(["'`])(?P<quoted>{_alternatives(new)})\1|(?<![\w.])(?P<bare>{bare})(?!\w|\.\w)"""

    def put(match: re.Match[str]) -> str:
        return new[match["bare"]] if match["bare"] else f"{match[1]}{new[match['quoted']]}{match[1]}"

    return re.sub(pattern, put, text)


def _find_unambiguous(*maps: Mapping[str, str]) -> dict[str, str]:
    news: dict[str, set[str]] = {}
    for names in maps:
        for old, new in names.items():
            news.setdefault(old, set()).add(new)
    return {old: min(new) for old, new in news.items() if len(new) == 1}


def _alternatives(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(filter(None, words), key=len, reverse=True)))
