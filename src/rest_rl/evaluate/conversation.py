"""What an evaluation is made of: benchmarks hold conversations, models answer their requests.

A benchmark knows its samples and judges; a model knows how to write; neither knows the other. A single-turn sample is
a conversation of one request, a multi-turn one of as many as it takes.
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
    """One thing a model is asked: the history and the tools as a sample, whose `gold` is what an oracle would say.

    `step` counts the responses within one turn of the user; both count from 0.
    """

    sample: ToolSample
    turn: int = 0
    step: int = 0


class Reply(NamedTuple):
    """What came back for a request: a text, or in one of the last three why there is none."""

    text: str = ""
    calls: tuple[ToolCall, ...] | None = None
    """Calls that a server has read out already; None when they stand in the text."""
    prompt_tokens: int | None = None
    tokens: int | None = None
    is_truncated: bool = False
    """The response ran into the limit of its length."""
    overflow: str = ""
    """Why the prompt did not fit the model; the sample counts as wrong."""
    refusal: str = ""
    """Why the model cannot be given the prompt at all, such as a template that fails; the sample counts as wrong."""
    error: str = ""
    """Why there is no response (a server that fails); the sample is not scored and is tried again on resume."""


class Conversation(Protocol):
    def request(self) -> Request | None:
        """What the model is asked next; None when the conversation is over."""
        ...

    def receive(self, reply: Reply) -> None:
        """Take the reply to the last request; only replies with a text arrive here."""
        ...

    def record(self) -> Mapping[str, Any]:
        """`response` and `calls` so far, also of a conversation that was given up."""
        ...

    def outcome(self) -> Mapping[str, Any]:
        """The record and the verdict: one boolean per metric and `reason`; or `error`, why there is none."""
        ...

    def close(self) -> None:
        """Release what the conversation holds; called once, also for one that was given up."""


class Benchmark(Protocol):
    """Samples with their judge; a subclass needs `name`, `pin`, `groups` and `start`."""

    name: str
    """Such as `bfcl`."""
    pin: str
    """Which edition of data and checker, printed on every table."""
    metrics: tuple[str, ...] = ("correct",)
    """Booleans of each row, the headline first."""
    group_field: str = "category"
    """What rows call their group."""
    groups: Mapping[str, Any]
    """The group of every sample by its id, a text or a number, in the order in which they are asked."""

    def start(self, identity: str, tool_format: ToolFormat) -> Conversation:
        """Begin a sample; responses are read in the given format."""
        ...

    def extras(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """What the summary holds besides the groups: ceilings, official averages where they are complete."""
        del rows
        return {}

    def close(self) -> None:
        """Release what the benchmark holds."""


class Model(Protocol):
    """A source of responses: a checkpoint, a server, recorded responses, the gold; a subclass needs `respond`."""

    batch_size: int = 1
    """How many requests one call of `respond` is given at most."""
    concurrency: int = 1
    """How many threads may call `respond` at once."""

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in order; never raises for what a single request can cause."""
        ...

    def context_usage(self, request: Request) -> tuple[int, int] | None:
        """(tokens that prompt and response would take, tokens the model holds); None where it cannot be known."""
        del request
        return None

    def stop(self) -> None:
        """Give up what is under way, from any thread; later requests end with an error.

        A model that one thread asks has nothing to give up: the exception that ends an evaluation has ended that, too.
        """


class SingleTurn(Conversation):
    """A conversation of one request, whose response `judge` reads: metrics, reason and what else its row holds."""

    def __init__(
        self,
        sample: ToolSample,
        tool_format: ToolFormat,
        judge: Callable[[Reply, ParsedResponse], Mapping[str, Any]],
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
    """The calls and the answer of a reply, from its text unless a server has read them out."""
    if reply.calls is None:
        return tool_format.parse(reply.text, spans=False)
    return ParsedResponse(calls=reply.calls, answer=reply.text.strip() or None, well_formed=True)
