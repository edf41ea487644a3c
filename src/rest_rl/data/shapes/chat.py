"""Chat rows in the forms of OpenAI, Hugging Face and ShareGPT: `messages` (or `conversations`) and `tools`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rest_rl.data.reading import load_json, read_literal, read_literals
from rest_rl.data.reasons import RowContext, RowRejectedError
from rest_rl.data.samples import THINK, Dialogue, to_message_call
from rest_rl.data.schemas import read_tools
from rest_rl.data.shapes.calls_in_text import find_calls

name = "messages"
# Role names of other data sets and ours; `call` is an assistant turn whose text is the call.
_ROLE_NAMES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool", "tool_response": "tool",
    "function_response": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip
_MESSAGES = ("messages", "conversations", "conversation")
_TOOLS = ("tools", "functions")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TOOL_TEXT_BEGINS = re.compile(
    r"(?:\A|(?<=\n))[ \t]*(?:# Tools[ \t]*\n|You are a function[- ]calling (?:AI |LLM |language )?model\b)"
)
_TOOL_TEXT_ENDS = ("</tools>", "</tool_call>")


def matches(row: Mapping[str, Any]) -> bool:
    return any(key in row for key in _MESSAGES)


def read(row: Mapping[str, Any], context: RowContext) -> list[Dialogue]:
    raw = next((row[key] for key in _MESSAGES if row.get(key) is not None), None)
    raw = read_literal(raw) if isinstance(raw, str) else raw
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise RowRejectedError("bad_row", f"messages is of type {type(raw).__name__}, expected a list")
    tools = read_tools(next((row[key] for key in _TOOLS if row.get(key) is not None), None))
    messages = [read_message(message, context) for message in raw]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    messages, tools, in_prompt = _cut_tool_text(messages, tools, context)
    messages = order_results([_read_calls_in_text(message, tools, context) for message in messages], context)
    return [Dialogue(context.id, tuple(messages), tools, tools_in_prompt=in_prompt)]


def read_message(raw: Any, context: RowContext) -> dict[str, Any]:
    """Return a message with OpenAI's key names; unreadable values are kept, and `decompose_readable` reports them."""
    if not isinstance(raw, Mapping):
        return {"role": None}
    given = raw.get("role", raw.get("from"))
    role = _ROLE_NAMES.get(given.lower(), given) if isinstance(given, str) else given
    content = _join_parts(raw.get("content", raw.get("value")))
    message: dict[str, Any] = {"role": role, "content": content}
    if isinstance(raw.get("name"), str):
        message["name"] = raw["name"]
    if role != "assistant":
        message |= _identity(raw, "tool_call_id")
    if role in ("call", "assistant") and raw.get("weight") == 0:
        context.note("weight_zero", f"the turn has weight 0: {content!r:.80}")
        message["weight"] = 0
    if role == "call":
        return {**message, "role": "assistant", "content": "", "tool_calls": _read_calls(content, context)}
    if role == "assistant":
        reasoning = next((raw[key] for key in _REASONING if isinstance(raw.get(key), str)), None)
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls := raw.get("tool_calls") or raw.get("function_call"):
            message["tool_calls"] = _read_calls(calls, context)
        elif content is None:
            message["content"] = ""
    elif content is None:
        message["content"] = ""
    elif isinstance(content, Mapping | list) and role == "tool":
        message["content"] = json.dumps(content, ensure_ascii=False)
    return message


def _join_parts(content: Any) -> Any:
    if not isinstance(content, list | tuple):
        return content
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else content


def _read_calls(value: Any, context: RowContext) -> Any:
    value = _read_text(value, context) if isinstance(value, str) else value
    value = [value] if isinstance(value, Mapping) else value
    return [_read_call(call, context) for call in value] if isinstance(value, list | tuple) else value


def _read_call(call: Any, context: RowContext) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments" if "arguments" in function else "parameters")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _read_text(arguments, context)
    elif arguments is None:
        arguments = {}
    read_function = {"name": function.get("name"), "arguments": arguments}
    return {**_identity(call, "id"), "type": "function", "function": read_function}


def _identity(raw: Mapping[str, Any], key: str) -> dict[str, str]:
    # Ids become text, because some data sets write an id as a number in the call and as text in the result.
    value = raw.get(key)
    return {key: str(value)} if isinstance(value, str | int) and not isinstance(value, bool) else {}


def _read_text(text: str, context: RowContext) -> Any:
    try:
        return load_json(text)
    except ValueError:
        value = read_literal(text)
    if not isinstance(value, Mapping | list):
        return text
    context.note("arguments_as_python", f"the arguments are {text[:80]!r}")
    return value


def _read_calls_in_text(message: dict[str, Any], tools: Sequence[Any], context: RowContext) -> dict[str, Any]:
    content = message.get("content")
    if message["role"] != "assistant" or message.get("tool_calls") or not isinstance(content, str):
        return message
    thought = THINK.match(content)
    head = thought.group() if thought else ""
    body = content[len(head) :]
    try:
        written = find_calls(body, tools)
    except ValueError:
        return {**message, "tool_calls": body[:200]}  # not a list, so `decompose_readable` rejects the turn
    if written is None:
        return message
    context.note("call_as_text", f"the text is {body!r:.120}")
    calls = [to_message_call(call) for call in written.calls]
    return {**message, "content": head + written.said, "tool_calls": calls}


