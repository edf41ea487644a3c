"""The data types of the method: regions, spans, tool calls, gold turns and parsed responses.

Nothing here imports torch, so a reward worker loads it in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple

from rest_rl.errors import UserError

ROW_REMEDY = "correct or remove the row"


class Region(IntEnum):
    """The role of a token in a response; every generated token has exactly one region."""

    FORMAT = 0
    """Tags, JSON syntax around a call's name and arguments, white space between blocks, the end-of-sequence token."""
    NAME = 1
    """A tool name, without quotes."""
    ARGUMENTS = 2
    """The arguments object of a call, including its braces."""
    REASONING = 3
    """The text between the think tags."""
    ANSWER = 4
    """The answer to the user."""
    OTHER = 5
    """Everything else: text outside blocks, incomplete blocks, responses that cannot be parsed."""

    @property
    def label(self) -> str:
        """The lower-case name, which is the key in metrics, run files and JSON."""
        return self.name.lower()


NUM_REGIONS = len(Region)
Turn = Literal["calls", "answers"]
# Kinds of turns and their labels. Their scores are reported separately, because answers are not compared with gold.
TURNS: Mapping[Turn, str] = {"calls": "call turns", "answers": "answer turns"}


class Span(NamedTuple):
    """The characters `[start, end)` of a response, which belong to one region."""

    start: int
    end: int
    region: Region


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call with its decoded arguments."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Gold:
    """The gold turn that a response is scored against: the expected calls and answer.

    `answer` is None if the turn should only call tools. By default, only its presence is scored.
    """

    calls: tuple[ToolCall, ...] = ()
    answer: str | None = None

    @property
    def turn(self) -> Turn:
        """`calls` if tool calls are expected, otherwise `answers`."""
        return "calls" if self.calls else "answers"


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """A parsed response; parsing never raises, and errors are listed in `problems`.

    `spans` are sorted and disjoint, and characters outside of them are OTHER. `well_formed` means that the format's
    blocks are complete, in order and not repeated more than allowed; it does not cover the JSON inside.
    `unreadable_calls` counts the parts of call blocks that cannot be read as a call.
    """

    thought: str | None = None
    calls: tuple[ToolCall, ...] = ()
    answer: str | None = None
    spans: tuple[Span, ...] = ()
    problems: tuple[str, ...] = ()
    well_formed: bool = False
    attempted_call: bool = False
    """Whether a call block was opened, even if it contains no call."""
    unreadable_calls: int = 0
    untagged_answer: bool = False
    """Whether the format writes its answer as plain text, so that text next to calls is allowed."""
    text_values: bool = False
    """Whether the format writes argument values as text, so that `12` can be a string or a number."""


def gold_from_json(value: Any) -> Gold:
    """Build a gold turn from `{"calls": [{"name": str, "arguments": object}], "answer": str | null}`.

    A blank answer becomes None, because no format can distinguish a blank answer from none.

    Raises:
        UserError: The value has another structure.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"gold is of type {type(value).__name__}", '{"calls": [...], "answer": ...}', ROW_REMEDY)
    unknown = set(value) - {"calls", "answer"}
    if unknown or not value:
        raise UserError(f"gold has the keys {sorted(map(str, value))}", "calls, answer or both", ROW_REMEDY)
    calls, answer = value.get("calls", []), value.get("answer")
    if not isinstance(calls, (list, tuple)):
        raise UserError(f"the list of gold calls is of type {type(calls).__name__}", "a list", ROW_REMEDY)
    if answer is not None and not isinstance(answer, str):
        raise UserError(f"the gold answer is of type {type(answer).__name__}", "a string or null", ROW_REMEDY)
    return Gold(
        tuple(_call_from_json(call, number) for number, call in enumerate(calls, 1)), (answer or "").strip() or None
    )


def _call_from_json(call: Any, number: int) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        is_object = isinstance(call, Mapping)
        problem = (
            f"the name of gold call {number} is {call.get('name')!r:.80}"
            if is_object
            else f"gold call {number} is {call!r:.80}"
        )
        raise UserError(problem, '{"name": str, "arguments": object}', ROW_REMEDY)
    arguments = call.get("arguments")
    if not isinstance(arguments, Mapping):
        problem = f"arguments of gold call {number} ({call['name']!r}) is of type {type(arguments).__name__}"
        raise UserError(problem, "an object", ROW_REMEDY)
    return ToolCall(call["name"], arguments)


def check_progress(progress: float) -> None:
    """Raise a UserError for a curriculum progress outside [0, 1]."""
    if not 0 <= progress <= 1:
        raise UserError(f"progress is {progress}", "a number in [0, 1]", "pass step / (total steps - 1)")
