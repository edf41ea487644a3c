"""Build chat-completion requests and parse their responses; no network access."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rest_rl.data.layout import assign_call_ids, messages_to_text
from rest_rl.data.reading import load_json
from rest_rl.data.samples import ToolSample
from rest_rl.evaluate.conversation import Reply
from rest_rl.formats import OpenedThinkFormat, ToolFormat
from rest_rl.response import ToolCall

INVALID_NAME_CHARACTER = re.compile(r"[^A-Za-z0-9_-]")
MAX_NAME_LENGTH = 64
MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name")
"""The message fields that every server accepts."""
OVERFLOW_MESSAGE = re.compile(
    r"context[ _]?(length|window|size)|maximum (model|sequence|input) length|too large for model"
    r"|(prompt|input)\S* (is |are )?too (long|large)|max_tokens must be at least 1|input token count.*exceeds"
    r"|`inputs` tokens \+",
    re.IGNORECASE,
)
"""Matches how servers report a prompt that is too long (OpenAI, vLLM, SGLang, llama.cpp, TGI, Gemini and others)."""


class MalformedResponseError(Exception):
    """The server's response is not a valid completion. The client repeats the request."""


def sanitize_name(name: str) -> str:
    """Restrict a name to what OpenAI-compatible servers accept: at most 64 letters, digits, `_` and `-`."""
    return INVALID_NAME_CHARACTER.sub("_", name)[:MAX_NAME_LENGTH] or "_"


def build_wire_names(sample: ToolSample) -> dict[str, str]:
    """Map the names of the sample's tools to distinct names that servers accept."""
    names: dict[str, str] = {}
    for tool in sample.tools:
        name = str(tool.get("function", tool).get("name"))
        plain, number = sanitize_name(name), 1
        while name not in names and plain in names.values():
            number += 1
            plain = f"{sanitize_name(name)[: MAX_NAME_LENGTH - 4]}_{number}"
        names.setdefault(name, plain)
    return names


def build_chat_body(sample: ToolSample, tool_format: ToolFormat, *, native: bool) -> dict[str, Any]:
    """Return `messages`, and with `native` also `tools`; without `native`, the messages describe the tools."""
    messages = [dict(message) for message in sample.messages]
    if not native and not sample.tools_in_prompt:
        return {"messages": messages_to_text(messages, list(sample.tools), tool_format)}
    names = build_wire_names(sample)
    body: dict[str, Any] = {"messages": [to_wire_message(message, names) for message in assign_call_ids(messages)]}
    if sample.tools and not sample.tools_in_prompt:
        functions = [tool.get("function", tool) for tool in sample.tools]
        body["tools"] = [
            {"type": "function", "function": {**function, "name": names[str(function.get("name"))]}}
            for function in functions
        ]
    return body


def to_wire_message(message: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Convert a message for the request: tool names are replaced according to `names`, arguments become JSON text."""
    sent = {key: message[key] for key in MESSAGE_FIELDS if key in message}
    if calls := message.get("tool_calls"):
        sent["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": dict(call["function"])} for call in calls
        ]
        for function in (call["function"] for call in sent["tool_calls"]):
            function["name"] = names.get(function["name"], sanitize_name(function["name"]))
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    if "name" in sent:
        sent["name"] = names.get(sent["name"], sanitize_name(sent["name"]))
    return sent


def parse_chat_completion(data: bytes, sample: ToolSample, tool_format: ToolFormat) -> Reply:
    """Parse the body of a chat completion. Raises MalformedResponseError if the body is something else.

    Tool calls that the server parsed become the reply's calls. A call whose arguments are not a JSON object is appended
    to the text instead.
    """
    body = parse_body(data)
    if isinstance(body, Reply):
        return body
    choice = first_choice(body)
    message, is_truncated = require_field(choice, "message", dict), choice.get("finish_reason") == "length"
    text, raw_calls, calls = extract_text(message, tool_format), message.get("tool_calls") or [], None
    if not isinstance(raw_calls, list):
        raise MalformedResponseError(f"tool_calls of type {type(raw_calls).__name__}")
    if text is None and not (raw_calls or is_truncated):
        raise MalformedResponseError("neither content nor tool_calls")
    if raw_calls:
        names = {sent: name for name, sent in build_wire_names(sample).items()}
        found = [parse_call(raw, names) for raw in raw_calls]
        unread = [json.dumps(raw, ensure_ascii=False) for raw, call in zip(raw_calls, found, strict=True) if not call]
        text, calls = "\n".join(filter(None, [text, *unread])), tuple(call for call in found if call)
    usage = body.get("usage")
    numbers = (token_count(usage, "prompt_tokens"), token_count(usage, "completion_tokens"))
    return Reply(replace_surrogates(text or ""), calls, *numbers, is_truncated=is_truncated)


def parse_body(data: bytes) -> Any:
    """Parse the JSON body of a response. Returns a reported context overflow as a `Reply`; raises other errors."""
    try:
        body = load_json(data.decode("utf-8"))
    except ValueError as error:
        raise MalformedResponseError(f"invalid JSON ({error}): {data[:80]!r}") from None
    if isinstance(body, dict) and body.get("error"):  # routers report errors with status 200
        if OVERFLOW_MESSAGE.search(message := str(body["error"])[:2000]):
            return Reply(overflow=f"the server reports: {message:.400}")
        raise MalformedResponseError(f"error: {message:.200}")
    return body


def extract_text(message: Mapping[str, Any], tool_format: ToolFormat) -> str | None:
    # The content may be a list of parts. Reasoning that the server returns separately is dropped, except for a format
    # whose responses begin inside the think block: there it is part of the text.
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    if content is not None and not isinstance(content, str):
        raise MalformedResponseError(f"content of type {type(content).__name__}")
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str) and thought and isinstance(tool_format, OpenedThinkFormat):
        closing = f"{tool_format.opening[0]}/{tool_format.opening[1:]}"
        content = f"{thought}\n{closing}\n\n{content or ''}"
    return content


def parse_call(raw: Any, names: Mapping[str, str]) -> ToolCall | None:
    # None for a call without a name, or with arguments that are not a JSON object
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
        return None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments) if arguments.strip() else {}
        except ValueError:
            return None
    arguments = {} if arguments is None else arguments
    return ToolCall(names.get(name, name), arguments) if isinstance(arguments, dict) else None


def require_field(value: Any, name: str, kind: type) -> Any:
    """Return the field `name` of `value`. Raises MalformedResponseError if it is missing or not of type `kind`."""
    found = value.get(name) if isinstance(value, dict) else value
    if not isinstance(value, dict) or not isinstance(found, kind):
        raise MalformedResponseError(f"{name} of type {type(found).__name__}, expected {kind.__name__}")
    return found


def first_choice(body: Any) -> dict[str, Any]:
    choices = require_field(body, "choices", list)
    if not choices or not isinstance(choices[0], dict):
        raise MalformedResponseError("choices is empty or its first entry is not an object")
    return choices[0]


def replace_surrogates(text: str) -> str:
    """Replace unpaired surrogates, which cannot be written to a UTF-8 file."""
    return text.encode("utf-8", "replace").decode("utf-8")


def token_count(usage: Any, name: str) -> int | None:
    """Return a token count that the server reports, or None if it is missing or invalid."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
