"""The tool-call format of Llama 3.1 to 3.3: JSON objects without tags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rest_rl.formats.json_calls import dump_call, read_call_object
from rest_rl.formats.plain_answer import PlainResponseBuilder, render_plain
from rest_rl.formats.reading import describe_tools
from rest_rl.response import ParsedResponse, Region, ToolCall


@dataclass(frozen=True)
class Llama3Format:
    """Llama 3: each call is a JSON object with `name` and `parameters`; several are joined by `; `.

    The calls begin at `<|python_tag|>`, at a `{` at the start of the response (after the think block), or at a line
    that begins with `{"name":`, and continue to the end. `parse` also accepts calls without a separator. The text
    before the calls is the answer.
    """

    name: str = "llama3"
    tags: tuple[str, ...] = ("<think>", "</think>", "<|python_tag|>")

    _pattern = re.compile(r"</?think>|<\|python_tag\|>")
    _begin = re.compile(r'<\|python_tag\|>|^[ \t]*(?=\{[ \t\n\r]*"name"[ \t\n\r]*:)', re.MULTILINE)
    _between = re.compile(r"[ \t\n\r]*(?:;[ \t\n\r]*)?(?:<\|python_tag\|>[ \t\n\r]*)?")

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        builder = PlainResponseBuilder(wants_spans=spans, tags=self._pattern)
        at = builder.read_thought(text)
        start = self._calls_start(text, at)
        builder.read_text(text, at, start)
        if start < len(text):
            self._read_calls(builder, text, start)
        return builder.response()

    def _calls_start(self, text: str, at: int) -> int:
        first = at + len(text[at:]) - len(text[at:].lstrip())
        if text.startswith("{", first):
            return first
        begin = self._begin.search(text, at)
        return begin.start() if begin else len(text)

    def _read_calls(self, builder: PlainResponseBuilder, text: str, start: int) -> None:
        # Separator and tag between calls are optional. Whatever stops the loop is text after the calls, a violation.
        builder.attempted_call = True
        at, count = start, 0
        while (between := self._between.match(text, at)) and text.startswith("{", between.end()):
            count += 1
            builder.mark(at, between.end(), Region.FORMAT)
            end = read_call_object(builder, text, between.end(), "parameters")
            if end < 0:
                builder.add_violation(f"the call at character {between.end()} is cut off")
                return
            at = end
        if count:
            builder.read_gap(text, at, len(text))
        else:
            builder.add_unreadable_call(start, "expected a JSON object")

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """Return think block, answer and calls, if present; UserError for an answer that looks like a call."""
        written = "; ".join(dump_call(call, "parameters", self._pattern) for call in calls)
        return render_plain(self, thought, calls, answer, written)

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return (
            f"You can call these functions, one JSON description per line:\n{describe_tools(tools)}\n\n"
            "To call a function, respond with one JSON object and nothing else:\n"
            '{"name": "function name", "parameters": {"argument": "value"}}\n'
            "Join several calls by `; `. Otherwise answer in plain text."
        )
