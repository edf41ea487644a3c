"""Chat rows as OpenAI, Hugging Face and ShareGPT write them -> dialogues."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rest_rl.data.calls_in_text import written_calls
from rest_rl.data.json_text import load_json, read_literal
from rest_rl.data.reasons import Finding, RowRejectedError, finding
from rest_rl.data.samples import THINK, Dialogue, ToolSample, decompose_around
from rest_rl.data.tool_results import in_order_of_calls
from rest_rl.data.tool_schemas import read_tools
from rest_rl.data.tools_in_system import tool_text

ROLE_NAMES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool", "tool_response": "tool",
    "function_response": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip
"""Roles as they are written; `call` is an assistant turn whose text is the call."""
Tools = tuple[dict[str, Any], ...]
_KEPT = ("name",)
_REASONING = ("reasoning_content", "reasoning", "thinking")


def load_messages(row: Mapping[str, Any], identity: str, keep_prompts: bool) -> tuple[list[ToolSample], list[Finding]]:
    """The samples of a row with `messages` (or `conversations`) and `tools` (or `functions`)."""
    raw = next((row[key] for key in ("messages", "conversations", "conversation") if row.get(key) is not None), None)
    raw = read_literal(raw) if isinstance(raw, str) else raw
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise RowRejectedError("bad_row", f"got messages of type {type(raw).__name__}, expected a list")
    tools = read_tools(next((row[key] for key in ("tools", "functions") if row.get(key) is not None), None))
    found: list[Finding] = []
    messages = [chat_message(message, found) for message in raw]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    messages, tools, in_prompt = _without_tool_text(messages, tools, keep_prompts, found)
    messages, problems = in_order_of_calls([_with_calls(message, tools, found) for message in messages])
    found += problems
    samples, found = samples_of(Dialogue(identity, tuple(messages), tools), found)
    return ([replace(sample, tools_in_prompt=True) for sample in samples] if in_prompt else samples), found


def _without_tool_text(
    messages: list[dict[str, Any]], tools: Tools, keep_prompts: bool, found: list[Finding]
) -> tuple[list[dict[str, Any]], Tools, bool]:
    """(messages, tools, whether a message describes them): tools are described once, by the chat template.

    With `keep_prompts` the system text stays and is the one that describes them.
    """
    first: dict[str, Any] = messages[0] if messages else {"role": None}
    described = tool_text(first["content"]) if first["role"] == "system" and isinstance(first["content"], str) else None
    if described is None or not (tools or described.tools):
        return messages, tools, False
    if described.rest is None:
        if tools:
            found.append(finding("tools_twice", f"got the system text {first['content']!r:.120}"))
        return messages, tools, False
    tools = tools or read_tools(described.tools)
    if keep_prompts:
        return messages, tools, True
    found.append(finding("tools_in_system", f"got the system text {first['content']!r:.120}"))
    kept = [{**first, "content": described.rest}] if described.rest else []
    return [*kept, *messages[1:]], tools, False


def _with_calls(message: dict[str, Any], tools: Tools, found: list[Finding]) -> dict[str, Any]:
    """An assistant's message with the calls that its text writes out; what cannot be read is left to be refused."""
    content = message.get("content")
    if message["role"] != "assistant" or message.get("tool_calls") or not isinstance(content, str):
        return message
    thought = THINK.match(content)
    head = thought.group() if thought else ""
    try:
        written = written_calls(content[len(head) :], tools)
    except ValueError:
        return {**message, "tool_calls": content[len(head) :][:200]}
    if written is None:
        return message
    found.append(finding("call_as_text", f"got {content[len(head) :]!r:.120}"))
    calls = [{"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}} for c in written.calls]
    return {**message, "content": head + written.said, "tool_calls": calls}


def samples_of(dialogue: Dialogue, found: list[Finding]) -> tuple[list[ToolSample], list[Finding]]:
    """One sample per assistant turn, and a finding for every turn that gives none."""
    if not dialogue.messages:
        raise RowRejectedError("no_assistant_turn", "got no messages")
    samples, bad = decompose_around(dialogue)
    found += [finding("broken_history" if turn.follows else "bad_turn", turn.problem) for turn in bad]
    if not samples and not bad:
        told = f"got {len(dialogue.messages)} messages, none of the assistant to learn"
        raise RowRejectedError("no_assistant_turn", told)
    return samples, found


def chat_message(raw: Any, found: list[Finding]) -> dict[str, Any]:
    """One message under our names; what cannot be read is left for `decompose_around` to name."""
    if not isinstance(raw, Mapping):
        return {"role": None}
    given = raw.get("role", raw.get("from"))
    role = ROLE_NAMES.get(given.lower(), given) if isinstance(given, str) else given
    content = _joined(raw.get("content", raw.get("value")))
    message: dict[str, Any] = {"role": role, "content": content}
    message |= {key: raw[key] for key in _KEPT if isinstance(raw.get(key), str)}
    message |= _identity(raw, "tool_call_id")
    if role in ("call", "assistant") and raw.get("weight") == 0:
        found.append(finding("weight_zero", f"got an assistant turn of weight 0: {content!r:.80}"))
        message["weight"] = 0
    if role == "call":
        return {**message, "role": "assistant", "content": "", "tool_calls": _read_calls(content, found)}
    if role == "assistant":
        return _assistant(message, raw, found)
    if content is None or (isinstance(content, (Mapping, list)) and role == "tool"):
        message["content"] = "" if content is None else json.dumps(content, ensure_ascii=False)
    return message


def _joined(content: Any) -> Any:
    """Content parts that are all text as one text."""
    if not isinstance(content, (list, tuple)) or not content:
        return "" if content == [] else content
    texts = [
        part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None for part in content
    ]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content  # type: ignore[arg-type]


def _assistant(message: dict[str, Any], raw: Mapping[str, Any], found: list[Finding]) -> dict[str, Any]:
    message.pop("tool_call_id", None)
    reasoning = next((raw[key] for key in _REASONING if isinstance(raw.get(key), str)), None)
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = raw.get("tool_calls") or raw.get("function_call")
    content = message["content"]
    if calls:
        message["tool_calls"] = _read_calls(calls, found)
    elif content is None:
        message["content"] = ""
    return message


def _read_calls(value: Any, found: list[Finding]) -> Any:
    """A list of calls from one call, a list, or the text of either."""
    if isinstance(value, str):
        value = _read_text(value, found)
    if isinstance(value, Mapping):
        value = [value]
    return [_read_call(call, found) for call in value] if isinstance(value, (list, tuple)) else value


def _read_call(call: Any, found: list[Finding]) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    key = "arguments" if "arguments" in function else "parameters"
    arguments = function.get(key)
    if isinstance(arguments, str) and arguments.strip():
        arguments = _read_text(arguments, found)
    elif arguments is None:
        arguments = {}
    return {
        **_identity(call, "id"),
        "type": "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }


def _identity(raw: Mapping[str, Any], key: str) -> dict[str, str]:
    """An id as text: a number is the same id on both sides; nothing for none."""
    value = raw.get(key)
    return {key: str(value)} if isinstance(value, (str, int)) and not isinstance(value, bool) else {}


def _read_text(text: str, found: list[Finding]) -> Any:
    """The value of a text; a Python literal is a repair, and what is neither stays text."""
    try:
        return load_json(text)
    except ValueError:
        value = read_literal(text)
        if not isinstance(value, (Mapping, list)):
            return text
        found.append(finding("arguments_as_python", f"got {text[:80]!r}"))
        return value
