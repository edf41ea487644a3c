"""Detects the format of responses by parsing them with every format, and calls that are written as JSON text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from rest_rl.formats import FORMATS, OpenedThinkFormat, ToolFormat, get_format
from rest_rl.formats.opened_think import OPENING_TAGS
from rest_rl.json_spans import decode_at

AUTO = "auto"
# Only the first responses are parsed, at most this many.
MAX_RESPONSES = 200
# Only the first characters of each response are parsed, at most this many.
MAX_CHARACTERS = 10_000
# What may precede the object of a call in JSON: the language of a code fence, and the bracket of a list.
_BEFORE_CALL = re.compile(r"(?:\w+\s*)?(?:\[\s*)?(?=\{)")


class FormatReading(NamedTuple):
    """How many responses a format can parse. Formats are compared field by field, in this order."""

    calls: int
    """Responses with calls, all of which are readable."""
    attempts: int
    """Responses that open a call block."""
    well_formed: int


def choose_format(name: str, texts: Iterable[str]) -> tuple[str, str]:
    """Return (format, reason) for recorded responses whose model is not available.

    `auto` selects the format that can parse the calls of the most responses. Ties are broken by the number of attempted
    calls, then of well-formed responses, then by the order of FORMATS, with `+think` variants last. Any other name is
    returned unchanged; the reason then mentions a format that parses the calls of more than twice as many.
    """
    looked_at = [text[:MAX_CHARACTERS] for text in islice(texts, MAX_RESPONSES)]
    readings = {found.name: measure_format(found, looked_at) for found in candidate_formats()}
    best = max(readings, key=lambda other: readings[other])  # max returns the first of equal readings
    reads = f"parses the calls of {readings[best].calls} of {len(looked_at)} responses"
    if name == AUTO:
        return best, reads if looked_at else "the default, because there are no responses"
    own = readings.get(name) or measure_format(get_format(name), looked_at)
    if readings[best].calls <= 2 * own.calls:
        return name, "as specified"
    return name, f"as specified, but {best} {reads}, {name} only those of {own.calls}; try --format {best}"


def candidate_formats() -> list[ToolFormat]:
    # Built-in formats first, so that a tie does not select a `+think` variant.
    thinking = (found for found in FORMATS.values() if not set(OPENING_TAGS).isdisjoint(found.tags))
    return [*FORMATS.values(), *map(OpenedThinkFormat, thinking)]


def measure_format(tool_format: ToolFormat, texts: Sequence[str]) -> FormatReading:
    parsed = [tool_format.parse(text, spans=False) for text in texts]
    is_read = [each.attempted_call and bool(each.calls) and not each.unreadable_calls for each in parsed]
    return FormatReading(
        sum(is_read),
        sum(each.attempted_call for each in parsed),
        sum(each.well_formed and not each.problems for each in parsed),
    )


def is_json_call(text: str) -> bool:
    """Return whether a text is a call as JSON (`name` and `arguments` or `parameters`), or has one in a code fence."""
    parts = text.split("```")
    for part in map(str.strip, parts[1::2] or parts):
        if before := _BEFORE_CALL.match(part):
            value, _ = decode_at(part, before.end())
            is_named = isinstance(value, dict) and isinstance(value.get("name"), str)
            if is_named and any(isinstance(value.get(key), dict) for key in ("arguments", "parameters")):
                return True
    return False
