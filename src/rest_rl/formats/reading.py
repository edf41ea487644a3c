"""Shared parts of the parsers: collecting results, and finding blocks between tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rest_rl.errors import UserError
from rest_rl.response import Region, Span, ToolCall

MAX_PROBLEMS = 20


class Block(NamedTuple):
    """A complete block `<tag>inner</tag>`; `inner_start` and `inner_end` exclude the tags."""

    tag: str
    start: int
    inner_start: int
    inner_end: int
    end: int


_NO_SPAN = Span(-1, -1, Region.OTHER)


class Tag(NamedTuple):
    """A tag that neither opens nor closes a block, because it is unmatched or inside a block."""

    position: int
    text: str


@dataclass(slots=True)
class ResponseBuilder:
    """Collects the spans, calls and problems of a response, in text order."""

    wants_spans: bool
    spans: list[Span] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unreadable_calls: int = 0
    offset: int = 0
    """Added to all positions, while the parser reads a part of the response that starts there."""

    def mark(self, start: int, end: int, region: Region) -> None:
        """Add a span, merged with the previous span if both touch and have the same region; OTHER gets no span."""
        if start >= end or region is Region.OTHER or not self.wants_spans:
            return
        start, end = start + self.offset, end + self.offset
        last = self.spans[-1] if self.spans else _NO_SPAN
        if last.end == start and last.region is region:
            self.spans[-1] = Span(last.start, end, region)
        else:
            self.spans.append(Span(start, end, region))

    def add_problem(self, problem: str) -> None:
        """Add a problem, unless there are `MAX_PROBLEMS` already."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def add_unreadable_call(self, start: int, error: str) -> None:
        """Count an unreadable call that begins at `start`."""
        self.unreadable_calls += 1
        self.add_problem(f"call at character {start + self.offset}: {error}")

    def add_tag_problems(self, strays: Sequence[Tag], nested: Sequence[Tag]) -> None:
        """Add a problem for each stray tag (outside all blocks) and each nested tag (inside a block)."""
        for word, tags in (("unmatched", strays), ("inside a block:", nested)):
            for tag in tags[:MAX_PROBLEMS]:
                self.add_problem(f"{word} {tag.text} at character {tag.position}")

    def mark_parts(self, start: int, end: int, parts: Sequence[Span], rest: Region) -> None:
        """Mark the `parts`, given in text order, and mark all other text between `start` and `end` as `rest`."""
        at = start
        for part in parts if self.wants_spans else ():
            self.mark(at, part.start, rest)
            self.mark(*part)
            at = part.end
        self.mark(at, end, rest)


def find_blocks(text: str, pattern: re.Pattern[str]) -> tuple[list[Block], list[Tag], list[Tag]]:
    """Return the complete blocks, the unmatched tags outside of all blocks, and the tags inside of blocks."""
    # One pass over the tags. An opening tag only opens a block if its closing tag occurs later; otherwise everything
    # after an unclosed tag would be inside a block. The last occurrence of each closing tag is searched once and
    # remembered, so the time stays linear even for a response of nothing but opening tags.
    blocks: list[Block] = []
    strays: list[Tag] = []
    nested: list[Tag] = []
    last_close: dict[str, int] = {}
    opened: re.Match[str] | None = None
    for match in pattern.finditer(text):
        closes, tag = match.group(1) == "/", match.group(2)
        if opened is None:
            if tag not in last_close:
                last_close[tag] = text.rfind(f"</{tag}>")
            if closes or last_close[tag] < match.end():
                strays.append(Tag(match.start(), match.group()))
            else:
                opened = match
        elif closes and tag == opened.group(2):
            blocks.append(Block(tag, opened.start(), opened.end(), match.start(), match.end()))
            opened = None
        else:
            nested.append(Tag(match.start(), match.group()))
    return blocks, strays, nested


def clean_text(text: str, forbidden: Sequence[str], what: str) -> str:
    """Return the stripped text; UserError if it contains one of the format's tags."""
    for tag in forbidden:
        if tag in text:
            raise UserError(f"the {what} contains {tag!r}", "text without tags of the format", "remove it")
    return text.strip()


def unwritable_error(tool_format: str, got: str, expected: str) -> UserError:
    """Return the error for something that a format cannot represent."""
    return UserError(f"format {tool_format!r} cannot represent {got}", expected, "change it, or use another format")


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the JSON descriptions of the tools, one tool per line."""
    return "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
