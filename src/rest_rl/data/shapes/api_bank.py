"""API-Bank's training rows (DAMO-ConvAI): {instruction, input, output}, calls as `API-Request: [Name(k='v')]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rest_rl.data.reading import read_literal
from rest_rl.data.reasons import Finding, RowRejectedError, finding
from rest_rl.data.samples import ToolSample
from rest_rl.data.schemas import argument_table
from rest_rl.data.shapes.toolrl import kind_of
from rest_rl.formats import get_format
from rest_rl.response import Gold, ToolCall

_SPEAKER = re.compile(
    r"^(User|AI|API-Request|Generate (?:API Request|AI Response|next response)[^:\n]*): ?", re.MULTILINE
)

_REQUEST = re.compile(r"\[([^()\[\]=,\n]+)\((.*)\)\]", re.DOTALL)
_KEY = re.compile(r"(?:^|(?<=,))\s*(\w+)\s*=")


def load_api_bank_training(
    row: Mapping[str, Any], identity: str, keep_prompts: bool
) -> tuple[list[ToolSample], list[Finding]]:
    """The sample of a row; tools that a `ToolSearcher` result describes are on offer from then on."""
    texts = [row.get("instruction"), row.get("input"), row.get("output", row.get("expected_output"))]
    if not all(isinstance(text, str) for text in texts):
        raise RowRejectedError("bad_row", "got an instruction, input or output that is no text")
    instruction, given, output = (str(text) for text in texts)
    descriptions = instruction[instruction.rfind("API descriptions:") :] + "\n" + given
    tools = _described(descriptions)
    requests = _Requests(identity)
    messages = _history(given, tools, requests)
    gold = _gold(output, requests)
    if keep_prompts:
        published = {"role": "user", "content": f"{instruction}{given}"}
        return [
            ToolSample(identity, (published,), tuple(tools.values()), gold, None, kind_of(gold), True)
        ], requests.found
    return [ToolSample(identity, tuple(messages), tuple(tools.values()), gold, None, kind_of(gold))], requests.found


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


def _history(text: str, tools: dict[str, dict[str, Any]], requests: _Requests) -> list[dict[str, Any]]:
    parts = _SPEAKER.split(text)[1:]
    messages: list[dict[str, Any]] = []
    calls = 0
    for speaker, said in zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True):
        if speaker == "API-Request":
            request, _, result = said.partition("]->")
            call = requests.read(f"{request}]")
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


def _gold(output: str, requests: _Requests) -> Gold:
    text = output.strip()
    if text.startswith("API-Request:"):
        return Gold((requests.read(text.removeprefix("API-Request:").strip(), "bad_gold"),))
    answer = text.removeprefix("AI:").strip()
    return Gold((), answer or None)


class _Requests:
    """Reads `[Name(key='value', ...)]`; values that stand without quotes are text, and that is a repair."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.found: list[Finding] = []

    def read(self, text: str, reason: str = "bad_history") -> ToolCall:
        parsed = get_format("pythonic").parse(text, spans=False)
        if len(parsed.calls) == 1 and not parsed.unreadable_calls:
            return parsed.calls[0]
        match = _REQUEST.fullmatch(text.strip())
        parts = _KEY.split(match[2])[1:] if match else []
        if match is None or (match[2].strip() and not parts):
            raise RowRejectedError(reason, f"got the request {text[:120]!r}, expected [Name(key='value', ...)]")
        if not self.found:
            self.found.append(finding("unquoted_value", f"got the request {text[:120]!r}", self.identity))
        texts = [part.strip().removesuffix(",").strip() for part in parts[1::2]]
        return ToolCall(match[1], dict(zip(parts[::2], map(_value, texts), strict=True)))


def _value(text: str) -> Any:
    """A literal, or else the text without the quotes around it."""
    value = read_literal(text)
    if value is not None or text == "None":
        return value
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted else text
