"""The tool-call formats: text of a response -> ParsedResponse, and back.

Parsing is total: any string gives a ParsedResponse. A complete block is read; what lies outside complete blocks
belongs to no region (OTHER). Of a call whose JSON is broken, the name and the arguments keep their regions as far
as they can be located and the rest of that call is OTHER.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from rest_rl.json_spans import Entry, decode_at, scan_object
from rest_rl.response import ParsedResponse, Region, Span, ToolCall

MAX_PROBLEMS = 20


class ToolFormat(Protocol):
    """How a model writes its reasoning, its calls and its answer; pass your own object wherever a name is accepted."""

    @property
    def name(self) -> str:
        """How configs call the format."""
        ...

    @property
    def tags(self) -> tuple[str, ...]:
        """The literal tags; they are kept when token ids are decoded, also where a tokenizer calls them special."""
        ...

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        """Read a response; never raises. Without `spans` they are left empty, which is quicker and enough to score."""
        ...

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """Write a response that `parse` reads back; ValueError when a text contains a tag of the format."""
        ...

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A system message that describes the tools and the format, for models whose template renders no tools."""
        ...


def get_format(tool_format: str | ToolFormat) -> ToolFormat:
    """The format of that name, or the object itself; ValueError for an unknown name."""
    if not isinstance(tool_format, str):
        return tool_format
    if tool_format not in FORMATS:
        raise ValueError(
            f"unknown format {tool_format!r}; expected one of {', '.join(FORMATS)}, or a ToolFormat object"
        )
    return FORMATS[tool_format]


class _Block(NamedTuple):
    """A complete block `<tag>inner</tag>`: `[start, end)` with its tags, `[inner_start, inner_end)` without."""

    tag: str
    start: int
    inner_start: int
    inner_end: int
    end: int


_NO_SPAN = Span(-1, -1, Region.OTHER)


