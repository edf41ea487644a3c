"""Which format some responses are written in, told by what each format reads of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from rest_rl.formats import FORMATS, OpenedThinkFormat, ToolFormat, get_format
from rest_rl.formats.opened_think import OPENING_TAGS

AUTO = "auto"
MAX_RESPONSES = 200
"""Responses that are looked at, the first ones."""
MAX_CHARACTERS = 10_000
"""Characters of each that are looked at."""


class FormatReading(NamedTuple):
    """What a format reads of some responses, in the order in which formats are compared."""

    calls: int
    """Responses of whose calls all are read."""
    attempts: int
    """Responses that open a call."""
    well_formed: int


def choose_format(name: str, texts: Iterable[str]) -> tuple[str, str]:
    """(format, why) for responses of a model that is not at hand; `auto` is the format that reads the most of them.

    That is the one that reads the calls of most responses, on a tie the one that finds more attempts at a call, then
    more responses well-formed, then the first of FORMATS, without `+think` before with it. A format that is named is
    kept; `why` names another one that reads the calls of more than twice as many.
    """
    looked_at = [text[:MAX_CHARACTERS] for text in islice(texts, MAX_RESPONSES)]
    readings = {found.name: measure_format(found, looked_at) for found in candidate_formats()}
    best = max(readings, key=lambda other: readings[other])  # the first of equal ones
    reads = f"it reads the calls of {readings[best].calls} of {len(looked_at)} responses"
    if name == AUTO:
        return best, reads
    own = readings.get(name) or measure_format(get_format(name), looked_at)
    if readings[best].calls <= 2 * own.calls:
        return name, "as set"
    return name, f"as set, but {best} reads more ({reads}, {name} of {own.calls}); try --format {best}"


def candidate_formats() -> list[ToolFormat]:
    """The built-in formats, then those for prompts that open the think block."""
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
