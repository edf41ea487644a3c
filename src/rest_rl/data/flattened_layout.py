"""Prompts as ToolRL published them: a system text around numbered tools, and the history as one user message.

A model that was trained on such prompts (`[data] keep_prompts`) is asked by them elsewhere too. The fixed texts are
ToolRL's and no part of this package: they are read from a file that holds its rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rest_rl.data.layout import PromptLayout
from rest_rl.data.reading import RowError, RowReader, load_json
from rest_rl.data.reasons import RowContext, RowRejectedError
from rest_rl.data.samples import ToolSample
from rest_rl.data.shapes import find_shape, own, toolrl
from rest_rl.data.shapes.toolrl import FORMAT, HEADING, tool_list_span
from rest_rl.errors import UserError
from rest_rl.formats import OpenedThinkFormat, ToolFormat

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Frame:
    """What stands before and after the list of tools in the published system text."""

    before: str
    after: str

    @property
    def digest(self) -> str:
        """What tells these texts from others."""
        return hashlib.sha256(f"{self.before}\0{self.after}".encode()).hexdigest()[:12]

    def flatten(self, sample: ToolSample) -> ToolSample:
        """The sample with its tools in the system message and its history in one user message.

        Two departures from ToolRL, which drops both: a system message of the sample's own stays, as a last paragraph,
        and `tools_text` says which arguments are required. A sample with `tools_in_prompt` stays as it is.
        """
        if sample.tools_in_prompt:
            return sample
        own_texts = [message["content"] for message in sample.messages if message["role"] == "system"]
        system = "\n\n".join([f"{self.before}{tools_text(sample.tools)}{self.after}", *own_texts])
        messages = ({"role": "system", "content": system}, {"role": "user", "content": history_text(sample.messages)})
        return replace(sample, messages=messages, tools_in_prompt=True)


class FlattenedLayout(PromptLayout):
    """Prompts of a frame, around which the model's chat template writes no more than the roles."""

    def __init__(
        self,
        tokenizer: Any,
        frame: Frame,
        tool_format: str | ToolFormat = FORMAT,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, tool_format, variables)
        inner = self.format.inner if isinstance(self.format, OpenedThinkFormat) else self.format
        if inner.name != FORMAT:
            got = f"format {self.format.name!r} for prompts as ToolRL published them"
            raise UserError(got, f"{FORMAT!r}, which they ask for", "change the format")
        self.frame = frame

    def render(self, sample: ToolSample) -> str:
        """The prompt text of the flattened sample, up to where the response begins."""
        return super().render(self.frame.flatten(sample))


def frame_of(path: str) -> Frame:
    """The texts of the first row in a file that has ToolRL's: its own rows, or ours where prompts were kept."""
    for row in RowReader(path):
        if isinstance(row.value, RowError) or not (shape := find_shape(row.value, (own, toolrl))):
            continue
        try:
            for sample in shape.read(row.value, RowContext(f"row {row.number}", keep_prompts=True)):
                if sample.tools_in_prompt and sample.messages[0]["role"] == "system":
                    system = sample.messages[0]["content"]
                    begin, end = tool_list_span(system)
                    return Frame(system[:begin], system[end:])
        except RowRejectedError:
            continue
    raise UserError(
        f"{path}, no row of which has ToolRL's system text",
        "rows as ToolRL published them",
        "name a file of them, such as rlla_sft.json or the Parquet of rlla_4k",
    )


def tools_text(tools: Sequence[Message]) -> str:
    """The tools as ToolRL numbers them: name, description, and the schemas of the arguments as one line of JSON.

    Where a schema has `required`, a line `Required: ["city"]` follows, which ToolRL does not have. It leaves the JSON
    as ToolRL writes it: there `required` would stand among the keys of an argument, which may have such a list itself.
    """
    lines = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool)
        schema = function.get("parameters") or {}
        lines += [f"{number}. Name: {function['name']}", f"Description: {function.get('description') or ''}"]
        lines.append(f"Parameters: {json.dumps(schema.get('properties') or {})}")
        lines += [f"Required: {json.dumps(schema['required'])}"] if schema.get("required") else []
    return "\n".join(lines)


def history_text(messages: Sequence[Message]) -> str:
    """The history as ToolRL flattens it, thoughts (`reasoning_content`) included; system messages are left out.

    `rest_rl.data.shapes.toolrl.history_of` reads it back but for the thoughts. JSON is ASCII, as published.
    """
    paragraphs: list[list[str]] = []
    calls: Sequence[Message] = ()
    results: list[Message] = []
    for message, following in zip(messages, [*messages[1:], {"role": None}], strict=True):
        if message["role"] == "user":
            paragraphs.append([_block("user", message["content"])])
        elif message["role"] == "assistant":
            calls = message.get("tool_calls") or ()
            paragraphs.append(_assistant_blocks(message, calls))
        elif message["role"] == "tool":
            results.append(message)
            if following["role"] != "tool":
                paragraphs = paragraphs or [[]]
                paragraphs[-1].append(_block("obs", _results_text(results, calls)))
                results = []
    return f"{HEADING}\n" + "\n\n".join("\n".join(blocks) for blocks in paragraphs)


def _block(tag: str, text: str | None) -> str:
    return f"<{tag}> {(text or '').strip()} </{tag}>"


def _assistant_blocks(message: Message, calls: Sequence[Message]) -> list[str]:
    """Without a thought with an empty think block, since all published turns have one."""
    blocks = [_block("think", message.get("reasoning_content"))]
    if calls:
        functions = [call["function"] for call in calls]
        lines = [json.dumps({"name": one["name"], "parameters": one["arguments"]}) for one in functions]
        blocks.append("\n".join(["<tool_call>", *lines, "</tool_call>"]))
    if (message.get("content") or "").strip():
        blocks.append(_block("response", message["content"]))
    return blocks


def _results_text(results: Sequence[Message], calls: Sequence[Message]) -> str:
    """Results as a list of JSON objects; as they are where nothing tells which calls they belong to."""
    by_id = {call["id"]: call["function"]["name"] for call in calls if call.get("id") is not None}
    in_order = [call["function"]["name"] for call in calls] if len(calls) == len(results) else [None] * len(results)
    named = [
        (result.get("name") or by_id.get(result.get("tool_call_id")) or name, result["content"] or "")
        for result, name in zip(results, in_order, strict=True)
    ]
    if any(name is None for name, _ in named):
        return "\n".join(str(content).strip() for _, content in named)
    return json.dumps([{"name": name, "results": _result_value(content)} for name, content in named])


def _result_value(content: str) -> Any:
    """What a result's text spells in JSON, as published results are values; text that spells none is a value itself."""
    try:
        value = load_json(content)
    except ValueError:
        return content
    is_same = isinstance(value, dict | list) or (not isinstance(value, str) and json.dumps(value) == content)
    return value if is_same else content
