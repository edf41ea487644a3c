"""Prompts in ToolRL's published form: a system text with a numbered list of tools, and one user message.

The user message contains the whole history. A model that was trained on such prompts (`[data] keep_prompts`) is also
evaluated with them. The text around the list belongs to ToolRL and is read from ToolRL's files.
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
    """ToolRL's fixed system text: the part before the list of tools, and the part after the list."""

    before: str
    after: str

    @property
    def digest(self) -> str:
        """A hash of both parts, which an evaluation records to identify them."""
        return hashlib.sha256(f"{self.before}\0{self.after}".encode()).hexdigest()[:12]

    def flatten(self, sample: ToolSample) -> ToolSample:
        """Return the sample with its tools in the system message and its history in one user message.

        This differs from ToolRL in two ways: the sample's own system messages follow ToolRL's, and the required
        arguments of each tool are listed (`render_tools`). A sample with `tools_in_prompt` is returned unchanged.
        """
        if sample.tools_in_prompt:
            return sample
        own_texts = [message["content"] for message in sample.messages if message["role"] == "system"]
        system = "\n\n".join([f"{self.before}{render_tools(sample.tools)}{self.after}", *own_texts])
        messages = ({"role": "system", "content": system}, {"role": "user", "content": render_history(sample.messages)})
        return replace(sample, messages=messages, tools_in_prompt=True)


class FlattenedLayout(PromptLayout):
    """Renders prompts in ToolRL's published form; the chat template adds only the roles."""

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
            raise UserError(f"the format is {self.format.name!r}", f"{FORMAT!r}, which ToolRL's prompts request")
        self.frame = frame

    def render(self, sample: ToolSample) -> str:
        """Return the prompt of the flattened sample, up to the start of the response."""
        return super().render(self.frame.flatten(sample))


def frame_of(path: str) -> Frame:
    """Read the frame from the first row of a file that has ToolRL's system text; UserError if there is none."""
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
        f"no row of {path} has ToolRL's system text",
        remedy="pass a file that ToolRL published, such as rlla_sft.json or the Parquet file of rlla_4k",
    )


def render_tools(tools: Sequence[Message]) -> str:
    """Render a numbered list of tools as ToolRL does: name, description, and argument schemas as one line of JSON.

    If a schema has `required`, we add a line such as `Required: ["city"]`, which ToolRL lacks. This line is not a key
    of the JSON, because the keys of the JSON are argument names, and an argument may itself be called `required`.
    """
    lines = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool)
        schema = function.get("parameters") or {}
        lines += [f"{number}. Name: {function['name']}", f"Description: {function.get('description') or ''}"]
        lines.append(f"Parameters: {json.dumps(schema.get('properties') or {})}")
        lines += [f"Required: {json.dumps(schema['required'])}"] if schema.get("required") else []
    return "\n".join(lines)


def render_history(messages: Sequence[Message]) -> str:
    """Render a history as one text in ToolRL's form, with reasoning (`reasoning_content`) and without system messages.

    `rest_rl.data.shapes.toolrl.parse_history` is the inverse, except for the reasoning. Non-ASCII characters in JSON
    are escaped, as in ToolRL.
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
    # A turn without reasoning gets an empty think block, because every published turn has one.
    blocks = [_block("think", message.get("reasoning_content"))]
    if calls:
        functions = [call["function"] for call in calls]
        lines = [json.dumps({"name": one["name"], "parameters": one["arguments"]}) for one in functions]
        blocks.append("\n".join(["<tool_call>", *lines, "</tool_call>"]))
    if (message.get("content") or "").strip():
        blocks.append(_block("response", message["content"]))
    return blocks


def _results_text(results: Sequence[Message], calls: Sequence[Message]) -> str:
    # A JSON list that names the call of each result, or the plain texts if a call cannot be determined.
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
    # Published results are JSON values, not text. Scalars are converted only if JSON would write them the same way, so
    # that "007" stays text.
    try:
        value = load_json(content)
    except ValueError:
        return content
    is_same = isinstance(value, dict | list) or (not isinstance(value, str) and json.dumps(value) == content)
    return value if is_same else content
