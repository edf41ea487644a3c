"""JSON and Python literals out of a data file, with a bound on their nesting."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from rest_rl.json_spans import MAX_DEPTH, decode_at

_BETWEEN = re.compile(r"[\s;,]*")


def load_json(text: str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """`json.loads`; ValueError also for what is nested deeper than a response may be (and than recursion bears)."""
    try:
        value = json.loads(text, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


def read_literal(text: str) -> Any:
    """JSON, or else a Python literal (never executed); None for neither."""
    try:
        return load_json(text)
    except ValueError:
        pass
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    try:
        return load_json(json.dumps(value))  # tuples become lists, and sets, bytes and the like are no JSON
    except (ValueError, TypeError, RecursionError):
        return None


def read_literals(text: str) -> list[Any] | None:
    """All values of a text: one literal, JSON values in a row, or a literal per line; None for anything else."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    if (value := read_literal(text)) is not None:
        return [value]
    values: list[Any] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        value, at = decode_at(text, _end_of(_BETWEEN, text, at))
        if at < 0:
            break
        values.append(value)
    if at >= end:
        return values
    values = []
    for line in filter(str.strip, text.split("\n")):
        if (value := read_literal(line)) is None:
            return None
        values.append(value)
    return values


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
