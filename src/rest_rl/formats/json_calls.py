"""Calls written as JSON objects with a name and an arguments object."""

from __future__ import annotations

import json
import re

from rest_rl.formats.reading import Reading
from rest_rl.json_spans import Entry, decode_at, scan_object
from rest_rl.response import Region, Span, ToolCall


def read_call(reading: Reading, text: str, start: int, end: int, arguments_key: str) -> None:
    """Read the one JSON object in `text[start:end]` as a call, or count it as unreadable."""
    line = text[start:end]
    if plain := _read_plain_call(line, arguments_key):
        call, parts = plain
        reading.calls.append(call)
        reading.mark_parts(start, end, parts, Region.FORMAT)
        return
    scan = scan_object(line)
    entries = {entry.key: entry for entry in scan.entries}  # the last of equal keys wins, as in json.loads
    name, arguments = entries.get("name"), entries.get(arguments_key)
    error = scan.error or _call_error(line, scan.end, name, arguments, arguments_key)
    if error is None and name is not None and arguments is not None:
        reading.calls.append(ToolCall(name.value, arguments.value))
    else:
        reading.unreadable_calls += 1
        reading.complain(f"call at character {start}: {error}")
    reading.mark_parts(start, end, _parts(line, name, arguments), Region.OTHER if error else Region.FORMAT)


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


def call_lines(text: str, start: int, end: int) -> list[tuple[int, int]]:
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


def dump_call(call: ToolCall, arguments_key: str, tags: re.Pattern[str]) -> str:
    """One call as one line of JSON; the `<` of a tag is written as an escape, so that no argument can end the block."""
    try:
        line = json.dumps({"name": call.name, arguments_key: dict(call.arguments)}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the call of {call.name!r} cannot be written as JSON: {error}; use JSON values only"
        ) from None
    return tags.sub(lambda tag: "\\u003c" + tag.group()[1:], line)
