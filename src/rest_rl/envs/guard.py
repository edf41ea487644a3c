"""A guard around a session: whatever its code or the model's calls do, a rollout gets results in bounded time.

Every session has a thread of its own, in which all of its code runs (SQLite connections, for example, belong to the
thread that opened them). Python cannot stop a thread: if a call does not return in time, the session is given up, and
its thread is left to end by itself.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, SchemaError

from rest_rl.envs.session import Environment, Message, Result, Task, ToolSession
from rest_rl.response import ToolCall

MAX_ARGUMENT_CHARACTERS = 100_000
"""Longer arguments are refused; written as JSON."""
_ERRORS = 300


@dataclass(frozen=True)
class Limits:
    """Bounds of one rollout."""

    turns: int = 8
    """Responses of the model."""
    calls_per_turn: int = 16
    """Calls in one response; further ones are refused."""
    result_tokens: int = 512
    """Tokens of one result; the rest is cut, and the result says how much."""
    timeout: float = 30.0
    """Seconds for one call, and for starting and scoring a session."""


@dataclass(eq=False)
class _Job:
    function: Callable[[], Any]
    started: float | None = None
    value: Any = None
    error: BaseException | None = None
    finished: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        self.started = time.monotonic()
        try:
            self.value = self.function()
        except BaseException as error:  # also SystemExit, which a tool may raise
            self.error = error
        self.finished.set()

    # The clock starts when the session's thread begins, not when the caller begins to wait: many sessions that hang at
    # the same time cost the limit once.
    def wait(self, seconds: float) -> bool:
        begin = self.started or time.monotonic()
        return self.finished.wait(max(0.0, begin + seconds - time.monotonic()))


class Guard:
    """One session of `environment`, started in its own thread by the constructor, with its tools as of the start.

    No method raises: `failure` says why the session could not be started or was given up. `events` counts what went
    wrong, by kind.
    """

    def __init__(self, environment: Environment, task: Task, seed: int, limits: Limits) -> None:
        self.limits, self.events, self.failure, self.done = limits, Counter[str](), "", False
        self.messages: list[Message] = []
        self.tools: list[dict[str, Any]] = []
        self.first_state: Any = None
        self.gold_calls: list[ToolCall] | None = None
        self.gold_answer = "done"
        self._is_hung = False
        self._session: ToolSession | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name=f"session of {environment.name}").start()
        self._started = self._submit(lambda: self._start(environment, task, seed))

    def wait_for_start(self) -> None:
        """Wait until the session has started or failed to."""
        self._wait(self._started, "start")

    def _start(self, environment: Environment, task: Task, seed: int) -> None:
        self._session = session = environment.open(task, seed)
        self.messages = _copy_json(session.initial_messages())
        self.tools = _copy_json(session.list_tools())
        if not self.messages or any(not isinstance(message.get("role"), str) for message in self.messages):
            raise ValueError(f"initial_messages returned {self.messages!r:.100}, expected chat messages")
        self._validators = {tool["function"]["name"]: _make_validator(tool["function"]) for tool in self.tools}
        self.first_state = self._read("state")
        if (gold := self._read("gold_calls")) is not None:
            self.gold_calls = [_read_gold_call(call) for call in gold]
        if (answer := self._read("gold_answer")) not in (None, ""):
            self.gold_answer = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)

    def start_calls(self, calls: Sequence[ToolCall]) -> Callable[[], list[Result]]:
        """Start the calls of one turn, one after the other unless the session is `parallel`.

        The returned function waits for their results.
        """
        pending = [self._start_call(call, number) for number, call in enumerate(calls)]
        return lambda: [self._finish_call(result) for result in pending]

    def _start_call(self, call: ToolCall, number: int) -> Result | _Job:
        if number >= self.limits.calls_per_turn:
            return self._refuse("too many calls", f"only {self.limits.calls_per_turn} calls are allowed at a time")
        if call.name not in self._validators:
            return self._refuse("unknown tool", f"there is no tool named {call.name[:100]}")
        arguments = self._check_arguments(call)
        if isinstance(arguments, Result):
            return arguments
        job = _Job(lambda: self._run(call.name, arguments))
        if getattr(self._session, "parallel", False):
            threading.Thread(target=job.run, daemon=True).start()
        else:
            self._jobs.put(job)
        return job

    def _check_arguments(self, call: ToolCall) -> dict[str, Any] | Result:
        try:
            text = json.dumps(dict(call.arguments))
            arguments = json.loads(text)
            found = next(iter(self._validators[call.name].iter_errors(arguments)), None)
        except (RecursionError, ValueError, TypeError) as error:
            return self._refuse("bad arguments", f"the arguments cannot be read ({type(error).__name__})")
        if len(text) > MAX_ARGUMENT_CHARACTERS:
            return self._refuse("bad arguments", f"the arguments have {len(text)} characters")
        if found is not None:
            where = "".join(f"{part}: " for part in found.absolute_path)
            return self._refuse("bad arguments", f"{where}{found.message}")
        return arguments

    def _run(self, name: str, arguments: dict[str, Any]) -> Result:
        if self.done:
            return Result('{"error": "the task is over"}', error="call after the end")
        assert self._session is not None
        result = _to_result(self._session.call_tool(name, arguments))
        self.done = self.done or result.done
        return result

    def _finish_call(self, pending: Result | _Job) -> Result:
        if isinstance(pending, _Job):
            result = self._wait(pending, "call")
            pending = result if isinstance(result, Result) else _error_result("the tool failed")
        if pending.error:
            self.events[pending.error] += 1
        return pending

    def verify(self, messages: Sequence[Message]) -> Result | None:
        """Score the rollout; None if that failed. `failure` then says why."""
        if self.failure:
            return None
        assert self._session is not None
        session = self._session
        result = self._wait(self._submit(lambda: _to_result(session.verify(_copy_json(list(messages))))), "verify")
        return result if isinstance(result, Result) else None

    def read(self, method: str) -> Any:
        """Return what an optional method such as `state` returns; None if there is none, or if it fails."""
        return None if self.failure else self._wait(self._submit(lambda: self._read(method)), "read")

    def _read(self, method: str) -> Any:
        function = getattr(self._session, method, None)
        return None if function is None else _copy_json(function())

    def close(self) -> None:
        """Close the session without waiting for it, and end its thread.

        If a call hangs, the session is closed from another thread, which can end the call.
        """
        job = self._submit(self._close_session)
        if self._is_hung and self._session is not None:
            threading.Thread(target=job.run, daemon=True).start()
        self._jobs.put(None)

    # If the session only starts after the time limit, its own thread still closes it.
    def _close_session(self) -> None:
        if self._session is not None:
            self._session.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.started is None:
                job.run()

    def _submit(self, function: Callable[[], Any]) -> _Job:
        job = _Job(function)
        self._jobs.put(job)
        return job

    # Returns the result, or None. A call that raises does not end the session; whatever hangs does, and so does a lost
    # connection, a failed start or a failed verdict.
    def _wait(self, job: _Job, what: str) -> Any:
        if self.failure:
            return None
        if not job.wait(self.limits.timeout):
            self.failure, self._is_hung = f"{what}: no answer within {self.limits.timeout:g} s", True
            self.events["timeout"] += 1
            return None
        if job.error is None:
            return job.value
        text = f"{type(job.error).__name__}: {job.error!s:.{_ERRORS}}"
        if what == "call" and not isinstance(job.error, ConnectionError):
            self.events["exception"] += 1
            return _error_result(text)
        self.events[f"failed {what}"] += 1
        if what != "read":
            self.failure = f"{what}: {text}"
        return None

    def _refuse(self, kind: str, text: str) -> Result:
        return replace(_error_result(text[:_ERRORS]), error=kind)


def _read_gold_call(call: Any) -> ToolCall:
    name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, Mapping) else (None, None)
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        arguments = None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ValueError(f"gold_calls has {call!r:.100}, expected {{'name': text, 'arguments': object}}")
    return ToolCall(name, arguments)


def _error_result(text: str) -> Result:
    return Result(json.dumps({"error": text}, ensure_ascii=False))


def _make_validator(function: Mapping[str, Any]) -> Any:
    return _make_schema_validator(function["name"], json.dumps(function.get("parameters") or {}))


@lru_cache(maxsize=1024)  # checking a schema takes a millisecond, and every session has the same ones
def _make_schema_validator(name: str, text: str) -> Any:
    schema = json.loads(text)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"the schema of {name} is invalid: {error.message:.200}") from None
    return Draft202012Validator(schema)


# A session may return objects of its own with the same fields, or only a text; nothing that it keeps reaches us.
def _to_result(value: Any) -> Result:
    if isinstance(value, Result):
        text, reward, done, error, parts = value.text, value.reward, value.done, value.error, value.parts
    else:
        text, reward, done, error, parts = value, None, False, "", {}
    if not isinstance(text, str):
        text = json.dumps(text, ensure_ascii=False, default=repr)
    rewards = {str(name): float(part) for name, part in dict(parts or {}).items()}
    return Result(text, None if reward is None else _finite(reward), bool(done), str(error or ""), rewards)


def _finite(reward: Any) -> float:
    value = float(reward)
    if not abs(value) < float("inf"):
        raise ValueError(f"the reward is {value}")
    return value


def _copy_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
