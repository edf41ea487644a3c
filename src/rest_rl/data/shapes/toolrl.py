"""ToolRL's own files (`rlla_sft.json`, the `rlla_4k` Parquet): a row is one sample, flattened into two texts.

The tools stand in the system text as numbered entries, the whole history in one user message of `<user>`, `<think>`,
`<tool_call>`, `<obs>` and `<response>` blocks. By default the texts are read back into messages and tools, so that any
chat template can lay them out; kept prompts stay as published. API-Bank's test samples are laid out the same way (there
the parameters are Python dicts, and level 3 names a tool as `1. Name: description`).
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
_THINK, _END = "<think>", "</think>"


def matches(row: Mapping[str, Any]) -> bool:
    is_raw = {"instruction", "input"} <= set(row) and ("output" in row or "expected_output" in row)
    return is_raw or {"prompt", "reward_model"} <= set(row)


def read(row: Mapping[str, Any], context: RowContext) -> list[ToolSample]:
    """The sample of a raw row {instruction, input, output} or of a row of the Parquet file."""
    if "reward_model" in row:
        prompt = row.get("prompt")
        texts = [text_of(message, "content") for message in prompt] if isinstance(prompt, list | tuple) else []
        if len(texts) != 2:
            raise RowRejectedError("bad_row", f"got {len(texts)} messages, expected a system and a user message")
        (system, user), output = texts, text_of(row["reward_model"], "ground_truth")
    else:
        system, user, output = (text_of(row, key) for key in ("instruction", "input", "output"))
    thought, gold = _read_gold(output)
    if thought and any(tag in thought for tag in get_format(FORMAT).tags):
        context.note("thought_quotes_tags", f"got a thought that quotes tags: {thought[:60]!r}", context.id)
    return [flattened_sample(context, system, user, gold, thought)]


def text_of(row: Any, key: str) -> str:
    """A field that must be text; RowRejectedError `bad_row` for another."""
    value = row.get(key) if isinstance(row, Mapping) else None
    if not isinstance(value, str):
        raise RowRejectedError("bad_row", f"got {key} of type {type(value).__name__}, expected text")
    return value


def flattened_sample(
    context: RowContext, system: str, user: str, gold: Gold, thought: str | None = None, kind: str = ""
) -> ToolSample:
    """The sample of two published texts and its gold."""
    tools, kind = tools_of(system), kind or kind_of(gold)
    if context.keep_prompts:
        messages = ({"role": "system", "content": system}, {"role": "user", "content": user})
        return ToolSample(context.id, messages, tools, gold, thought, kind, tools_in_prompt=True)
    return ToolSample(context.id, tuple(history_of(user)), tools, gold, thought, kind)


def kind_of(gold: Gold) -> str:
    """`answer` for no call, `single` for one, `parallel` for several."""
    return ("answer", "single", "parallel")[min(len(gold.calls), 2)]


def _read_gold(output: str) -> tuple[str | None, Gold]:
    """(thought, gold) of a demonstration; RowRejectedError `bad_gold` unless every line of its calls can be read.

    The thought ends at the last `</think>`: many a thought quotes the tags, and blocks in it are no gold.
    """
    before, end, after = output.rpartition(_END)
    if not output.lstrip().startswith(_THINK) or not end:
        raise RowRejectedError("bad_gold", f"got {output[:60]!r}, expected a think block first")
    parsed = get_format(FORMAT).parse(f"{_THINK}{_END}{after}", spans=False)
    if not parsed.well_formed or parsed.unreadable_calls:
        raise RowRejectedError("bad_gold", "; ".join(parsed.problems) or "got a demonstration that is not well formed")
    return before.lstrip().removeprefix(_THINK).strip() or None, Gold(parsed.calls, parsed.answer or None)


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
        is_long = match["name"] is not None
        named, description = (match["name"], match["description"]) if is_long else (match["short"], match["text"])
        arguments = read_literal(match["parameters"])
        if not isinstance(arguments, Mapping):
            found = f"got parameters {match['parameters'][:80]!r} of tool {named!r}, expected an object"
            raise RowRejectedError("bad_tool_schema", found)
        schema = argument_table(arguments, f"tool {named!r}", required=False)
        function = {"name": named, "description": description.strip(), "parameters": schema}
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
            raise RowRejectedError("bad_history", f"got the call {line[:80]!r} in the history")
        calls.append(to_message_call(ToolCall(call["name"], arguments), id=call_id(count + len(calls))))
    return calls


def call_id(number: int) -> str:
    """The id of a dialogue's call: nine letters and digits, as Mistral's templates want."""
    return f"call{number:05d}"


def split_results(inner: str, last: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tool messages: one per result where there are as many as calls, else one with the whole text."""
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
