"""API-Bank's training rows (DAMO-ConvAI): {instruction, input, output}, with calls as `API-Request: [Name(k='v')]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rest_rl.data.reading import read_literal
from rest_rl.data.reasons import RowContext, RowRejectedError
from rest_rl.data.samples import ToolSample, to_message_call
from rest_rl.data.schemas import argument_table
from rest_rl.data.shapes import toolrl
from rest_rl.formats import get_format
from rest_rl.response import Gold, ToolCall

name = "api_bank_train"
_SPEAKER = re.compile(
    r"^(User|AI|API-Request|Generate (?:API Request|AI Response|next response)[^:\n]*): ?", re.MULTILINE
)
_REQUEST = re.compile(r"\[([^()\[\]=,\n]+)\((.*)\)\]", re.DOTALL)
_KEY = re.compile(r"(?:^|(?<=,))\s*(\w+)\s*=")
Tools = dict[str, dict[str, Any]]


def matches(row: Mapping[str, Any]) -> bool:
    return toolrl.matches(row) and "API-Request" in str(row.get("instruction"))


def read(row: Mapping[str, Any], context: RowContext) -> list[ToolSample]:
    # The result of `ToolSearcher` describes further tools, which are offered from then on.
    texts = [row.get("instruction"), row.get("input"), row.get("output", row.get("expected_output"))]
    if not all(isinstance(text, str) for text in texts):
        raise RowRejectedError("bad_row", "instruction, input and output must be text")
    instruction, given, output = map(str, texts)
    tools: Tools = {}
    for line in f"{instruction[instruction.rfind('API descriptions:') :]}\n{given}".split("\n"):
        if line.startswith("{"):
            _add_tools(tools, read_literal(line))
    messages = _read_history(given, tools, context)
    answer = output.strip()
    if answer.startswith("API-Request:"):
        gold = Gold((_read_request(answer.removeprefix("API-Request:").strip(), context, "bad_gold"),))
    else:
        gold = Gold((), answer.removeprefix("AI:").strip() or None)
    if context.keep_prompts:
        messages = [{"role": "user", "content": f"{instruction}{given}"}]
    offered, kind = tuple(tools.values()), toolrl.kind_of(gold)
    return [ToolSample(context.id, tuple(messages), offered, gold, None, kind, context.keep_prompts)]


def _add_tools(tools: Tools, value: Any) -> None:
    for item in value if isinstance(value, list) else [value]:
        named = item.get("name", item.get("apiCode")) if isinstance(item, Mapping) else None
        arguments = item.get("input_parameters", item.get("parameters")) if isinstance(item, Mapping) else None
        if isinstance(named, str) and isinstance(arguments, Mapping):
            schema = argument_table(arguments, f"tool {named!r}", required=False)
            function = {"name": named, "description": str(item.get("description") or ""), "parameters": schema}
            tools[named] = {"type": "function", "function": function}


def _read_history(text: str, tools: Tools, context: RowContext) -> list[dict[str, Any]]:
    parts = _SPEAKER.split(text)[1:]
    messages: list[dict[str, Any]] = []
    count = 0
    for speaker, said in zip(parts[::2], map(str.strip, parts[1::2]), strict=True):
        if speaker == "API-Request":
            request, _, result = said.partition("]->")
            call, identity = _read_request(f"{request}]", context, "bad_history"), toolrl.call_id(count)
            count += 1
            messages += [
                {"role": "assistant", "content": "", "tool_calls": [to_message_call(call, id=identity)]},
                {"role": "tool", "content": result, "name": call.name, "tool_call_id": identity},
            ]
            if call.name == "ToolSearcher":
                _add_tools(tools, read_literal(result))
        elif not speaker.startswith("Generate"):
            messages.append({"role": "user" if speaker == "User" else "assistant", "content": said})
    if not messages:
        problem = f"the input is {text[:80]!r}, expected lines that begin with User:, AI: or API-Request:"
        raise RowRejectedError("bad_history", problem)
    return messages


def _read_request(text: str, context: RowContext, reason: str) -> ToolCall:
    # Many rows leave values unquoted (`date=2023-01-01`), which no Python parser reads. Then the text is cut at each
    # `key=` that follows a comma, and every value that is not a literal is taken as text, with one finding per row.
    parsed = get_format("pythonic").parse(text, spans=False)
    if len(parsed.calls) == 1 and not parsed.unreadable_calls:
        return parsed.calls[0]
    match = _REQUEST.fullmatch(text.strip())
    parts = _KEY.split(match[2])[1:] if match else []
    if match is None or (match[2].strip() and not parts):
        raise RowRejectedError(reason, f"the request is {text[:120]!r}, expected [Name(key='value', ...)]")
    if not any(found.reason == "unquoted_value" for found in context.findings):
        context.note("unquoted_value", f"the request is {text[:120]!r}", context.id)
    values = [_read_value(part.strip().removesuffix(",").strip()) for part in parts[1::2]]
    return ToolCall(match[1], dict(zip(parts[::2], values, strict=True)))


def _read_value(text: str) -> Any:
    value = read_literal(text)
    if value is not None or text == "None":
        return value
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted else text
