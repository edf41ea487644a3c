"""JSONL as the command reads and writes it: one object per line, numbered when read, fit for all when written."""

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
    """The numbered non-blank lines of a file or of standard input."""
    try:
        with nullcontext(sys.stdin.buffer) if path == "-" else Path(path).open("rb") as file:
            yield from enumerate_lines(file)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"{path} ({describe_os_error(error)})", "a readable JSONL file", "check the path") from error


def enumerate_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The non-blank lines of an open file, counted from 1."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, line


def parse_row(line: bytes) -> Mapping[str, Any]:
    """One JSON object; ValueError if the line is something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"a line that is not JSON ({error})", "an object", "correct the row") from error
    if not isinstance(row, Mapping):
        raise UserError(f"{type(row).__name__}", "an object per line", "correct the row")
    return row


def require_text(row: Mapping[str, Any], name: str) -> str:
    """A field of a row that must be text."""
    value = row.get(name)
    if not isinstance(value, str):
        got = f"{name} of type {type(value).__name__}" if name in row else f"a row without {name!r}"
        raise UserError(got, f"text as {name!r}", "correct the row" if name in row else "add it")
    return value


def response_texts(lines: Iterable[bytes]) -> Iterator[str]:
    """The `response` of each row that has one in text."""
    for line in lines:
        with suppress(UserError):
            if isinstance(text := parse_row(line).get("response"), str):
                yield text


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: NaN and infinities become null, lone surrogates are escaped."""
    text = json.dumps(replace_non_finite(value), ensure_ascii=False, indent=indent)
    return text if text.isascii() or not has_surrogates(text) else json.dumps(replace_non_finite(value), indent=indent)


def replace_non_finite(value: Any) -> Any:
    """`value` with every float that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): replace_non_finite(item) for key, item in value.items()}
    return [replace_non_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def has_surrogates(text: str) -> bool:
    """Whether a text cannot be encoded as UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def describe_os_error(error: Exception) -> str:
    """Why an operation of the system failed, without its number."""
    return getattr(error, "strerror", None) or str(error)