@dataclass(slots=True)
class _Reading:
    """What has been read so far, in text order."""

    wants_spans: bool
    spans: list[Span] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unreadable_calls: int = 0

    def mark(self, start: int, end: int, region: Region) -> None:
        """Add a span, joined to its neighbour when that has the same region; OTHER is left as a gap."""
        if start >= end or region is Region.OTHER or not self.wants_spans:
            return
        last = self.spans[-1] if self.spans else _NO_SPAN
        if last.end == start and last.region is region:
            self.spans[-1] = Span(last.start, end, region)
        else:
            self.spans.append(Span(start, end, region))

    def complain(self, problem: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def complain_of_tags(self, strays: Sequence[_Tag], nested: Sequence[_Tag]) -> None:
        for word, tags in (("unmatched", strays), ("inside a block:", nested)):
            for tag in tags[:MAX_PROBLEMS]:
                self.complain(f"{word} {tag.text} at character {tag.position}")

    def read_call(self, text: str, start: int, end: int, arguments_key: str) -> None:
        """Read the one JSON object in `text[start:end]` as a call, or count it as unreadable."""
        line = text[start:end]
        if plain := _read_plain_call(line, arguments_key):
            call, parts = plain
            self.calls.append(call)
            self._mark_call(start, end, parts, Region.FORMAT)
            return
        scan = scan_object(line)
        entries = {entry.key: entry for entry in scan.entries}  # the last of equal keys wins, as in json.loads
        name, arguments = entries.get("name"), entries.get(arguments_key)
        error = scan.error or _call_error(line, scan.end, name, arguments, arguments_key)
        if error is None and name is not None and arguments is not None:
            self.calls.append(ToolCall(name.value, arguments.value))
        else:
            self.unreadable_calls += 1
            self.complain(f"call at character {start}: {error}")
        self._mark_call(start, end, _parts(line, name, arguments), Region.OTHER if error else Region.FORMAT)

    def _mark_call(self, start: int, end: int, parts: Sequence[Span], rest: Region) -> None:
        """Mark the parts, which count from `start`, and what lies between them up to `end`."""
        at = start
        for part in parts if self.wants_spans else ():
            self.mark(at, start + part.start, rest)
            self.mark(start + part.start, start + part.end, part.region)
            at = start + part.end
        self.mark(at, end, rest)


def _read_plain_call(line: str, arguments_key: str) -> tuple[ToolCall, tuple[Span, Span]] | None:
    """The call and its name and arguments if the line is laid out as most are: name first, then arguments, no more."""
    head = _PLAIN_CALL[arguments_key].match(line)
    if head is None:
        return None
    arguments, end = decode_at(line, head.end())
    if end < 0 or line[end:].strip(" \t\n\r") != "}":
        return None
    return ToolCall(head.group(1), arguments), (
        Span(*head.span(1), Region.NAME),
        Span(head.end(), end, Region.ARGUMENTS),
    )


_PLAIN_CALL = {
    key: re.compile(
        r'\{_"name"_:_"([^"\\\x00-\x1f]*)"_,_"KEY"_:_(?=\{)'.replace("_", r"[ \t\n\r]*").replace("KEY", key)
    )
    for key in ("parameters", "arguments")
}


def _parts(line: str, name: Entry | None, arguments: Entry | None) -> list[Span]:
    """The characters of the name, without quotes, and of the arguments, as far as they were located, in text order."""
    parts: list[Span] = []
    if name is not None and line.startswith('"', name.start):
        closed = line.endswith('"', name.start + 1, name.end)
        parts.append(Span(name.start + 1, name.end - 1 if closed else name.end, Region.NAME))
    if arguments is not None:
        parts.append(Span(arguments.start, arguments.end, Region.ARGUMENTS))
    return sorted(parts)


def _call_error(line: str, end: int, name: Entry | None, arguments: Entry | None, arguments_key: str) -> str | None:
    if line[end:].strip():
        return "text after the JSON object"
    if name is None or not isinstance(name.value, str):
        return "expected a key 'name' with a string"
    if arguments is None or not isinstance(arguments.value, dict):
        return f"expected a key {arguments_key!r} with an object"
    return None


class _Tag(NamedTuple):
    """A tag that neither opens nor closes a block."""

    position: int
    text: str


def _find_blocks(text: str, pattern: re.Pattern[str]) -> tuple[list[_Block], list[_Tag], list[_Tag]]:
    """The complete blocks in order, the unmatched tags outside them, the tags inside them. Linear time."""
    blocks: list[_Block] = []
    strays: list[_Tag] = []
    nested: list[_Tag] = []
    last_close: dict[str, int] = {}
    opened: re.Match[str] | None = None
    for match in pattern.finditer(text):
        closes, tag = match.group(1) == "/", match.group(2)
        if opened is None:
            if tag not in last_close:
                last_close[tag] = text.rfind(f"</{tag}>")
            if closes or last_close[tag] < match.end():
                strays.append(_Tag(match.start(), match.group()))
            else:
                opened = match
        elif closes and tag == opened.group(2):
            blocks.append(_Block(tag, opened.start(), opened.end(), match.start(), match.end()))
            opened = None
        else:
            nested.append(_Tag(match.start(), match.group()))
    return blocks, strays, nested


def _call_lines(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The non-blank lines of `text[start:end]`, without their surrounding white space."""
    lines: list[tuple[int, int]] = []
    at = start
    for line in text[start:end].split("\n"):
        stripped = line.strip()
        if stripped:
            begin = at + line.index(stripped[0])
            lines.append((begin, begin + len(stripped)))
        at += len(line) + 1
    return lines


def _dump_call(call: ToolCall, arguments_key: str, tags: re.Pattern[str]) -> str:
    """One call as one line of JSON; the `<` of a tag is written as an escape, so that no argument can end the block."""
    try:
        line = json.dumps({"name": call.name, arguments_key: dict(call.arguments)}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the call of {call.name!r} cannot be written as JSON: {error}; use JSON values only"
        ) from None
    return tags.sub(lambda tag: "\\u003c" + tag.group()[1:], line)


def _checked(text: str, forbidden: Sequence[str], what: str) -> str:
    for tag in forbidden:
        if tag in text:
            raise ValueError(f"the {what} contains {tag!r}, which ends or opens a block of the format; remove it")
    return text.strip()


def _describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)


@dataclass(frozen=True)
class ToolRLFormat:
    """ToolRL's tags (https://github.com/qiancheng0/ToolRL): one think block, one call block, one response block.

    Each line of the call block is one JSON object keyed `name` and `parameters`. The think block is required; a
    call block and a response block follow as needed, in this order.
    """

    name: str = "toolrl"
    tags: tuple[str, ...] = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>")

    _pattern = re.compile(r"<(/?)(think|tool_call|response)>")
    _layouts = (("think",), ("think", "tool_call"), ("think", "response"), ("think", "tool_call", "response"))

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        """Read a response; never raises."""
        blocks, strays, nested = _find_blocks(text, self._pattern)
        reading = _Reading(wants_spans=spans)
        at = 0
        for block in blocks:
            self._read_gap(reading, text, at, block.start)
            reading.mark(block.start, block.inner_start, Region.FORMAT)
            self._read_block(reading, text, block)
            reading.mark(block.inner_end, block.end, Region.FORMAT)
            at = block.end
        if blocks:
            self._read_gap(reading, text, at, len(text))
        reading.complain_of_tags(strays, nested)
        layout = tuple(block.tag for block in blocks)
        if layout not in self._layouts:
            reading.complain(
                f"expected the blocks think, tool_call, response once and in order, got {list(layout)[:9]}"
            )
        inner = {block.tag: text[block.inner_start : block.inner_end].strip() for block in reversed(blocks)}
        return ParsedResponse(
            thought=inner.get("think"),
            calls=tuple(reading.calls),
            answer=inner.get("response"),
            spans=tuple(reading.spans),
            problems=tuple(reading.problems),
            well_formed=layout in self._layouts and not strays and not nested,
            attempted_call="tool_call" in inner or any(tag.text == "<tool_call>" for tag in strays),
            unreadable_calls=reading.unreadable_calls,
        )

    @staticmethod
    def _read_gap(reading: _Reading, text: str, start: int, end: int) -> None:
        if text[start:end].isspace():
            reading.mark(start, end, Region.FORMAT)
        elif start < end:
            reading.complain(f"text outside the blocks at character {start}")

    @staticmethod
    def _read_block(reading: _Reading, text: str, block: _Block) -> None:
        if block.tag != "tool_call":
            region = Region.REASONING if block.tag == "think" else Region.ANSWER
            reading.mark(block.inner_start, block.inner_end, region)
            return
        at = block.inner_start
        for start, end in _call_lines(text, block.inner_start, block.inner_end):
            reading.mark(at, start, Region.FORMAT)
            reading.read_call(text, start, end, "parameters")
            at = end
        reading.mark(at, block.inner_end, Region.FORMAT)

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """A missing thought is written as an empty think block, because the format requires one."""
        parts = [f"<think> {_checked(thought or '', self.tags, 'thought')} </think>"]
        if calls:
            parts.append(
                "\n".join(
                    ["<tool_call>", *(_dump_call(call, "parameters", self._pattern) for call in calls), "</tool_call>"]
                )
            )
        if answer is not None:
            parts.append(f"<response> {_checked(answer, self.tags, 'answer')} </response>")
        return "\n".join(parts)

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A system message that describes the tools and the format."""
        return (
            "You can call these tools, one JSON description per line:\n"
            f"{_describe_tools(tools)}\n\n"
            "First reason inside <think> </think>. To call tools, add one block with one JSON object per line:\n"
            '<tool_call>\n{"name": "tool name", "parameters": {"argument": "value"}}\n</tool_call>\n'
            "To answer the user, add <response> your answer </response> after it."
        )


@dataclass(frozen=True)
class HermesFormat:
    """Hermes / Qwen: each call is one JSON object keyed `name` and `arguments` in a block of its own.

    The answer is plain text; a think block is optional and comes first. Text beside calls is allowed.
    """

    name: str = "hermes"
    tags: tuple[str, ...] = ("<think>", "</think>", "<tool_call>", "</tool_call>")

    _pattern = re.compile(r"<(/?)(think|tool_call)>")

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        """Read a response; never raises."""
        blocks, strays, nested = _find_blocks(text, self._pattern)
        first_stray = strays[0].position if strays else len(text)
        reading = _Reading(wants_spans=spans)
        answers: list[str] = []
        at = 0
        for block in [*blocks, _Block("end", len(text), len(text), len(text), len(text))]:
            answers.append(self._read_gap(reading, text, at, block.start, first_stray))
            reading.mark(block.start, block.inner_start, Region.FORMAT)
            self._read_block(reading, text, block)
            reading.mark(block.inner_end, block.end, Region.FORMAT)
            at = block.end
        reading.complain_of_tags(strays, nested)
        thoughts = [block for block in blocks if block.tag == "think"]
        in_order = not thoughts or (len(thoughts) == 1 and not text[: thoughts[0].start].strip())
        if not in_order:
            reading.complain("expected at most one think block, at the start")
        return ParsedResponse(
            thought=text[thoughts[0].inner_start : thoughts[0].inner_end].strip() if thoughts else None,
            calls=tuple(reading.calls),
            answer="\n".join(filter(None, answers)) or None,
            spans=tuple(reading.spans),
            problems=tuple(reading.problems),
            well_formed=in_order and not strays and not nested,
            attempted_call=len(blocks) > len(thoughts) or any(tag.text == "<tool_call>" for tag in strays),
            unreadable_calls=reading.unreadable_calls,
            untagged_answer=True,
        )

    @staticmethod
    def _read_gap(reading: _Reading, text: str, start: int, end: int, first_stray: int) -> str:
        """Mark the text between blocks up to the first unmatched tag as the answer, its outer white space as format."""
        gap = text[start : min(end, first_stray)]
        answer = gap.strip()
        begin = start + len(gap) - len(gap.lstrip())
        reading.mark(start, begin, Region.FORMAT)
        reading.mark(begin, begin + len(answer), Region.ANSWER)
        reading.mark(begin + len(answer), start + len(gap), Region.FORMAT)
        return answer

    @staticmethod
    def _read_block(reading: _Reading, text: str, block: _Block) -> None:
        inner = text[block.inner_start : block.inner_end]
        if block.tag == "think":
            reading.mark(block.inner_start, block.inner_end, Region.REASONING)
        elif block.tag == "tool_call":
            start = block.inner_start + len(inner) - len(inner.lstrip())
            end = start + len(inner.strip())
            reading.mark(block.inner_start, start, Region.FORMAT)
            reading.read_call(text, start, end, "arguments")
            reading.mark(end, block.inner_end, Region.FORMAT)

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """Thought, then answer, then calls, each where there is one; an empty answer counts as none."""
        head = "" if thought is None else f"<think>\n{_checked(thought, self.tags, 'thought')}\n</think>\n\n"
        blocks = [f"<tool_call>\n{_dump_call(call, 'arguments', self._pattern)}\n</tool_call>" for call in calls]
        text = [] if not answer else [_checked(answer, self.tags, "answer")]
        return head + "\n".join(text + blocks)

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A system message that describes the tools and the format."""
        return (
            f"You can call these tools:\n<tools>\n{_describe_tools(tools)}\n</tools>\n\n"
            "For each call write one JSON object in a block of its own:\n"
            '<tool_call>\n{"name": "tool name", "arguments": {"argument": "value"}}\n</tool_call>\n'
            "Otherwise answer in plain text."
        )


FORMATS: dict[str, ToolFormat] = {"toolrl": ToolRLFormat(), "hermes": HermesFormat()}
"""The built-in formats by name; a table, not a registry."""
