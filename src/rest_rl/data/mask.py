"""Function masking (Hammer, arXiv 2410.04587): random tool and argument names force a model to read the descriptions.

In a random share of the samples, every name is replaced consistently in tools, history, gold calls, reasoning, and the
text next to calls. Descriptions and all other texts stay unchanged.
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
    """New names of the tools, and of the arguments of each tool; keys are the old names."""

    tools: dict[str, str]
    arguments: dict[str, dict[str, str]]


def mask_names(sample: ToolSample, share: float, seed: int) -> ToolSample:
    """Mask the names in a sample with probability `share`, and return the sample.

    The random choices depend only on the seed and the sample, not on other rows. A sample whose messages describe its
    tools is returned unchanged.
    """
    if not share or sample.tools_in_prompt:
        return sample
    # One generator per sample: the result does not change when rows are added, removed or reordered.
    rng = random.Random(compute_digest([seed, sample.id]))
    return rename_sample(sample, draw_names(sample, rng)) if rng.random() < share else sample


def draw_names(sample: ToolSample, rng: random.Random) -> NameMap:
    """Draw a random name for each tool and argument: all different, and none of them already used in the sample."""
    # Calls may use names that no tool defines (defective golds, old histories); those are masked as well, or they would
    # stand out. Names are unique over all tools and arguments, so that text replacement stays unambiguous.
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
    """Return the sample with its names replaced; names that the map does not contain stay."""
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
    # Text may use a name as an ordinary word ("city"). Therefore only names in quotes or backticks are replaced, and
    # names that look unlike any word (`get_weather`, `api.get`, `getWeather`). An argument name that several tools have
    # has several new names: the called tools decide, and if they disagree, the old name stays. Longer names come first
    # in the pattern, because a regular expression takes the first alternative that matches.
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
