"""API-Bank's training rows (DAMO-ConvAI): {instruction, input, output}, calls as `API-Request: [Name(k='v')]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rest_rl.data.flattened import read_literal
from rest_rl.data.reasons import Finding, RowRejectedError
from rest_rl.data.samples import ToolSample
from rest_rl.data.tool_schemas import argument_table
from rest_rl.data.toolrl import kind_of
from rest_rl.formats import get_format
from rest_rl.response import Gold, ToolCall

_SPEAKER = re.compile(
    r"^(User|AI|API-Request|Generate (?:API Request|AI Response|next response)[^:\n]*): ?", re.MULTILINE
)


def load_api_bank_training(
    row: Mapping[str, Any], identity: str, keep_prompts: bool
) -> tuple[list[ToolSample], list[Finding]]:
    """The sample of a row; tools that a `ToolSearcher` result describes are on offer from then on."""
    texts = [row.get(key) for key in ("instruction", "input", "output")]
    if not all(isinstance(text, str) for text in texts):
        raise RowRejectedError("bad_row", "got an instruction, input or output that is no text")
    instruction, given, output = (str(text) for text in texts)
    descriptions = instruction[instruction.rfind("API descriptions:") :] + "\n" + given
    tools = _described(descriptions)
    messages = _history(given, tools)
    gold = _gold(output)
    if keep_prompts:
        published = {"role": "user", "content": f"{instruction}{given}"}
        return [ToolSample(identity, (published,), tuple(tools.values()), gold, None, kind_of(gold), True)], []
    return [ToolSample(identity, tuple(messages), tuple(tools.values()), gold, None, kind_of(gold))], []


def _described(text: str) -> dict[str, dict[str, Any]]:
    """Tools by name from the lines that are objects."""
    tools: dict[str, dict[str, Any]] = {}
    for line in text.split("\n"):
        if line.startswith("{"):
            _add_tool(tools, read_literal(line))
    return tools


def _add_tool(tools: dict[str, dict[str, Any]], value: Any) -> None:
    for item in value if isinstance(value, list) else [value]:
        name = item.get("name", item.get("apiCode")) if isinstance(item, Mapping) else None
        arguments = item.get("input_parameters", item.get("parameters")) if isinstance(item, Mapping) else None
        if isinstance(name, str) and isinstance(arguments, Mapping):
            schema = argument_table(arguments, f"tool {name!r}", required=False)
            function = {"name": name, "description": str(item.get("description") or ""), "parameters": schema}
            tools[name] = {"type": "function", "function": function}


def _history(text: str, tools: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    parts = _SPEAKER.split(text)[1:]
    messages: list[dict[str, Any]] = []
    calls = 0
    for speaker, said in zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True):
        if speaker == "API-Request":
            request, _, result = said.partition("]->")
            call = _one_call(f"{request}]")
            identity = f"call{calls:05d}"
            calls += 1
            function = {"name": call.name, "arguments": dict(call.arguments)}
            messages.append(
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": identity, "type": "function", "function": function}],
                }
            )
            messages.append({"role": "tool", "content": result, "name": call.name, "tool_call_id": identity})
            if call.name == "ToolSearcher":
                _add_tool(tools, read_literal(result))
        elif not speaker.startswith("Generate"):
            messages.append({"role": "user" if speaker == "User" else "assistant", "content": said})
    if not messages:
        raise RowRejectedError(
            "bad_history", f"got {text[:80]!r}, expected lines that begin with User:, AI: or API-Request:"
        )
    return messages


def _gold(output: str) -> Gold:
    text = output.strip()
    if text.startswith("API-Request:"):
        return Gold((_one_call(text.removeprefix("API-Request:").strip(), "bad_gold"),))
    answer = text.removeprefix("AI:").strip()
    return Gold((), answer or None)


def _one_call(text: str, reason: str = "bad_history") -> ToolCall:
    parsed = get_format("pythonic").parse(text, spans=False)
    if len(parsed.calls) != 1 or parsed.unreadable_calls:
        raise RowRejectedError(reason, f"got the request {text[:120]!r}, expected [Name(key='value', ...)]")
    return parsed.calls[0]
