"""The interface between benchmarks and models: conversations, requests and replies.

A benchmark provides samples and judges responses; a model generates the responses. Neither depends on the other. A
single-turn sample is a conversation with one request; a multi-turn sample can have many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from rest_rl.data.samples import ToolSample
from rest_rl.formats import ToolFormat
from rest_rl.response import ParsedResponse, ToolCall


@dataclass(frozen=True)
class Request:
    """A request for one response: the prompt as a `ToolSample` with messages and tools.

    The sample's `gold` is a correct response, which the oracle returns. `turn` is the number of the user's turn and
    `step` the number of the response within the turn; both start at 0.
    """

    sample: ToolSample
    turn: int = 0
    step: int = 0
    text: str = ""
    """The prompt as text, if it continues what the model wrote instead of being rendered from the sample."""


class Reply(NamedTuple):
    """A model's reply: a text, or in `overflow`, `refusal` or `error` the reason why there is none."""

    text: str = ""
    calls: tuple[ToolCall, ...] | None = None
    """Tool calls that the server parsed; None if the calls are still in the text."""
    prompt_tokens: int | None = None
    tokens: int | None = None
    is_truncated: bool = False
    """Whether the response reached its length limit."""
    overflow: str = ""
    """Why the prompt did not fit into the context; the sample counts as wrong."""
    refusal: str = ""
    """Why there is no prompt, for example because the chat template fails; the sample counts as wrong."""
    error: str = ""
    """Why there is no response, for example a server failure; the sample is not scored, and resuming retries it."""


class Conversation(Protocol):
    def request(self) -> Request | None:
        """Return the next request, or None when the conversation is over."""
        ...

    def receive(self, reply: Reply) -> None:
        """Process the reply to the last request. Replies with `overflow`, `refusal` or `error` are not passed to it."""
        ...

    def record(self) -> Mapping[str, Any]:
        """Return the row fields `response` and `calls` so far; also called if the conversation ends early."""
        ...

    def outcome(self) -> Mapping[str, Any]:
        """Return the record with one boolean per metric and a `reason`, or with `error` if judging failed."""
        ...

    def close(self) -> None:
        """Release resources. Called exactly once, also if the conversation ends early."""


class Benchmark(Protocol):
    """A set of samples and the code that judges responses. Subclasses define `name`, `pin`, `groups` and `start`."""

    name: str
    """A short name, such as `bfcl`."""
    pin: str
    """The exact version of data and checker; printed on every table."""
    metrics: tuple[str, ...] = ("correct",)
    """Names of the boolean verdicts in each row, the headline metric first."""
    group_field: str = "category"
    """The row field that contains the group."""
    cluster_field: str = "id"
    """A row field that is equal in samples that depend on each other, such as attempts at one task; for intervals."""
    measured_prompts: int | None = None
    """How many first prompts are measured beforehand, if starting a conversation is expensive; None for all."""
    groups: Mapping[str, Any]
    """The group (text or number) of each sample by its id, in evaluation order."""

    def start(self, identity: str, tool_format: ToolFormat) -> Conversation:
        """Start the conversation of the sample with id `identity`; its responses are parsed in `tool_format`."""
        ...

    def extras(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return further entries for summary.json, such as the highest reachable scores or official averages."""
        del rows
        return {}

    def close(self) -> None:
        """Release resources, such as subprocesses."""


class Model(Protocol):
    """A source of responses: a checkpoint, a server, recorded responses or the gold. Subclasses define `respond`."""

    batch_size: int = 1
    """The maximum number of requests per call of `respond`."""
    concurrency: int = 1
    """The number of threads that may call `respond` at the same time."""

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Return one reply per request, in order. A problem with one request is reported in its reply, not raised."""
        ...

    def context_usage(self, request: Request) -> tuple[int, int] | None:
        """Return (tokens of the prompt plus a response of maximum length, context length), or None if unknown."""
        del request
        return None

    def stop(self) -> None:
        """Cancel pending requests, and reply to later requests with an error. May be called from any thread.

        A model with `concurrency` 1 does not need to implement this: the exception that ends the evaluation has already
        interrupted its only call.
        """


class SingleTurn(Conversation):
    """A conversation with a single request.

    `judge` maps the reply and its parsed form to fields of the row: one boolean per metric, `reason`, and others.
    """

    def __init__(
        self, sample: ToolSample, tool_format: ToolFormat, judge: Callable[[Reply, ParsedResponse], Mapping[str, Any]]
    ) -> None:
        self.sample, self.format, self.judge = sample, tool_format, judge
        self._reply: Reply | None = None

    def request(self) -> Request | None:
        return None if self._reply else Request(self.sample)

    def receive(self, reply: Reply) -> None:
        self._reply = reply

    def record(self) -> Mapping[str, Any]:
        if self._reply is None:
            return {"response": "", "calls": []}
        calls = parse_reply(self._reply, self.format).calls
        plain = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
        return {"response": self._reply.text, "calls": plain}

    def outcome(self) -> Mapping[str, Any]:
        assert self._reply is not None
        return {**self.record(), **self.judge(self._reply, parse_reply(self._reply, self.format))}


def parse_reply(reply: Reply, tool_format: ToolFormat) -> ParsedResponse:
    """Return the parsed text of a reply; if the server already parsed the tool calls, use these instead."""
    if reply.calls is None:
        return tool_format.parse(reply.text, spans=False)
    return ParsedResponse(calls=reply.calls, answer=reply.text.strip() or None, well_formed=True)
