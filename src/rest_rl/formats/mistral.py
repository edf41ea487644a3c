"""The tool-call formats of Mistral's models: calls after `[TOOL_CALLS]`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rest_rl.formats.json_calls import dump_call, dump_json, escape_tags, read_call_object
from rest_rl.formats.plain_answer import THINK_TAGS, PlainResponseBuilder, render_plain
from rest_rl.formats.reading import describe_tools, unwritable_error
from rest_rl.json_spans import decode_at, find_bracket_end, skip_space
from rest_rl.response import ParsedResponse, Region, Span, ToolCall

_MARKER = "[TOOL_CALLS]"
_BRACKET_THINK = ("[THINK]", "[/THINK]")
_TAGS = ("<think>", "</think>", "[THINK]", "[/THINK]", _MARKER, "[ARGS]", "[CALL_ID]")
_PATTERN = re.compile("|".join(map(re.escape, _TAGS)))
# A tool name or a call id.
_WORD = re.compile(r"[^\[{\n]*")


@dataclass(frozen=True)
class MistralFormat:
    """Mistral up to tokenizer v7: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, with optional further keys.

    Also parses the v11 format. The answer is plain text before the calls. After a call that is not valid JSON, every
    `[TOOL_CALLS]` begins a call, even inside a string.
    """

    name: str = "mistral"
    tags: tuple[str, ...] = _TAGS

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        builder = PlainResponseBuilder(wants_spans=spans, tags=_PATTERN)
        at = builder.read_thought(text, (THINK_TAGS, _BRACKET_THINK))
        start = text.find(_MARKER, at)
        builder.read_text(text, at, len(text) if start < 0 else start)
        all_json = True
        while start >= 0:
            builder.attempted_call = True
            body = start + len(_MARKER)
            builder.mark(start, body, Region.FORMAT)
            end = _find_json_end(text, body) if all_json else -1
            # While all calls are valid JSON, markers inside their strings can be skipped. After the first broken call
            # we only look up to the next marker, because decoding to the end again for each one would take quadratic
            # time.
            if end < 0:
                all_json = False
                following = text.find(_MARKER, body)
                end = len(text) if following < 0 else following
            builder.offset = body
            end = body + _read_calls(builder, text[body:end])
            builder.offset = 0
            start = text.find(_MARKER, end)
            builder.read_gap(text, end, len(text) if start < 0 else start)
        return builder.response()

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        objects = ", ".join(dump_call(call, "arguments", _PATTERN) for call in calls)
        return render_plain(self, thought, calls, answer, f"{_MARKER} [{objects}]" if calls else "")

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return (
            f"You can call these tools, one JSON description per line:\n{describe_tools(tools)}\n\n"
            "To call tools, write one JSON list of all calls:\n"
            f'{_MARKER} [{{"name": "tool name", "arguments": {{"argument": "value"}}}}]\n'
            "Otherwise answer in plain text."
        )


@dataclass(frozen=True)
class MistralV11Format(MistralFormat):
    """Mistral since tokenizer v11: `[TOOL_CALLS]name[ARGS]{...}` for each call, `[THINK]` for the thought.

    Also parses the earlier format, and `[CALL_ID]id` before `[ARGS]`.
    """

    name: str = "mistral_v11"
    tags: tuple[str, ...] = (*_BRACKET_THINK, *(tag for tag in _TAGS if tag not in _BRACKET_THINK))

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """Return think block, answer and calls, if present; UserError for a name with a bracket or brace."""
        for call in calls:
            if not call.name.strip() or call.name != call.name.strip() or re.search(r"[\[{\n]", call.name):
                expected = "a name without `[`, `{`, line breaks or surrounding spaces"
                raise unwritable_error(self.name, f"tool name {call.name!r}", expected)
        written = "".join(
            f"{_MARKER}{call.name}[ARGS]{escape_tags(dump_json(call, dict(call.arguments)), _PATTERN)}"
            for call in calls
        )
        return render_plain(self, thought, calls, answer, written, _BRACKET_THINK)

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return (
            f"You can call these tools, one JSON description per line:\n{describe_tools(tools)}\n\n"
            f'Write each call as {_MARKER}tool name[ARGS]{{"argument": "value"}}\n'
            "Otherwise answer in plain text."
        )


def _find_json_end(text: str, body: int) -> int:
    # The position after the JSON of the call or list of calls at `body`; -1 if it is not valid JSON.
    at = skip_space(text, body)
    if _opens_list(text, at):
        return decode_at(text, at)[1]
    head = _read_head(text, at)
    return decode_at(text, head.arguments)[1] if head else -1


def _opens_list(text: str, at: int) -> bool:
    return text.startswith("[", at) and not text.startswith(("[ARGS]", "[CALL_ID]"), at)


class _CallHead(NamedTuple):
    # The part of a v11 call before its arguments.
    name: Span
    marked: bool  # [ARGS] precedes the arguments
    arguments: int  # position of the arguments


def _read_head(text: str, at: int) -> _CallHead | None:
    start, end = _word_bounds(text, at)
    name, at = text[start:end].strip(), end
    if text.startswith("[CALL_ID]", at):
        _, at = _word_bounds(text, at + len("[CALL_ID]"))
    marked = text.startswith("[ARGS]", at)
    at = skip_space(text, at + len("[ARGS]") * marked)
    return _CallHead(Span(start, start + len(name), Region.NAME), marked, at) if text.startswith("{", at) else None


def _word_bounds(text: str, at: int) -> tuple[int, int]:
    match = _WORD.match(text, skip_space(text, at))
    assert match is not None  # the pattern matches the empty string
    return match.span()


def _read_calls(builder: PlainResponseBuilder, text: str) -> int:
    # Reads the list of calls or the single call at the start of `text`; returns the position after it.
    at = skip_space(text, 0)
    if _opens_list(text, at):
        builder.mark(0, at + 1, Region.FORMAT)
        return _read_list(builder, text, at + 1)
    if text.startswith("{", at):
        builder.add_violation(f"expected a JSON list at character {at + builder.offset}")
        builder.mark(0, at, Region.FORMAT)
        return _read_item(builder, text, at)
    head = _read_head(text, at)
    if head is None:
        builder.add_unreadable_call(0, "expected a JSON list of calls, or name[ARGS]{...}")
        return len(text)
    return _read_named_call(builder, text, head)


def _read_named_call(builder: PlainResponseBuilder, text: str, head: _CallHead) -> int:
    if not head.marked:
        builder.add_violation(f"no [ARGS] at character {head.arguments + builder.offset}")
    name = text[head.name.start : head.name.end]
    arguments, end = decode_at(text, head.arguments)
    readable = bool(name) and end >= 0
    if readable:
        builder.calls.append(ToolCall(name, arguments))
    else:
        builder.add_unreadable_call(0, "the arguments are not a JSON object" if name else "no name")
    if end < 0:
        end = _end_or_cut_off(builder, text, head.arguments, find_bracket_end(text, head.arguments))
    parts = [head.name] * bool(name) + [Span(head.arguments, end, Region.ARGUMENTS)]
    builder.mark_parts(0, end, parts, Region.FORMAT if readable else Region.OTHER)
    return end


def _read_list(builder: PlainResponseBuilder, text: str, at: int) -> int:
    # Reads the items of a list, starting after its `[`; returns the position after its `]`.
    begin, comma = skip_space(text, at), -1
    while not text.startswith("]", begin):
        builder.mark(at, begin, Region.FORMAT)
        at = _read_item(builder, text, begin)
        begin = comma = skip_space(text, at)
        if text.startswith(",", comma):
            begin = skip_space(text, comma + 1)
        elif not text.startswith("]", comma):
            builder.add_violation(f"expected ',' or ']' at character {comma + builder.offset}")
            return at
    if comma >= 0 and begin > comma:
        builder.add_violation(f"a comma without a call at character {comma + builder.offset}")
    builder.mark(at, begin + 1, Region.FORMAT)
    return begin + 1


def _read_item(builder: PlainResponseBuilder, text: str, at: int) -> int:
    if text.startswith("{", at):
        return _end_or_cut_off(builder, text, at, read_call_object(builder, text, at, "arguments"))
    builder.add_unreadable_call(at, "expected a JSON object")
    return _end_or_cut_off(builder, text, at, decode_at(text, at)[1])


def _end_or_cut_off(builder: PlainResponseBuilder, text: str, start: int, end: int) -> int:
    if end >= 0:
        return end
    builder.add_violation(f"the call at character {start + builder.offset} is cut off")
    return len(text)
