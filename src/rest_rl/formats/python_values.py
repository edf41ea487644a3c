"""Parses Python literals and keyword arguments from untrusted text, without evaluating anything.

Supports strings, numbers, `True`, `False`, `None` (and JSON's `true`, `false`, `null`), lists and dicts with string
keys. `ast.literal_eval` is no alternative: it fails on JSON's words, parses the whole text or nothing, and compiles
input that can exhaust memory. Takes linear time; rejects integers of over 400 digits and nesting deeper than 64 levels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

from rest_rl.json_spans import MAX_DEPTH, MAX_INTEGER_DIGITS, skip_space

_STRING = re.compile(
    r'"""(?P<long_double>[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*)"""'
    r"|'''(?P<long_single>[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*)'''"
    r'|"(?P<double>[^"\\\n]*(?:\\.[^"\\\n]*)*)"'
    r"|'(?P<single>[^'\\\n]*(?:\\.[^'\\\n]*)*)'",
    re.DOTALL,
)
# Python's brackets and strings, for `find_bracket_end`.
# An unclosed string matches up to the end of its line. If it did not match, the search would start again at each
# following quote and take quadratic time.
BRACKET_OR_STRING = re.compile(
    r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*(?:"""|\\?\Z)'
    r"|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*(?:'''|\\?\Z)"
    r'|"[^"\\\n]*(?:\\.[^"\\\n]*)*(?:"|(?=\n)|\\?\Z)'
    r"|'[^'\\\n]*(?:\\.[^'\\\n]*)*(?:'|(?=\n)|\\?\Z)"
    r"|[()\[\]{}]",
    re.DOTALL,
)
_NUMBER = re.compile(r"[+-]?(?:(?P<integer>\d+)(?![\d.eE])|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_WORD = re.compile(r"[^\W\d]\w*")
_KEY = re.compile(r"""[^\s=,()\[\]{}"'*:]+""")
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPED = {
    "\n": "", "\\": "\\", "'": "'", '"': '"',
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
}  # fmt: skip


class NotLiteralError(ValueError):
    """The text is not a literal; the message says what was expected, and where."""


def read_arguments(text: str, start: int) -> tuple[dict[str, Any], int]:
    """Return the keyword arguments in the parentheses that open at `start`, and the position after them.

    `**{...}` adds the entries of a dict. Positional arguments and expressions raise NotLiteralError.
    """
    # A recursive-descent parser without look-ahead: each function reads one construct at `at` and returns it with the
    # position after it. Each character is read once, and the depth is bounded before Python's own recursion limit.
    arguments: dict[str, Any] = {}
    at = skip_space(text, start + 1)
    while not text.startswith(")", at):
        if text.startswith("**", at):
            more, at = _read_value(text, skip_space(text, at + 2), 1)
            if not isinstance(more, dict):
                raise NotLiteralError(f"expected a dict after ** before character {at}")
            arguments.update(more)
        else:
            key = _KEY.match(text, at)
            equals = skip_space(text, key.end()) if key else at
            if key is None or not text.startswith("=", equals):
                raise NotLiteralError(f"expected a keyword argument at character {at}")
            arguments[key.group()], at = _read_value(text, skip_space(text, equals + 1), 1)
        at = _skip_separator(text, at, ")")
    return arguments, at + 1


def write_arguments(arguments: Mapping[str, Any]) -> str:
    """Return arguments in parentheses; keys that are not identifiers go into a `**{...}` at the end."""
    plain = {key: value for key, value in arguments.items() if key.isidentifier() and not iskeyword(key)}
    items = [f"{key}={write_value(value)}" for key, value in plain.items()]
    others = {key: value for key, value in arguments.items() if key not in plain}
    return f"({', '.join([*items, f'**{write_value(others)}'] if others else items)})"


def write_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_write_key(key)}: {write_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(write_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write_key(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"a key is of type {type(key).__name__}, expected a string")
    return json.dumps(key, ensure_ascii=False)


def _skip_separator(text: str, at: int, close: str) -> int:
    # Returns the position after the comma that follows an item, or of the closing bracket.
    at = skip_space(text, at)
    if text.startswith(",", at):
        return skip_space(text, at + 1)
    if not text.startswith(close, at):
        raise NotLiteralError(f"expected ',' or {close!r} at character {at}")
    return at


def _read_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    first = text[at : at + 1]
    if first in ("[", "{"):
        if depth > MAX_DEPTH:
            raise NotLiteralError(f"nesting deeper than {MAX_DEPTH} levels at character {at}")
        return (_read_list if first == "[" else _read_dict)(text, at, depth)
    if first in ('"', "'") and first:
        return _read_string(text, at)
    if number := _NUMBER.match(text, at):
        return _number(number), number.end()
    word = _WORD.match(text, at)
    if word is None or word.group() not in _WORDS:
        raise NotLiteralError(f"expected a literal at character {at}")
    return _WORDS[word.group()], word.end()


def _number(match: re.Match[str]) -> int | float:
    digits = match.group("integer")
    if digits is None:
        return float(match.group())
    if len(digits) > MAX_INTEGER_DIGITS or (digits[0] == "0" and digits.strip("0")):
        raise NotLiteralError(f"invalid integer at character {match.start()}")
    return int(match.group())


def _read_list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    items: list[Any] = []
    at = skip_space(text, at + 1)
    while not text.startswith("]", at):
        item, at = _read_value(text, at, depth + 1)
        items.append(item)
        at = _skip_separator(text, at, "]")
    return items, at + 1


def _read_dict(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    items: dict[str, Any] = {}
    at = skip_space(text, at + 1)
    while not text.startswith("}", at):
        key, at = _read_string(text, at)
        colon = skip_space(text, at)
        if not text.startswith(":", colon):
            raise NotLiteralError(f"expected ':' at character {colon}")
        items[key], at = _read_value(text, skip_space(text, colon + 1), depth + 1)
        at = _skip_separator(text, at, "}")
    return items, at + 1


def _read_string(text: str, at: int) -> tuple[str, int]:
    match = _STRING.match(text, at)
    if match is None or match.lastgroup is None:
        raise NotLiteralError(f"expected a string at character {at}")
    inner = match.group(match.lastgroup)
    return (_ESCAPE.sub(_unescape, inner) if "\\" in inner else inner), match.end()


def _unescape(match: re.Match[str]) -> str:
    octal, *hexadecimal, other = match.groups()
    if other is not None:
        return _ESCAPED.get(other, match.group())
    code = int(octal, 8) if octal is not None else int(next(filter(None, hexadecimal)), 16)
    if code > 0x10FFFF:
        raise NotLiteralError("invalid character code in an escape")
    return chr(code)
