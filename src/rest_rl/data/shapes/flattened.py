"""ToolRL's flattened prompts -> messages: `<user>`, `<think>`, `<tool_call>`, `<obs>`, `<response>` blocks in one text.

The tools stand in the system text as numbered entries, the whole history in one user message. API-Bank's test samples
are laid out the same way (there the parameters are Python dicts, and level 3 names a tool as `1. Name: description`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rest_rl.data.reading import read_literal
from rest_rl.data.reasons import RowRejectedError
from rest_rl.data.schemas import argument_table

FORMAT = "toolrl"
"""The format that the published texts ask for, and that the published metric of API-Bank reads."""
HEADING = "**Dialogue Records History**"
_TOOLS_BEGIN, _TOOLS_END = "following tools:\n", "\n\n**Steps"
_TOOL = re.compile(
    r"^\d+\. (?:Name: (?P<name>.*)\nDescription: (?P<description>(?:.*\n)*?)|(?P<short>[^:\n]*): (?P<text>(?:.*\n)*?))"
    r"Parameters: (?P<parameters>.*)$",
    re.MULTILINE,
)
_BLOCK = re.compile(r"\s*<(user|think|tool_call|obs|response)>(.*?)</\1>", re.DOTALL)
_TAG = re.compile(r"</?(?:user|think|tool_call|obs|response)>")


def tool_list_span(system: str) -> tuple[int, int]:
    """Where the list of tools begins and ends in a system text; RowRejectedError `bad_tool_schema` without one."""
    begin, end = system.find(_TOOLS_BEGIN), system.find(_TOOLS_END)
    if begin < 0 or end < begin:
        raise RowRejectedError("bad_tool_schema", f"got a system text without a list of tools ({system[:60]!r})")
    return begin + len(_TOOLS_BEGIN), end


def tools_of(system: str) -> tuple[dict[str, Any], ...]:
    """The tools that a system text lists; RowRejectedError `bad_tool_schema` if an entry cannot be read."""
    begin, end = tool_list_span(system)
    text = system[begin:end]
    tools = []
    for match in _TOOL.finditer(text):
        name = match["name"] if match["name"] is not None else match["short"]
        description = match["description"] if match["name"] is not None else match["text"]
        arguments = read_literal(match["parameters"])
        if not isinstance(arguments, Mapping):
            found = match["parameters"][:80]
            raise RowRejectedError("bad_tool_schema", f"got parameters {found!r} of tool {name!r}, expected an object")
        schema = argument_table(arguments, f"tool {name!r}", required=False)
        function = {"name": name, "description": description.strip(), "parameters": schema}
        tools.append({"type": "function", "function": function})
    if len(tools) != len(re.findall(r"^Parameters: ", text, re.MULTILINE)) or not tools:
        raise RowRejectedError("bad_tool_schema", f"got a list of tools that cannot be read ({text[:60]!r})")
    return tuple(tools)


def history_of(text: str) -> list[dict[str, Any]]:
    """The messages of a flattened history; RowRejectedError `bad_history` if the blocks do not tell them.

    Thoughts are left out, as in every history. Blocks of the assistant that follow one another are one message, and so
    are blocks of the user (nothing in a flattened text says otherwise, and many chat templates want roles in turn).
    """
    body = text.lstrip("*").removeprefix(HEADING.lstrip("*"))
    messages: list[dict[str, Any]] = []
    at = 0
    for match in _BLOCK.finditer(body):
        if body[at : match.start()].strip() or _TAG.search(match[2]):
            break
        at = match.end()
        _append(messages, match[1], match[2].strip())
    if body[at:].strip() or not messages:
        raise RowRejectedError("bad_history", f"got {body[at:].strip()[:80]!r} outside the blocks of the history")
    return messages


def _append(messages: list[dict[str, Any]], tag: str, inner: str) -> None:
    last: dict[str, Any] = messages[-1] if messages else {"role": ""}
    if tag == "user":
        if last["role"] == "user":
            last["content"] += f"\n{inner}"
        else:
            messages.append({"role": "user", "content": inner})
    elif tag == "obs":
        messages += results(inner, last)
    elif tag != "think":
        if last["role"] != "assistant" or (tag == "response" and last["content"] and "tool_calls" in last):
            last = {"role": "assistant", "content": ""}
            messages.append(last)
        if tag == "response":
            last["content"] = f"{last['content']}\n{inner}".strip()
        else:
            last["tool_calls"] = [*last.get("tool_calls", ()), *_calls(inner, sum(map(_count_calls, messages)))]


def _count_calls(message: Mapping[str, Any]) -> int:
    return len(message.get("tool_calls", ()))


def _calls(inner: str, count: int) -> list[dict[str, Any]]:
    """The calls of a history's block, numbered over the whole dialogue; nine letters and digits, as Mistral wants."""
    calls = []
    for line in filter(None, map(str.strip, inner.split("\n"))):
        call = read_literal(line)
        arguments = call.get("parameters", {}) if isinstance(call, Mapping) else None
        if not isinstance(arguments, Mapping) or not isinstance(call.get("name"), str):
            raise RowRejectedError("bad_history", f"got the call {line[:80]!r} in the history")
        function = {"name": call["name"], "arguments": dict(arguments)}
        calls.append({"id": f"call{count + len(calls):05d}", "type": "function", "function": function})
    return calls


def results(inner: str, last: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tool messages: one per result where there are as many as calls, else one with the whole text."""
    value = read_literal(inner)
    calls: Sequence[Mapping[str, Any]] = last.get("tool_calls", ())
    many = isinstance(value, list) and all(isinstance(item, Mapping) and "results" in item for item in value)
    if not many or len(value) != len(calls):
        named = {"name": calls[0]["function"]["name"], "tool_call_id": calls[0]["id"]} if len(calls) == 1 else {}
        return [{"role": "tool", "content": inner, **named}]
    texts = [
        item["results"] if isinstance(item["results"], str) else json.dumps(item["results"], ensure_ascii=False)
        for item in value
    ]
    return [
        {"role": "tool", "content": text, "name": call["function"]["name"], "tool_call_id": call["id"]}
        for text, call in zip(texts, calls, strict=True)
    ]
