"""The tool-call format of Qwen3-Coder, Qwen3.5 and later, and Nemotron 3: calls in tags, values as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from rest_rl.formats.json_calls import dump_json
from rest_rl.formats.plain_answer import PlainResponseBuilder, render_plain
from rest_rl.formats.reading import describe_tools, unwritable_error
from rest_rl.json_spans import decode_at, parse_bare_value
from rest_rl.response import ParsedResponse, Region, Span, ToolCall

_PATTERN = re.compile(r"</?(?:tool_call|think|function|parameter)>|<(?:function|parameter)=[^<>\n]*>")
_KINDS = {"<tool_call>": "T", "</tool_call>": "t", "</function>": "f", "</parameter>": "p"}
_CALL = re.compile("F(?:Pp)*f")
_BLOCK = re.compile("TF(?:Pp)*ft")
# Valid names of tools and arguments.
_NAME = re.compile(r"[^\s<>](?:[^<>\n]*[^\s<>])?")


class _Mark(NamedTuple):
    # A tag. Kinds: T and t open and close a call block, F and f a function, P and p a parameter; x is any other tag.
    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Qwen3CoderFormat:
    r"""Qwen3-Coder: each call is a `<tool_call>` block with a `<function=NAME>` and a `<parameter=KEY>` per argument.

    Values are text, without the line breaks next to their tags. Text that spells a JSON value other than a string (or
    `True`, `False`, `None`) is that value. A string is quoted as in JSON only if it would otherwise be parsed as
    another value, such as `"5"`, or if it contains a tag, whose `<` becomes `\u003c`. A function without `<tool_call>`
    is read as a call, but the response is then not well formed.

    With `quotes_strings=False`, only strings with tags are quoted, as in the models' chat templates. The tool's schema
    must then determine whether `5` is a string.
    """

    name: str = "qwen3_coder"
    quotes_strings: bool = True
    tags: tuple[str, ...] = (
        *("<think>", "</think>", "<tool_call>", "</tool_call>"),
        *("<function=", "</function>", "<parameter=", "</parameter>"),
    )

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        # The tags are found with one regular expression and reduced to a string with a letter per tag. Whether a call
        # is complete is then a match against that string, such as "F(?:Pp)*f", instead of a parser with a state.
        builder = PlainResponseBuilder(wants_spans=spans, tags=_PATTERN)
        at = builder.read_thought(text)
        marks = [_Mark(_kind(tag.group()), *tag.span()) for tag in _PATTERN.finditer(text, at)]
        for first, last, end in _find_call_blocks(marks, len(text)):
            start = marks[first].start
            builder.read_text(text, at, start)
            builder.attempted_call = True
            _read_call_block(builder, text, marks[first:last], end)
            at = end
        builder.read_text(text, at, len(text))
        return builder.response(text_values=True)

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        written = "\n".join(map(self._write_call, calls))
        if self.quotes_strings:
            return render_plain(self, thought, calls, answer, written)
        exact = replace(self, quotes_strings=True)  # this variant checks that the response parses
        quoted = "\n".join(map(exact._write_call, calls))  # noqa: SLF001 - an object of the same class
        return exact.render(thought, calls, answer).removesuffix(quoted) + written

    def _write_call(self, call: ToolCall) -> str:
        dump_json(call, dict(call.arguments))  # raises for values that are not JSON
        for name in (call.name, *call.arguments):
            if not _NAME.fullmatch(name):
                expected = "names without `<`, `>`, line breaks or surrounding spaces"
                raise unwritable_error(self.name, f"name {name!r} in the call of {call.name!r}", expected)
        parameters = "".join(
            f"<parameter={key}>\n{self._write_value(call, value)}\n</parameter>\n"
            for key, value in call.arguments.items()
        )
        return f"<tool_call>\n<function={call.name}>\n{parameters}</function>\n</tool_call>"

    def _write_value(self, call: ToolCall, value: Any) -> str:
        # As in the chat templates: strings as they are, True, False and None as in Python, everything else as JSON.
        if value is None or isinstance(value, bool):
            return str(value)
        must_quote = _needs_quotes if self.quotes_strings else _PATTERN.search
        if isinstance(value, str) and not must_quote(value):
            return value
        line = dump_json(call, value)
        # We escape every `<`, because removing only the tags could form a new tag from the text around them.
        return line.replace("<", "\\u003c") if _PATTERN.search(line) else line

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return (
            f"You can call these functions:\n<tools>\n{describe_tools(tools)}\n</tools>\n\n"
            "Write each call in a block of its own, strings as they are and other values as JSON:\n"
            "<tool_call>\n<function=function_name>\n<parameter=argument>\nvalue\n</parameter>\n</function>\n</tool_call>\n"
            "Otherwise answer in plain text."
        )


def _kind(tag: str) -> str:
    if tag.startswith(("<function=", "<parameter=")):
        return "F" if tag[1] == "f" else "P"
    return _KINDS.get(tag, "x")


def _find_call_blocks(marks: Sequence[_Mark], length: int) -> list[tuple[int, int, int]]:
    # (first tag, tag after the last, end in the text) of each call block, or of a function outside of blocks. Without a
    # closing tag a block ends at the next block or at the end of the text.
    found: list[tuple[int, int, int]] = []
    at = 0
    while at < len(marks):
        if marks[at].kind not in "TF":
            at += 1
            continue
        stops = "tT" if marks[at].kind == "T" else "fFtT"
        last = next((n for n in range(at + 1, len(marks)) if marks[n].kind in stops), len(marks))
        end = marks[last].start if last < len(marks) else length
        if last < len(marks) and marks[last].kind == stops[0]:
            end = marks[last].end
            last += 1
        found.append((at, last, end))
        at = last
    return found


def _read_call_block(builder: PlainResponseBuilder, text: str, marks: Sequence[_Mark], end: int) -> None:
    kinds = "".join(mark.kind for mark in marks)
    start, complete = marks[0].start, _BLOCK.fullmatch(kinds) is not None
    if not complete:
        wrong = "no <tool_call>" if kinds[0] == "F" else "expected one complete function in the block"
        builder.add_violation(f"{wrong} at character {start}")
    scaffold = Region.FORMAT if complete or _CALL.fullmatch(kinds) else Region.OTHER
    functions = [n for n, kind in enumerate(kinds) if kind == "F"]
    if not functions:
        builder.add_unreadable_call(start, "expected <function=name>")
        return
    at = start
    for n, following in zip(functions, [*functions[1:], len(marks)], strict=True):
        _mark_around_functions(builder, text, at, marks[n].start, scaffold)
        closed = kinds.find("f", n, following)
        last = closed + 1 if closed >= 0 else following - (kinds[following - 1] == "t")
        at = marks[closed].end if closed >= 0 else marks[last].start if last < len(marks) else end
        _read_function(builder, text, marks[n:last], at)
    _mark_around_functions(builder, text, at, end, scaffold)


def _mark_around_functions(builder: PlainResponseBuilder, text: str, start: int, end: int, region: Region) -> None:
    # The part of a block before or after its function; text other than tags is a violation.
    if _PATTERN.sub("", text[start:end]).strip():
        builder.add_violation(f"text inside a block at character {start}")
        region = Region.OTHER
    builder.mark(start, end, region)


def _read_function(builder: PlainResponseBuilder, text: str, marks: Sequence[_Mark], end: int) -> None:
    # Reads a function that ends at `end` as a call, or counts it as unreadable. The region ARGUMENTS extends from the
    # first parameter's opening tag to the last one's closing tag, even if the call is broken.
    head, inner = marks[0], marks[1:]
    name = Span(*_trim(text, head.start + len("<function="), head.end - 1), Region.NAME)
    error = _function_error(text, marks)
    if error is None and name.start < name.end:
        pairs = list(zip(inner[:-1:2], inner[1:-1:2], strict=True))
        arguments = {_key(text, opened): _read_value(text[opened.end : closed.start]) for opened, closed in pairs}
        builder.calls.append(ToolCall(text[name.start : name.end], arguments))
    else:
        builder.add_unreadable_call(head.start, error or "no name")
    parts = [name] * (name.start < name.end)
    opened = [mark.start for mark in inner if mark.kind == "P"]
    if opened:
        closed = [mark.end for mark in inner if mark.kind == "p" and mark.start > opened[-1]]
        whole = inner[-1].start if inner[-1].kind == "f" else end
        parts.append(Span(opened[0], closed[-1] if closed else whole, Region.ARGUMENTS))
    builder.mark_parts(head.start, end, parts, Region.OTHER if error else Region.FORMAT)


def _function_error(text: str, marks: Sequence[_Mark]) -> str | None:
    if not _CALL.fullmatch("".join(mark.kind for mark in marks)):
        return "expected <parameter=...>, </parameter> in turn and </function> at the end"
    for left, right in pairwise(marks):
        if left.kind != "P" and text[left.end : right.start].strip():
            return f"text between the parameters at character {left.end}"
    return None


def _key(text: str, mark: _Mark) -> str:
    start, end = _trim(text, mark.start + len("<parameter="), mark.end - 1)
    return text[start:end]


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    inner = text[start:end]
    return start + len(inner) - len(inner.lstrip()), start + len(inner.rstrip()) if inner.strip() else start


def _read_value(raw: str) -> Any:
    return _parse_value_text(raw.removeprefix("\n").removesuffix("\n"))


def _parse_value_text(text: str) -> Any:
    # Inverse of `_write_value`. Quotes around a string are only removed if the string needs them, so that a model can
    # write a text in quotes. The two functions call each other; each round removes a pair of quotes, so this ends.
    value = parse_bare_value(text)
    stripped = text.strip(" \t\n\r")
    if stripped.startswith('"'):
        string, end = decode_at(stripped, 0)
        if end == len(stripped) and _needs_quotes(string):
            return string
    return value


def _needs_quotes(string: str) -> bool:
    return _PATTERN.search(string) is not None or _parse_value_text(string) != string
