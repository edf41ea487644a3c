"""Character positions of the keys and values of a JSON object, which may be broken.

Model responses are untrusted input. No function raises, all scans take linear time, and decoding is stricter than
`json.loads`: it rejects `NaN` and `Infinity`, integers of over 400 digits and nesting deeper than 64 levels.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, NoReturn

MAX_INTEGER_DIGITS = 400
MAX_DEPTH = 64

_SPACE = re.compile(r"[ \t\n\r]*")
# An unclosed string matches up to the end of the text. If it did not match, the search would start again at each
# following quote and take quadratic time.
_BRACKET_OR_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)
_DEPTHS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


class Entry(NamedTuple):
    """A `key: value` pair of an object; the value is `text[start:end]`."""

    key: str
    value: Any
    start: int
    end: int


class ObjectScan(NamedTuple):
    """The entries of an object in order, the position after it, and the first error (None for valid JSON).

    If the error is in a value, the last entry describes this value: `value` is None, and `end` is where the value's
    brackets close, or the end of the text.
    """

    entries: tuple[Entry, ...]
    end: int
    error: str | None


def scan_object(text: str, start: int = 0) -> ObjectScan:
    """Scan the object that opens at `text[start]`.

    Example: `scan_object('{"a": [1]}').entries == (Entry("a", [1], 6, 9),)`.
    """
    # A small state machine over the top level only: key, colon, value, comma. The standard library's C scanner reads
    # each key and value and returns where it ended, so nested values cost no Python loop and every character is read
    # once. Entries found before an error are kept: a broken call may still have a name that can be tagged.
    entries: list[Entry] = []
    if not text.startswith("{", start):
        return ObjectScan((), start, "expected '{'")
    at = skip_space(text, start + 1)
    if text.startswith("}", at):
        return ObjectScan((), at + 1, None)
    while True:
        if not text.startswith('"', at):
            return ObjectScan(tuple(entries), at, "expected a key in double quotes")
        key, colon = decode_at(text, at)
        if colon < 0:
            return ObjectScan(tuple(entries), at, "a key that is not a JSON string")
        colon = skip_space(text, colon)
        if not text.startswith(":", colon):
            return ObjectScan(tuple(entries), colon, "expected ':' after a key")
        value_start = skip_space(text, colon + 1)
        value, end = decode_at(text, value_start)
        if end < 0:
            closed = find_bracket_end(text, value_start)
            entries.append(Entry(key, None, value_start, len(text) if closed < 0 else closed))
            return ObjectScan(tuple(entries), value_start, f"the value of {_shorten(key)} is not JSON")
        entries.append(Entry(key, value, value_start, end))
        at = skip_space(text, end)
        if text.startswith("}", at):
            return ObjectScan(tuple(entries), at + 1, None)
        if not text.startswith(",", at):
            return ObjectScan(tuple(entries), at, "expected ',' or '}' after a value")
        at = skip_space(text, at + 1)


def decode_at(text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value at `text[at]` and the position after it, or (None, -1) if there is no valid value."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, -1
    return (None, -1) if _is_too_deep(text, at, end) else (value, end)


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError("integer too long")
    return int(digits)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_bounded_int)


def _is_too_deep(text: str, start: int, end: int) -> bool:
    # Counting brackets is fast and settles nearly every value; the exact depth is only needed above the limit.
    if text.count("{", start, end) + text.count("[", start, end) <= MAX_DEPTH:
        return False
    depth = 0
    for match in _BRACKET_OR_STRING.finditer(text, start, end):
        depth += _DEPTHS.get(match.group(), 0)
        if depth > MAX_DEPTH:
            return True
    return False


def find_bracket_end(text: str, start: int, pattern: re.Pattern[str] = _BRACKET_OR_STRING) -> int:
    """Return the position after the bracket that closes the bracket at `start`, or -1 if it is not closed."""
    # `pattern` matches brackets and whole strings, so that brackets in strings do not count.
    # Bracket types are not compared: `[}` counts as closed. The text is known to be broken, and the position only
    # has to be plausible.
    opening = pattern.match(text, start)
    if opening is None or _DEPTHS.get(opening.group()) != 1:
        return -1
    depth = 0
    for match in pattern.finditer(text, start):
        depth += _DEPTHS.get(match.group(), 0)
        if depth <= 0:
            return match.end()
    return -1


def parse_bare_value(text: str) -> Any:
    """Parse unquoted text as a JSON value, or return the text itself if it is not JSON or is a JSON string.

    `True`, `False` and `None` count as values, too. Surrounding white space is ignored.
    Example: `parse_bare_value(" 12") == 12` and `parse_bare_value("012") == "012"`.
    """
    stripped = text.strip(" \t\n\r")
    if stripped in _PYTHON_WORDS:
        return _PYTHON_WORDS[stripped]
    if stripped.startswith('"'):
        return text
    value, end = decode_at(stripped, 0)
    return value if end == len(stripped) else text


_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def skip_space(text: str, at: int) -> int:
    """Return the position of the first character at or after `at` that is not JSON white space."""
    match = _SPACE.match(text, at)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _shorten(key: str) -> str:
    return json.dumps(key if len(key) <= 40 else key[:40] + "...")
