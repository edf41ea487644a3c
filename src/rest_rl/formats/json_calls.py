"""Calls as JSON objects with a name and an arguments object."""

from __future__ import annotations

import json
import re

from rest_rl.errors import UserError
from rest_rl.formats.reading import ResponseBuilder
from rest_rl.json_spans import Entry, decode_at, find_bracket_end, scan_object, skip_space
from rest_rl.response import Region, Span, ToolCall


def read_call_object(builder: ResponseBuilder, text: str, start: int, arguments_key: str) -> int:
    """Read the JSON object at `text[start]` as a call and return the position after it, or -1 if it is cut off.

    A broken object counts as an unreadable call. It ends where its brackets close, or at the end of the text.
    """
    # Fast path first: a call in the usual form is matched by one regular expression, which is several times faster than
    # the general scan. After the first unreadable call we search for the closing bracket before decoding: the position
    # of a JSON error is reported as line and column, which takes time linear in the text before it.
    end = -1
    if not builder.unreadable_calls:
        if plain := _match_plain_call(text, start, arguments_key):
            end, call, parts = plain
            builder.calls.append(call)
            builder.mark_parts(start, end, parts, Region.FORMAT)
            return end
        end = decode_at(text, start)[1]
    if end < 0:
        end = find_bracket_end(text, start)
    read_call(builder, text, start, len(text) if end < 0 else end, arguments_key)
    return end


def read_call(builder: ResponseBuilder, text: str, start: int, end: int, arguments_key: str) -> None:
    """Read the JSON object in `text[start:end]` as a call, or count it as unreadable."""
    line = text[start:end]
    plain = _match_plain_call(line, 0, arguments_key)
    if plain and not line[plain[0] :].strip():
        _, call, (name, arguments) = plain
        builder.calls.append(call)
        builder.mark_parts(start, end, (_shift(name, start), _shift(arguments, start)), Region.FORMAT)
    else:
        _read_any_call(builder, text, start, end, arguments_key)


def _read_any_call(builder: ResponseBuilder, text: str, start: int, end: int, arguments_key: str) -> None:
    line = text[start:end]
    scan = scan_object(line)
    entries = {entry.key: entry for entry in scan.entries}  # the last of equal keys wins, as in json.loads
    name, arguments = entries.get("name"), entries.get(arguments_key)
    error = scan.error or _call_error(line, scan.end, name, arguments, arguments_key)
    if error is None and name is not None and arguments is not None:
        builder.calls.append(ToolCall(name.value, arguments.value))
    else:
        builder.add_unreadable_call(start, error or "not a call")
    parts = [_shift(part, start) for part in _parts(line, name, arguments)]
    builder.mark_parts(start, end, parts, Region.OTHER if error else Region.FORMAT)


def _shift(span: Span, by: int) -> Span:
    return Span(span.start + by, span.end + by, span.region)


def _match_plain_call(text: str, start: int, arguments_key: str) -> tuple[int, ToolCall, tuple[Span, Span]] | None:
    # A call in the usual form, the name and then the arguments and no other key: (end, call, spans of the two parts).
    # Names with escapes do not match, so that the characters of the name are those of the text.
    head = _PLAIN_CALL_PATTERNS[arguments_key].match(text, start)
    if head is None:
        return None
    arguments, end = decode_at(text, head.end())
    close = skip_space(text, end) if end >= 0 else len(text)
    if not text.startswith("}", close):
        return None
    parts = Span(*head.span(1), Region.NAME), Span(head.end(), end, Region.ARGUMENTS)
    return close + 1, ToolCall(head.group(1), arguments), parts


_PLAIN_CALL_PATTERNS = {
    key: re.compile(
        r'\{_"name"_:_"([^"\\\x00-\x1f]*)"_,_"KEY"_:_(?=\{)'.replace("_", r"[ \t\n\r]*").replace("KEY", key)
    )
    for key in ("parameters", "arguments")
}


def _parts(line: str, name: Entry | None, arguments: Entry | None) -> list[Span]:
    # The characters of the name, without quotes, and of the arguments, if they were found, in the order of the text.
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


def split_call_lines(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Return (start, end) of the non-blank lines of `text[start:end]`, stripped."""
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
    """Return a call as one line of JSON; tags in arguments are escaped, so that they cannot end the block."""
    return escape_tags(dump_json(call, {"name": call.name, arguments_key: dict(call.arguments)}), tags)


def dump_json(call: ToolCall, value: object) -> str:
    """Return a part of a call as JSON; UserError, with the name of the call, if JSON cannot represent it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the call of {call.name!r} is not JSON ({error})", remedy="use JSON values") from None


def escape_tags(line: str, tags: re.Pattern[str]) -> str:
    r"""Escape the first character of every tag in a line of JSON as `\uXXXX`; the parsed strings stay the same."""
    return tags.sub(lambda tag: f"\\u{ord(tag.group()[0]):04x}" + tag.group()[1:], line)
