"""The vocabulary of the method: regions of a response, tool calls, gold targets and parsed responses.

Spans are half-open character intervals of the text that was parsed. Everything here is a plain value; nothing
imports torch, so that a reward worker loads it in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple

from rest_rl.errors import UserError

ROW_REMEDY = "correct or leave out the row"


class Region(IntEnum):
    """What a token of a response is for; every generated token has exactly one region."""

    FORMAT = 0
    """Tags, the JSON scaffolding of a call, white space between blocks, the end-of-sequence token."""
    NAME = 1
    """The characters of a tool name, without its quotes."""
    ARGUMENTS = 2
    """The arguments object of a call, braces included."""
    REASONING = 3
    """The text inside the think tags."""
    ANSWER = 4
    """The final reply to the user."""
    OTHER = 5
    """Whatever belongs to none of these: stray text, an incomplete block, all of an unparsable response."""

    @property
    def label(self) -> str:
        """Lower-case name, the key used in metrics, configs and JSON."""
        return self.name.lower()


NUM_REGIONS = len(Region)
Turn = Literal["calls", "answers"]
TURNS: Mapping[Turn, str] = {"calls": "call turns", "answers": "answer turns"}
"""The two sorts of turns, whose scores are reported apart: the text of an answer is not compared."""


class Span(NamedTuple):
    """Half-open character interval `[start, end)` of a response that lies in one region."""

    start: int
    end: int
    region: Region


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool: its name and its arguments as decoded JSON."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Gold:
    """What a response is scored against: the calls that should be made and the answer that should be given.

    `answer` is None when the turn should end in calls alone; its text is not compared, only its presence.
    """

    calls: tuple[ToolCall, ...] = ()
    answer: str | None = None

    @property
    def turn(self) -> Turn:
        """What sort of turn this is: one with gold calls, or one that should be answered without a call."""
        return "calls" if self.calls else "answers"


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """A model response, read once; malformed text is described here and never raised.

    `spans` are sorted and disjoint; characters outside every span are OTHER. `well_formed` is True when the blocks
    of the format stand in order, each complete and no more often than the format allows; it says nothing about the
    JSON inside. `unreadable_calls` counts stretches inside call blocks that are not a call.
    """

    thought: str | None = None
    calls: tuple[ToolCall, ...] = ()
    answer: str | None = None
    spans: tuple[Span, ...] = ()
    problems: tuple[str, ...] = ()
    well_formed: bool = False
    attempted_call: bool = False
    """A call block was opened, whatever it holds."""
    unreadable_calls: int = 0
    untagged_answer: bool = False
    """The format writes its answer as plain text, so text beside calls is no violation."""
    text_values: bool = False
    """The format writes argument values as text: `12` may stand for a string or a number."""


def gold_from_json(value: Any) -> Gold:
    """Read `{"calls": [{"name": str, "arguments": object}], "answer": str | null}`; UserError says what is wrong.

    A blank answer is none: no format can tell the two apart.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"gold of type {type(value).__name__}", '{"calls": [...], "answer": ...}', ROW_REMEDY)
    unknown = set(value) - {"calls", "answer"}
    if unknown or not value:
        raise UserError(f"gold with the keys {sorted(map(str, value))}", "calls, answer", ROW_REMEDY)
    calls, answer = value.get("calls", []), value.get("answer")
    if not isinstance(calls, (list, tuple)):
        raise UserError(f"gold calls of type {type(calls).__name__}", "a list", ROW_REMEDY)
    if answer is not None and not isinstance(answer, str):
        raise UserError(f"a gold answer of type {type(answer).__name__}", "a string or null", ROW_REMEDY)
    return Gold(
        tuple(_call_from_json(call, number) for number, call in enumerate(calls, 1)), (answer or "").strip() or None
    )


def _call_from_json(call: Any, number: int) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        is_object, shape = isinstance(call, Mapping), '{"name": str, "arguments": object}'
        got = (
            f"gold call {number} with the name {call.get('name')!r:.80}"
            if is_object
            else f"{call!r:.80} as gold call {number}"
        )
        raise UserError(got, shape, ROW_REMEDY)
    arguments = call.get("arguments")
    if not isinstance(arguments, Mapping):
        got = f"arguments of type {type(arguments).__name__} in gold call {number} ({call['name']!r})"
        raise UserError(got, "an object", ROW_REMEDY)
    return ToolCall(call["name"], arguments)


def check_progress(progress: float) -> None:
    """Refuse a training progress nu outside [0, 1]."""
    if not 0 <= progress <= 1:
        raise UserError(f"progress {progress}", "a number in [0, 1]", "pass step / (total steps - 1)")
