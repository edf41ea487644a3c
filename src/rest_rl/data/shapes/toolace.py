"""ToolACE and xLAM-function-calling-60k, from their documented schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rest_rl.data.reading import load_json, read_literal
from rest_rl.data.reasons import Finding, RowRejectedError
from rest_rl.data.samples import Dialogue, ToolSample
from rest_rl.data.schemas import read_tools
from rest_rl.data.shapes.chat import chat_message, samples_of
from rest_rl.data.shapes.flattened import results
from rest_rl.data.shapes.toolrl import kind_of
from rest_rl.formats import get_format
from rest_rl.response import Gold, ToolCall

_LIST = re.compile(r"\[\s*\{")


def load_toolace(row: Mapping[str, Any], identity: str, keep_prompts: bool) -> tuple[list[ToolSample], list[Finding]]:
    """The samples of a row {system, conversations}: tools as a JSON list in the system text, calls as `[f(a=1)]`."""
    system, turns = row.get("system"), row.get("conversations")
    if not isinstance(system, str) or not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RowRejectedError("bad_row", "got a row without system text and conversations, expected both")
    messages: list[dict[str, Any]] = []
    found: list[Finding] = []
    for turn in turns:
        message = chat_message(turn, found)
        last = messages[-1] if messages else {}
        if message["role"] == "assistant" and str(message["content"]).lstrip().startswith("["):
            message |= _called(str(message["content"]), sum(len(m.get("tool_calls", ())) for m in messages))
        is_result = message["role"] == "tool" and isinstance(last.get("tool_calls"), list)
        messages += results(message["content"], last) if is_result else [message]
    tools = tools_in(system)
    if tools is None:
        told = f"got a system text without a JSON list of tools ({system[-80:]!r})"
        raise RowRejectedError("bad_tool_schema", told)
    tools = read_tools(tools)
    if keep_prompts:
        messages.insert(0, {"role": "system", "content": system})
    samples, found = samples_of(Dialogue(identity, tuple(messages), tools), found)
    if keep_prompts:
        samples = [replace(sample, tools_in_prompt=True) for sample in samples]
    return samples, found


def _called(text: str, count: int) -> dict[str, Any]:
    """The calls of a turn, numbered over the dialogue; text that is none stays text of `tool_calls`, to be refused."""
    parsed = get_format("pythonic").parse(text.strip(), spans=False)
    if not parsed.calls:
        # a text may begin with a bracket and call nothing
        return {"tool_calls": text} if parsed.attempted_call or parsed.unreadable_calls else {}
    if parsed.unreadable_calls or not parsed.well_formed:
        return {"tool_calls": text}
    calls = [
        {
            "id": f"call{number:05d}",
            "type": "function",
            "function": {"name": call.name, "arguments": dict(call.arguments)},
        }
        for number, call in enumerate(parsed.calls, count)
    ]
    return {"content": parsed.answer or "", "tool_calls": calls}


def tools_in(system: str) -> list[Any] | None:
    """The first JSON list of objects with names that stands in a text; None without one."""
    for match in _LIST.finditer(system):
        try:
            _, end = json.JSONDecoder().raw_decode(system, match.start())
            value = load_json(system[match.start() : end])
        except (ValueError, RecursionError):
            continue
        if all(isinstance(tool, Mapping) and "name" in tool for tool in value):
            return value
    return None


def load_xlam(row: Mapping[str, Any], identity: str, keep_prompts: bool) -> tuple[list[ToolSample], list[Finding]]:
    """The sample of a row {query, tools, answers}: the last two as JSON text, argument types as Python writes them."""
    del keep_prompts
    query, answers = row.get("query"), row.get("answers")
    if not isinstance(query, str):
        raise RowRejectedError("bad_row", f"got query of type {type(query).__name__}, expected text")
    answers = read_literal(answers) if isinstance(answers, str) else answers
    if not isinstance(answers, list):
        raise RowRejectedError("bad_gold", f"got answers {row.get('answers')!r:.80}, expected a JSON list of calls")
    calls = []
    for answer in answers:
        arguments = answer.get("arguments", {}) if isinstance(answer, Mapping) else None
        if not isinstance(arguments, Mapping) or not isinstance(answer.get("name"), str):
            raise RowRejectedError("bad_gold", f"got the call {answer!r:.80}, expected name and arguments")
        calls.append(ToolCall(answer["name"], dict(arguments)))
    gold = Gold(tuple(calls))
    message = {"role": "user", "content": query}
    return [ToolSample(identity, (message,), read_tools(row.get("tools")), gold, None, kind_of(gold))], []
