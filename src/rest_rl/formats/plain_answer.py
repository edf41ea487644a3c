"""Shared code of the formats with a plain-text answer: an optional think block, then text and calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rest_rl.formats.protocol import ToolFormat
from rest_rl.formats.reading import ResponseBuilder, clean_text, unwritable_error
from rest_rl.response import ParsedResponse, Region, ToolCall

THINK_TAGS = ("<think>", "</think>")


@dataclass(slots=True, kw_only=True)
class PlainResponseBuilder(ResponseBuilder):
    """Collects the parts of a response whose text outside of calls is the answer; tags in the answer are violations."""

    tags: re.Pattern[str]
    well_formed: bool = True
    attempted_call: bool = False
    thought: str | None = None
    answers: list[str] = field(default_factory=list)
    has_stray_tag: bool = False
    """Whether there was a tag outside of blocks; text after it is not part of the answer."""

    def add_violation(self, problem: str) -> None:
        """Add a problem that makes the response malformed."""
        self.well_formed = False
        self.add_problem(problem)

    def read_thought(self, text: str, think: Sequence[tuple[str, str]] = (THINK_TAGS,)) -> int:
        """Read the think block, if the response starts with one, and return the position after it."""
        begin = len(text) - len(text.lstrip())
        for opening, closing in think:
            if not text.startswith(opening, begin):
                continue
            start = begin + len(opening)
            end = text.find(closing, start)
            if end < 0:
                self.has_stray_tag = True
                self.add_violation(f"unmatched {opening} at character {begin}")
                return start
            self.thought = text[start:end].strip()
            self.mark(0, start, Region.FORMAT)
            self.mark(start, end, Region.REASONING)
            self.mark(end, end + len(closing), Region.FORMAT)
            for tag in self.tags.finditer(text, start, end):
                self.add_violation(f"inside a block: {tag.group()} at character {tag.start()}")
            return end + len(closing)
        return 0

    def read_text(self, text: str, start: int, end: int) -> None:
        """Mark the text up to the first tag as ANSWER, and the white space around it as FORMAT."""
        first_tag = end
        for tag in self.tags.finditer(text, start, end):
            first_tag = min(first_tag, tag.start())
            self.add_violation(f"unmatched {tag.group()} at character {tag.start()}")
        if not self.has_stray_tag:
            gap = text[start:first_tag]
            answer = gap.strip()
            begin = start + len(gap) - len(gap.lstrip())
            self.mark(start, begin, Region.FORMAT)
            self.mark(begin, begin + len(answer), Region.ANSWER)
            self.mark(begin + len(answer), first_tag, Region.FORMAT)
            self.answers.append(answer)
        self.has_stray_tag = self.has_stray_tag or first_tag < end

    def read_gap(self, text: str, start: int, end: int, after: str = "the calls") -> None:
        """Mark white space as FORMAT; any other text is a violation and stays OTHER."""
        if not text[start:end].strip():
            self.mark(start, end, Region.FORMAT)
        else:
            self.add_violation(f"text after {after} at character {start + self.offset}")

    def response(self, *, text_values: bool = False) -> ParsedResponse:
        return ParsedResponse(
            thought=self.thought,
            calls=tuple(self.calls),
            answer="\n".join(filter(None, self.answers)) or None,
            spans=tuple(self.spans),
            problems=tuple(self.problems),
            well_formed=self.well_formed,
            attempted_call=self.attempted_call,
            unreadable_calls=self.unreadable_calls,
            untagged_answer=True,
            text_values=text_values,
        )


def render_plain(
    tool_format: ToolFormat,
    thought: str | None,
    calls: Sequence[ToolCall],
    answer: str | None,
    written: str,
    think: tuple[str, str] = THINK_TAGS,
) -> str:
    """Join the think block, the answer and the rendered calls; UserError if `tool_format` parses them differently."""
    # Each format has its own texts that it cannot represent, such as an answer that looks like a call. Parsing the
    # result again finds all of them, so no format needs its own rules.
    head = ""
    if thought is not None:
        head = f"{think[0]}\n{clean_text(thought, tool_format.tags, 'thought')}\n{think[1]}\n\n"
    said = clean_text(answer or "", tool_format.tags, "answer")
    text = head + "\n\n".join(filter(None, [said, written]))
    parsed = tool_format.parse(text, spans=False)
    if parsed.answer != (said or None) or len(parsed.calls) + parsed.unreadable_calls != len(calls):
        raise unwritable_error(tool_format.name, "an answer that contains what looks like a call", "another text")
    for call, read in zip(calls, parsed.calls, strict=False):
        if (call.name, _to_json_types(call.arguments)) != (read.name, read.arguments):
            got = f"the call of {call.name!r}, which would be parsed as another call of {read.name!r}"
            raise unwritable_error(tool_format.name, got, "integers of at most 400 digits and at most 64 levels")
    if len(parsed.calls) != len(calls) or not parsed.well_formed:
        got = f"the calls of {', '.join(repr(call.name) for call in calls)} ({'; '.join(parsed.problems[:2])})"
        raise unwritable_error(tool_format.name, got, "calls that can be parsed again")
    return text


def _to_json_types(value: Any) -> Any:
    # Tuples become lists and keys strings, as after a round trip through JSON.
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _to_json_types(item) for key, item in value.items()}
    return [_to_json_types(item) for item in value] if isinstance(value, (list, tuple)) else value
