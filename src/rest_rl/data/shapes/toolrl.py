"""Rows that ToolRL published (`rlla_sft.json`, `rlla_4k` in Parquet): one sample each, as two texts.

The system text lists the tools as numbered entries, and one user message contains the whole history as `<user>`,
`<think>`, `<tool_call>`, `<obs>` and `<response>` blocks. By default these texts are parsed into messages and tools, so
that any chat template can render them; kept prompts stay as published. API-Bank's test samples have the same form, but
their parameters are Python dicts, and level 3 writes a tool as `1. Name: description`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rest_rl.data.reading import read_literal
from rest_rl.data.reasons import RowContext, RowRejectedError
from rest_rl.data.samples import ToolSample, to_message_call
from rest_rl.data.schemas import argument_table
from rest_rl.formats import get_format
from rest_rl.response import Gold, ToolCall

name = "toolrl"
FORMAT = "toolrl"
"""The format that the published texts request, and that the published metric of API-Bank parses."""
HEADING = "**Dialogue Records History**"
_TOOLS_BEGIN, _TOOLS_END = "following tools:\n", "\n\n**Steps"
_TOOL = re.compile(
    r"^\d+\. (?:Name: (?P<name>.*)\nDescription: (?P<description>(?:.*\n)*?)|(?P<short>[^:\n]*): (?P<text>(?:.*\n)*?))"
    r"Parameters: (?P<parameters>.*)$",
    re.MULTILINE,
)
_BLOCK = re.compile(r"\s*<(user|think|tool_call|obs|response)>(.*?)</\1>", re.DOTALL)
_TAG = re.compile(r"</?(?:user|think|tool_call|obs|response)>")
_THINK, _END = "<think>", "</think>"


def matches(row: Mapping[str, Any]) -> bool:
    is_raw = {"instruction", "input"} <= set(row) and ("output" in row or "expected_output" in row)
    return is_raw or {"prompt", "reward_model"} <= set(row)


def read(row: Mapping[str, Any], context: RowContext) -> list[ToolSample]:
    # A raw row has {instruction, input, output}; a row of the Parquet file has {prompt, reward_model}.
    if "reward_model" in row:
        prompt = row.get("prompt")
        texts = [text_of(message, "content") for message in prompt] if isinstance(prompt, list | tuple) else []
        if len(texts) != 2:
            raise RowRejectedError("bad_row", f"prompt has {len(texts)} messages, expected a system and a user message")
        (system, user), output = texts, text_of(row["reward_model"], "ground_truth")
    else:
        system, user, output = (text_of(row, key) for key in ("instruction", "input", "output"))
    thought, gold = _read_gold(output)
    if thought and any(tag in thought for tag in get_format(FORMAT).tags):
        context.note("thought_quotes_tags", f"the reasoning is {thought[:60]!r}", context.id)
    return [flattened_sample(context, system, user, gold, thought)]


def text_of(row: Any, key: str) -> str:
    """Return a text field of a row; raise RowRejectedError (`bad_row`) if it is not text."""
    value = row.get(key) if isinstance(row, Mapping) else None
    if not isinstance(value, str):
        raise RowRejectedError("bad_row", f"{key} is of type {type(value).__name__}, expected text")
    return value


def flattened_sample(
    context: RowContext, system: str, user: str, gold: Gold, thought: str | None = None, kind: str = ""
) -> ToolSample:
    """Build a sample from a published system text, user text and gold turn."""
    tools, kind = parse_tools(system), kind or kind_of(gold)
    if context.keep_prompts:
        messages = ({"role": "system", "content": system}, {"role": "user", "content": user})
        return ToolSample(context.id, messages, tools, gold, thought, kind, tools_in_prompt=True)
    return ToolSample(context.id, tuple(parse_history(user)), tools, gold, thought, kind)


def kind_of(gold: Gold) -> str:
    """Return the kind of task: `answer` for no call, `single` for one, `parallel` for several."""
    return ("answer", "single", "parallel")[min(len(gold.calls), 2)]


def _read_gold(output: str) -> tuple[str | None, Gold]:
    # (reasoning, gold). The reasoning ends at the last `</think>`, because it may quote tags and whole blocks, which
    # are not gold. Every line of the calls must be readable: a partly read gold would reject correct responses.
    before, end, after = output.rpartition(_END)
    if not output.lstrip().startswith(_THINK) or not end:
        raise RowRejectedError("bad_gold", f"the output begins with {output[:60]!r}, expected a <think> block")
    parsed = get_format(FORMAT).parse(f"{_THINK}{_END}{after}", spans=False)
    if not parsed.well_formed or parsed.unreadable_calls:
        raise RowRejectedError("bad_gold", "; ".join(parsed.problems) or "the demonstration is not well formed")
    return before.lstrip().removeprefix(_THINK).strip() or None, Gold(parsed.calls, parsed.answer or None)


def tool_list_span(system: str) -> tuple[int, int]:
    """Return start and end of the tool list in a system text; RowRejectedError (`bad_tool_schema`) if it has none."""
    begin, end = system.find(_TOOLS_BEGIN), system.find(_TOOLS_END)
    if begin < 0 or end < begin:
        raise RowRejectedError("bad_tool_schema", f"the system text contains no list of tools ({system[:60]!r})")
    return begin + len(_TOOLS_BEGIN), end


def parse_tools(system: str) -> tuple[dict[str, Any], ...]:
    """Return the tools of a system text; raise RowRejectedError (`bad_tool_schema`) if an entry cannot be read."""
    begin, end = tool_list_span(system)
    text = system[begin:end]
    tools = []
    for match in _TOOL.finditer(text):
        is_long = match["name"] is not None
        named, description = (match["name"], match["description"]) if is_long else (match["short"], match["text"])
        arguments = read_literal(match["parameters"])
        if not isinstance(arguments, Mapping):
            problem = f"the parameters of tool {named!r} are {match['parameters'][:80]!r}, expected an object"
            raise RowRejectedError("bad_tool_schema", problem)
        schema = argument_table(arguments, f"tool {named!r}", required=False)
        function = {"name": named, "description": description.strip(), "parameters": schema}
        tools.append({"type": "function", "function": function})
    if len(tools) != len(re.findall(r"^Parameters: ", text, re.MULTILINE)) or not tools:
        raise RowRejectedError("bad_tool_schema", f"the list of tools cannot be read ({text[:60]!r})")
    return tuple(tools)


def parse_history(text: str) -> list[dict[str, Any]]:
    """Return the messages of a flattened history, without reasoning.

    Consecutive blocks of the assistant become one message, and so do those of the user: the text does not separate
    them, and many chat templates require alternating roles.

    Raises:
        RowRejectedError: The text is not a sequence of blocks (`bad_history`).
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
        raise RowRejectedError("bad_history", f"the history has text outside its blocks: {body[at:].strip()[:80]!r}")
    return messages


