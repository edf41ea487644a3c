"""JSON and Python literals out of a data file, with a bound on their nesting."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from typing import Any

from rest_rl.json_spans import MAX_DEPTH


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
