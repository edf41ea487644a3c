"""JSONL files: one JSON object per line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from rest_rl.errors import UserError


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) for the non-blank lines of a file, or of standard input for `-`."""
    try:
        with nullcontext(sys.stdin.buffer) if path == "-" else Path(path).open("rb") as file:
            yield from enumerate_lines(file)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"cannot read {path} ({describe_os_error(error)})", remedy="check the path") from error


def enumerate_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, line


def parse_row(line: bytes) -> Mapping[str, Any]:
    """Parse a line that contains one JSON object; UserError for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not JSON ({error})", "an object", "correct the row") from error
    if not isinstance(row, Mapping):
        raise UserError(f"the line is of type {type(row).__name__}", "an object", "correct the row")
    return row


def require_text(row: Mapping[str, Any], name: str) -> str:
    """Return a field of a row; UserError unless it is a string."""
    value = row.get(name)
    if not isinstance(value, str):
        problem = f"{name!r} is of type {type(value).__name__}" if name in row else f"the row has no {name!r}"
        raise UserError(problem, "text", "correct the row" if name in row else "add it")
    return value


def response_texts(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield the string in the field `response` of each row; lines without such a string are skipped."""
    for line in lines:
        with suppress(UserError):
            if isinstance(text := parse_row(line).get("response"), str):
                yield text


def as_json(value: Any, indent: int | None = None) -> str:
    """Return JSON that every parser accepts: NaN and infinities become null, lone surrogates are escaped."""
    # Readable text is written as it is. A response can contain lone surrogates, which cannot be written as UTF-8; then
    # all characters beyond ASCII are escaped.
    text = json.dumps(replace_non_finite(value), ensure_ascii=False, indent=indent)
    return text if text.isascii() or not has_surrogates(text) else json.dumps(replace_non_finite(value), indent=indent)


def replace_non_finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot represent, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): replace_non_finite(item) for key, item in value.items()}
    return [replace_non_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def describe_os_error(error: Exception) -> str:
    """Return the text of an operating-system error, without its number."""
    return getattr(error, "strerror", None) or str(error)
