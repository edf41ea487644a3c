"""ToolACE: {system, conversations}; the system text lists the tools as JSON, and calls look like `[f(a=1)]`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rest_rl.data.reading import load_json
from rest_rl.data.reasons import RowContext, RowRejectedError
from rest_rl.data.samples import Dialogue, to_message_call
from rest_rl.data.schemas import read_tools
from rest_rl.data.shapes.chat import read_message
from rest_rl.data.shapes.toolrl import call_id, split_results
from rest_rl.formats import get_format

name = "toolace"
_LIST = re.compile(r"\[\s*\{")


def matches(row: Mapping[str, Any]) -> bool:
    has_keys = {"system", "conversations"} <= set(row) and not row.get("tools")
    return has_keys and bool(_listed_tools(str(row["system"])))


def read(row: Mapping[str, Any], context: RowContext) -> list[Dialogue]:
    system, turns = row.get("system"), row.get("conversations")
    if not isinstance(system, str) or not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RowRejectedError("bad_row", "the row needs a system text and a list of conversations")
    messages: list[dict[str, Any]] = []
    for turn in turns:
        message = read_message(turn, context)
        last = messages[-1] if messages else {}
        if message["role"] == "assistant" and str(message["content"]).lstrip().startswith("["):
            message |= _read_calls(str(message["content"]), sum(len(m.get("tool_calls", ())) for m in messages))
        is_result = message["role"] == "tool" and isinstance(last.get("tool_calls"), list)
        messages += split_results(message["content"], last) if is_result else [message]
    tools = _listed_tools(system)
    if tools is None:
        problem = f"the system text contains no JSON list of tools ({system[-80:]!r})"
        raise RowRejectedError("bad_tool_schema", problem)
    if context.keep_prompts:
        messages.insert(0, {"role": "system", "content": system})
    return [Dialogue(context.id, tuple(messages), read_tools(tools), tools_in_prompt=context.keep_prompts)]


def _read_calls(text: str, count: int) -> dict[str, Any]:
    # Unreadable calls stay text under `tool_calls`, which `decompose_readable` rejects.
    parsed = get_format("pythonic").parse(text.strip(), spans=False)
    is_call = parsed.calls or parsed.attempted_call or parsed.unreadable_calls
    if not is_call:  # an answer may begin with a bracket
        return {}
    if not parsed.calls or parsed.unreadable_calls or not parsed.well_formed:
        return {"tool_calls": text}
    calls = [to_message_call(call, id=call_id(number)) for number, call in enumerate(parsed.calls, count)]
    return {"content": parsed.answer or "", "tool_calls": calls}


def _listed_tools(system: str) -> list[Any] | None:
    for match in _LIST.finditer(system):
        try:
            _, end = json.JSONDecoder().raw_decode(system, match.start())
            value = load_json(system[match.start() : end])
        except (ValueError, RecursionError):
            continue
        if all(isinstance(tool, Mapping) and "name" in tool for tool in value):
            return value
    return None