def _append(messages: list[dict[str, Any]], tag: str, inner: str) -> None:
    last: dict[str, Any] = messages[-1] if messages else {"role": ""}
    if tag == "user" and last["role"] == "user":
        last["content"] += f"\n{inner}"
    elif tag == "user":
        messages.append({"role": "user", "content": inner})
    elif tag == "obs":
        messages += split_results(inner, last)
    elif tag != "think":
        if last["role"] != "assistant" or (tag == "response" and last["content"] and "tool_calls" in last):
            last = {"role": "assistant", "content": ""}
            messages.append(last)
        if tag == "response":
            last["content"] = f"{last['content']}\n{inner}".strip()
        else:
            count = sum(len(message.get("tool_calls", ())) for message in messages)
            last["tool_calls"] = [*last.get("tool_calls", ()), *_read_calls(inner, count)]


def _read_calls(inner: str, count: int) -> list[dict[str, Any]]:
    calls = []
    for line in filter(None, map(str.strip, inner.split("\n"))):
        call = read_literal(line)
        arguments = call.get("parameters", {}) if isinstance(call, Mapping) else None
        if not isinstance(arguments, Mapping) or not isinstance(call.get("name"), str):
            raise RowRejectedError("bad_history", f"the history contains the unreadable call {line[:80]!r}")
        calls.append(to_message_call(ToolCall(call["name"], arguments), id=call_id(count + len(calls))))
    return calls


def call_id(number: int) -> str:
    """Return the id of a call in its dialogue: nine letters and digits, as Mistral's templates require."""
    return f"call{number:05d}"


def split_results(inner: str, last: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split the text of an `<obs>` block into one message per call of the turn `last`, or return it as one message."""
    value = read_literal(inner)
    calls: Sequence[Mapping[str, Any]] = last.get("tool_calls", ())
    is_list = isinstance(value, list) and all(isinstance(item, Mapping) and "results" in item for item in value)
    if not is_list or len(value) != len(calls):
        named = {"name": calls[0]["function"]["name"], "tool_call_id": calls[0]["id"]} if len(calls) == 1 else {}
        return [{"role": "tool", "content": inner, **named}]
    texts = [
        each if isinstance(each := item["results"], str) else json.dumps(each, ensure_ascii=False) for item in value
    ]
    return [
        {"role": "tool", "content": text, "name": call["function"]["name"], "tool_call_id": call["id"]}
        for text, call in zip(texts, calls, strict=True)
    ]
