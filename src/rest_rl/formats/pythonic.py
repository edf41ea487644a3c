"""The tool-call format of Llama 4 and of many function-calling prompts: a Python list of calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rest_rl.formats.json_calls import dump_json, escape_tags
from rest_rl.formats.plain_answer import PlainResponseBuilder, render_plain
from rest_rl.formats.python_values import BRACKET_OR_STRING, NotLiteralError, read_arguments, write_arguments
from rest_rl.formats.reading import clean_text, describe_tools, unwritable_error
from rest_rl.json_spans import find_bracket_end, skip_space
from rest_rl.response import ParsedResponse, Region, Span, ToolCall

_START, _END = "<|python_start|>", "<|python_end|>"
_NAME = r"""[^\s()\[\]=,"'][^()\[\]=,"'\n]*"""


@dataclass(frozen=True)
class PythonicFormat:
    """A Python list of calls with keyword arguments, `[f(a=1), g(b="x")]`; nothing is evaluated.

    The list begins at `<|python_start|>` or at a line that begins with `[name(`, and only `<|python_end|>` may follow.
    The text before it is the answer. Names must not contain brackets, quotes, commas, `=` or line breaks. Calls with
    positional arguments or expressions are unreadable.
    """

    name: str = "pythonic"
    tags: tuple[str, ...] = ("<think>", "</think>", _START, _END)

    _pattern = re.compile(r"</?think>|<\|python_(?:start|end)\|>")
    _on_line = re.compile(rf"[ \t]*(?=\[[ \t\n\r]*{_NAME}\()")
    _begin = re.compile(rf"<\|python_start\|>|^{_on_line.pattern}", re.MULTILINE)
    _call = re.compile(rf"({_NAME})\(")
    _written_name = re.compile(_NAME)

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        builder = PlainResponseBuilder(wants_spans=spans, tags=self._pattern)
        at = builder.read_thought(text)
        begin = self._on_line.match(text, at) or self._begin.search(text, at)
        start = begin.start() if begin else len(text)
        builder.read_text(text, at, start)
        if begin:
            builder.attempted_call = True
            self._read_list(builder, text, start)
        return builder.response()

    def _read_list(self, builder: PlainResponseBuilder, text: str, start: int) -> None:
        at = skip_space(text, start)
        if text.startswith(_START, at):
            at = skip_space(text, at + len(_START))
        if not text.startswith("[", at):
            builder.add_unreadable_call(start, f"expected a list of calls after {_START}")
            return
        builder.mark(start, at + 1, Region.FORMAT)
        at += 1
        while True:
            begin = skip_space(text, at)
            if text.startswith("]", begin):
                break
            builder.mark(at, begin, Region.FORMAT)
            at = self._read_call(builder, text, begin)
            comma = skip_space(text, at)
            if text.startswith(",", comma):
                builder.mark(at, comma + 1, Region.FORMAT)
                at = comma + 1
            elif not text.startswith("]", comma):
                builder.add_violation(f"expected ',' or ']' at character {comma}")
                return
        end = skip_space(text, begin + 1)
        end = end + len(_END) if text.startswith(_END, end) else begin + 1
        builder.mark(at, end, Region.FORMAT)
        builder.read_gap(text, end, len(text))

    def _read_call(self, builder: PlainResponseBuilder, text: str, start: int) -> int:
        # Returns the position after the call. The end of a broken call is where its parentheses close, so that the
        # calls after it are still read.
        head = self._call.match(text, start)
        if head is None:
            builder.add_unreadable_call(start, "expected name(")
            return len(text)
        name, opening = head.group(1).rstrip(), head.end() - 1
        try:
            arguments, end = read_arguments(text, opening)
        except NotLiteralError as error:
            builder.add_unreadable_call(start, str(error))
            rest, end = Region.OTHER, find_bracket_end(text, opening, BRACKET_OR_STRING)
        else:
            builder.calls.append(ToolCall(name, arguments))
            rest = Region.FORMAT
        if end < 0:
            builder.add_violation(f"the call at character {start} is cut off")
            end = len(text)
        parts = Span(start, start + len(name), Region.NAME), Span(opening, end, Region.ARGUMENTS)
        builder.mark_parts(start, end, parts, rest)
        return end

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """Return think block, answer and calls, if present; UserError for an answer that looks like a call."""
        written = ", ".join(map(self._write_call, calls))
        return render_plain(self, thought, calls, answer, f"[{written}]" if calls else "")

    def _write_call(self, call: ToolCall) -> str:
        if not self._written_name.fullmatch(call.name) or call.name != call.name.rstrip():
            expected = "a name without brackets, quotes, commas, `=`, line breaks or surrounding spaces"
            raise unwritable_error(self.name, f"tool name {call.name!r}", expected)
        clean_text(call.name, self.tags, "tool name")
        dump_json(call, dict(call.arguments))  # raises for values that are not JSON
        return call.name + escape_tags(write_arguments(call.arguments), self._pattern)

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return (
            f"You can call these functions, one JSON description per line:\n{describe_tools(tools)}\n\n"
            "To call functions, respond with a Python list of calls with keyword arguments and nothing else:\n"
            '[function_name(argument="value"), other_function(number=1)]\n'
            "Otherwise answer in plain text."
        )
