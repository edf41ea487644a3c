"""Models without weights: recorded responses from a file, and the gold answers as a self-test of the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rest_rl.errors import UserError
from rest_rl.evaluate.conversation import Model, Reply, Request
from rest_rl.formats import ToolFormat
from rest_rl.jsonl import parse_row, read_lines, require_text
from rest_rl.response import Gold, ToolCall

Texts = str | list[list[str]]


class Recording(NamedTuple):
    """The recorded response to a sample: a text, or for multi-turn samples a list of turns with a list of step texts.

    `calls` contains the tool calls if a server parsed them, nested like `texts`.
    """

    texts: Texts = ""
    calls: list[Any] | None = None
    overflow: str = ""
    refusal: str = ""
    is_truncated: bool = False


class Recorded(Model):
    """A model that returns recorded responses by sample id. If there are no more, the reply is empty (end of turn)."""

    def __init__(self, responses: Mapping[str, Recording]) -> None:
        self.responses = responses

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply:
        recording = self.responses[request.sample.id]
        if isinstance(recording.texts, str):
            is_first = request.turn == request.step == 0
            text, calls = (recording.texts, recording.calls) if is_first else ("", None)
        else:
            text, calls = (select_step(nested, request) for nested in (recording.texts, recording.calls))
        # with recorded calls the text is never parsed, not even after the end of the recording
        read_out = None
        if recording.calls is not None:
            read_out = tuple(ToolCall(str(call["name"]), dict(call["arguments"])) for call in calls or ())
        ends = {"is_truncated": recording.is_truncated, "overflow": recording.overflow, "refusal": recording.refusal}
        return Reply(text or "", read_out, **ends)


def select_step(nested: Sequence[Sequence[Any]] | None, request: Request) -> Any:
    steps = nested[request.turn] if nested is not None and request.turn < len(nested) else ()
    return steps[request.step] if request.step < len(steps) else None


class Oracle(Model):
    """A model that returns the gold. If a sample still fails, it cannot be solved, or the evaluation has a bug."""

    def __init__(self, tool_format: ToolFormat) -> None:
        self.format = tool_format

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        return [Reply(self._text(request.sample.gold)) for request in requests]

    def _text(self, gold: Gold) -> str:
        try:
            return self.format.render(None, gold.calls, gold.answer)
        except ValueError as error:
            return f"this format cannot represent the gold: {error}"


def read_responses(path: str, groups: Mapping[str, Any]) -> tuple[dict[str, Recording], list[str]]:
    """Read a JSONL file of `{"id", "response"}`, such as the samples.jsonl of an evaluation.

    Returns the responses to the samples in `groups`, by id, and the ids of all other responses. Raises UserError if a
    row is invalid, an id occurs twice, or no response belongs to a sample in `groups`.
    """
    responses: dict[str, Recording] = {}
    for number, line in read_lines(path):
        try:
            identity, recording = read_recording(parse_row(line))
            if identity in responses and f"{identity}#2" in groups:
                identity += "#2"  # two samples of BFCL v3 share an id, and recordings made elsewhere do not number them
            if identity in responses:
                raise UserError(f"id {identity!r} occurs twice", "one response per sample", "remove one of them")
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error.problem}", error.expected, error.remedy) from error
        if recording is not None:
            responses[identity] = recording
    unknown_ids = [identity for identity in responses if identity not in groups]
    if len(unknown_ids) == len(responses):
        raise UserError(
            f"none of the responses in {path} belongs to a selected sample",
            f"ids such as {next(iter(groups), None)!r}",
            "check the file, the version and the categories",
        )
    return {identity: responses[identity] for identity in responses if identity in groups}, unknown_ids


def read_recording(row: Mapping[str, Any]) -> tuple[str, Recording | None]:
    # returns (id, recording), with None for a sample that was never answered
    identity = require_text(row, "id")
    if "error" in row:
        return identity, None
    texts: Any = row.get("response")
    calls = row.get("calls") if row.get("native") else None
    if not isinstance(texts, str) and not is_nested(texts, lambda step: isinstance(step, str)):
        raise UserError(
            f"response has type {type(texts).__name__} ({texts!r:.60})",
            "a text, or for multi-turn samples a list of turns with lists of step texts",
            "correct the row",
        )
    if row.get("native") and not (is_calls(calls) if isinstance(texts, str) else is_nested(calls, is_calls)):
        expected = 'a list of {"name": ..., "arguments": {...}} for each text'
        raise UserError(f"calls has type {type(calls).__name__} ({calls!r:.80})", expected, "correct the row")
    is_truncated = row.get("truncated") is True
    return identity, Recording(texts, calls, str(row.get("overflow", "")), str(row.get("refused", "")), is_truncated)


def is_nested(value: Any, is_step: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(isinstance(turn, list) and all(map(is_step, turn)) for turn in value)


def is_calls(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(call, Mapping) and "name" in call and isinstance(call.get("arguments"), Mapping) for call in value
    )