# tools that a system text describes


def _cut_tool_text(
    messages: list[dict[str, Any]], tools: tuple[dict[str, Any], ...], context: RowContext
) -> tuple[list[dict[str, Any]], tuple[dict[str, Any], ...], bool]:
    # (messages, tools, whether a message describes them). Tools must be described once, by the chat template, or a
    # model would see them twice. With kept prompts, the system text stays and is the one that describes them.
    first: dict[str, Any] = messages[0] if messages else {"role": None}
    system = first["content"] if first["role"] == "system" else None
    rest, listed = split_tool_text(system) if isinstance(system, str) else (system, None)
    if rest is None or rest == system:
        if listed and tools:
            context.note("tools_twice", f"the system message is {system!r:.120}")
        return messages, tools, False
    if not (tools or listed):
        return messages, tools, False
    tools = tools or read_tools(listed)
    if context.keep_prompts:
        return messages, tools, True
    context.note("tools_in_system", f"the system message is {system!r:.120}")
    return [*([{**first, "content": rest}] if rest else []), *messages[1:]], tools, False


def split_tool_text(system: str) -> tuple[str, list[Any] | None]:
    """Split a system text into the text without the description of tools, and the tools that it lists (or None).

    Only descriptions in a known wording are removed. They begin as in the prompts of Hermes or Qwen, and end with the
    last `</tools>` or `</tool_call>`.
    """
    opening = _TOOL_TEXT_BEGINS.search(system)
    if opening is None or "</tools>" not in system[opening.start() :]:
        return system, _listed_tools(system)
    end = max(system.rfind(tag) + len(tag) for tag in _TOOL_TEXT_ENDS if tag in system)
    said = system[: opening.start()].strip(), system[end:].lstrip(" \t\r\n.").rstrip()
    return "\n\n".join(filter(None, said)), _listed_tools(system)


def _listed_tools(system: str) -> list[Any] | None:
    for piece in system.split("<tools>")[1:]:
        inner, closed, _ = piece.partition("</tools>")
        values = read_literals(inner) if closed else None
        values = values[0] if values and len(values) == 1 and isinstance(values[0], list) else values
        if values and all(isinstance(value, dict) for value in values):
            return values
    return None


# results in the order of their calls


def order_results(messages: Sequence[dict[str, Any]], context: RowContext) -> list[dict[str, Any]]:
    """Return the messages with the results after each turn sorted into the order of its calls.

    Results are matched by id; calls that share an id, and results without an id, are matched in order. Results without
    a call and calls without a result are noted and stay where they are. A single result without an id may answer all
    calls of its turn, and the last turn of a dialogue needs no results.
    """
    # Chat templates without ids pair the n-th result with the n-th call, so the order in the file decides what a model
    # sees. Only matched results move, and only among their own positions: unmatched ones keep their place.
    ordered = list(messages)
    for at, end in _blocks(messages):
        calls = messages[at].get("tool_calls") or [] if at >= 0 else []
        if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
            continue  # unreadable calls are reported elsewhere
        results = messages[at + 1 : end]
        matched = _match_results(calls, results)
        slots = [slot for slot, call in enumerate(matched) if call is not None]
        by_call = sorted(slots, key=lambda slot: matched[slot] or 0)
        if by_call != slots:
            shown = ", ".join(str(results[slot].get("tool_call_id")) for slot in slots)
            context.note("results_reordered", f"the results of message {at} have the order {shown}")
            for slot, taken in zip(slots, by_call, strict=True):
                ordered[at + 1 + slot] = results[taken]
        for slot, result in enumerate(results):
            if matched[slot] is None:
                shown = f"id {result.get('tool_call_id')}, content {result.get('content')!r:.80}"
                context.note("orphan_result", f"message {at + 1 + slot} is a result without a call ({shown})")
        answers_all = any(result.get("tool_call_id") is None for result in results)
        missing = [str(call.get("id")) for number, call in enumerate(calls) if number not in matched]
        if missing and not answers_all and (results or end < len(messages)):
            found = f"message {at} has {len(missing)} call{'s' * (len(missing) > 1)} without a result"
            context.note("missing_result", f"{found} (id {', '.join(missing)})")
    return ordered


def _blocks(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int]]:
    # (position of a message, end of the results that follow it). The message is a turn with calls, or whatever precedes
    # results that belong to no call; -1 if the dialogue starts with them.
    at = -1
    while at < len(messages):
        end = at + 1
        while end < len(messages) and messages[end].get("role") == "tool":
            end += 1
        if end > at + 1 or (at >= 0 and messages[at].get("tool_calls")):
            yield at, end
        at = end


# For each result the number of its call, or None. Results with ids go first, so that one without an id does not take
# the call of another.
def _match_results(calls: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> list[int | None]:
    left = list(range(len(calls)))
    have_ids = any(call.get("id") is not None for call in calls)
    matched: list[int | None] = [None] * len(results)
    for with_ids in (True, False):
        for slot, result in enumerate(results):
            identity = result.get("tool_call_id") if have_ids else None
            if (identity is not None) == with_ids:
                fitting = (number for number in left if identity is None or calls[number].get("id") == identity)
                matched[slot] = next(fitting, None)
                left = [number for number in left if number != matched[slot]]
    return matched
