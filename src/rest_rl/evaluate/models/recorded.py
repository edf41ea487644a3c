"""Models that need no weights: responses recorded in a file, and the gold itself (a self-test of the whole path)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rest_rl.errors import UserError
from rest_rl.evaluate.conversation import Reply, Request
from rest_rl.formats import ToolFormat
from rest_rl.jsonl import parse_row, read_lines, text_field
from rest_rl.response import ToolCall

Texts = str | list[list[str]]


class Recording(NamedTuple):
    """What was recorded of a sample: a text, or for several turns a list of lists of step texts; or why there is none.

    `calls` are those that a server had read out, in the shape of the texts.
    """

    texts: Texts = ""
    calls: list[Any] | None = None
    overflow: str = ""
    refusal: str = ""


class Recorded:
    """Recorded responses by the id of their sample."""

    batch_size = 1
    concurrency = 1

    def __init__(self, responses: Mapping[str, Recording]) -> None:
        """Bind the responses; see `read_responses`."""
        self.responses = responses

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """What was recorded; nothing where a recording ends, which ends the turn."""
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply:
        recording = self.responses[request.sample.id]
        if isinstance(recording.texts, str):
            is_first = request.turn == request.step == 0
            text, calls = (recording.texts, recording.calls) if is_first else ("", None)
        else:
            text, calls = (at(nested, request.turn, request.step) for nested in (recording.texts, recording.calls))
        read_out = None if recording.calls is None else tuple(map(read_call, calls or ()))
        return Reply(text or "", read_out, overflow=recording.overflow, refusal=recording.refusal)

    def room(self, request: Request) -> tuple[int, int] | None:
        """Nothing has to fit."""
        return None

    def stop(self) -> None:
        """Nothing is under way."""


def at(nested: Sequence[Sequence[Any]] | None, turn: int, step: int) -> Any:
    """The item of a step; None where there is none."""
    steps = nested[turn] if nested is not None and turn < len(nested) else ()
    return steps[step] if step < len(steps) else None


def read_call(call: Mapping[str, Any]) -> ToolCall:
    """A call as rows keep it."""
    return ToolCall(str(call["name"]), dict(call["arguments"]))


class Oracle:
    """Answers with the gold, written in a format: what does not pass then cannot be passed, or we are wrong."""

    batch_size = 1
    concurrency = 1

    def __init__(self, tool_format: ToolFormat) -> None:
        """Bind the format."""
        self.format = tool_format

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """The gold; a reply that says why where the format cannot hold it."""
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply:
        gold = request.sample.gold
        try:
            return Reply(text=self.format.render(None, gold.calls, gold.answer))
        except ValueError as error:
            return Reply(text=f"this format cannot hold the gold: {error}")

    def room(self, request: Request) -> tuple[int, int] | None:
        """Nothing has to fit."""
        return None

    def stop(self) -> None:
        """Nothing is under way."""


def read_responses(path: str, groups: Mapping[str, Any]) -> tuple[dict[str, Recording], list[str]]:
    """(responses to samples of the benchmark, ids of others) in a JSONL file of `{"id", "response"}`.

    The rows of samples.jsonl will do as they are. ValueError for a row that is something else, for an id that comes
    twice, and for a file without a response to any sample.
    """
    responses: dict[str, Recording] = {}
    for number, line in read_lines(path):
        try:
            identity, recording = recorded_response(parse_row(line))
            if identity in responses and f"{identity}#2" in groups:
                identity += "#2"  # two samples of BFCL v3 have one id, and recordings of others do not tell them apart
            if identity in responses:
                raise UserError(f"id {identity!r} a second time", "one response per sample", "remove one")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if recording is not None:
            responses[identity] = recording
    strangers = [identity for identity in responses if identity not in groups]
    if len(strangers) == len(responses):
        raise UserError(
            f"{path} with {len(responses)} responses, none to a sample that is asked for",
            f"ids such as {next(iter(groups), None)!r}",
            "check the file, the version and the categories",
        )
    return {identity: responses[identity] for identity in responses if identity in groups}, strangers


def recorded_response(row: Mapping[str, Any]) -> tuple[str, Recording | None]:
    """(id, response) of a row; no response where one was never given."""
    identity = text_field(row, "id")
    if "error" in row:
        return identity, None
    ends = {name: str(row.get(key, "")) for name, key in (("overflow", "overflow"), ("refusal", "refused"))}
    texts = checked_texts(row.get("response"))
    calls = checked_calls(row.get("calls"), isinstance(texts, str)) if row.get("native") else None
    return identity, Recording(texts, calls, **ends)


def checked_calls(value: Any, is_single: bool) -> list[Any]:
    """The calls that a server had read out, in the shape of the texts; ValueError for anything else."""
    steps = [value] if is_single else [step for turn in listed(value) for step in listed(turn)]
    for call in (call for step in steps for call in listed(step)):
        if not (isinstance(call, Mapping) and "name" in call and isinstance(call.get("arguments"), Mapping)):
            raise UserError(f"the call {call!r:.80}", '{"name": ..., "arguments": {...}}', "mend the row")
    return value


def listed(value: Any) -> list[Any]:
    """A list; ValueError for anything else."""
    if not isinstance(value, list):
        raise UserError(f"calls of type {type(value).__name__}", "a list of calls", "mend the row")
    return value


def checked_texts(value: Any) -> Texts:
    """A text, or a list of turns, each a list of texts; ValueError for anything else."""
    if isinstance(value, str):
        return value
    is_nested = isinstance(value, list) and all(
        isinstance(turn, list) and all(isinstance(step, str) for step in turn) for turn in value
    )
    if not is_nested:
        raise ValueError(
            f"got a response of type {type(value).__name__} ({value!r:.60}), expected text, or for several turns a "
            "list of turns, each a list of step texts"
        )
    return value
