"""BFCL as conversations: single-turn samples with one request, and multi-turn samples whose calls are executed.

Multi-turn conversations follow BFCL's own loop for models with function calling: a turn ends with the first response
without a call, and a conversation fails if a turn other than the last exceeds the official number of steps. Calls are
executed and judged in a separate process. In multi-turn samples, calls that do not fit the offered tools are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rest_rl.data.samples import ToolSample
from rest_rl.envs.bfcl_sandbox.entries import (
    coerce_calls,
    find_call_problem,
    parameter_schemas,
    to_record,
    to_sendable,
    to_tools,
)
from rest_rl.envs.bfcl_sandbox.package import BfclPackage, Version, find_package
from rest_rl.envs.bfcl_sandbox.sandbox import Sandbox, SandboxError, Session, Verdict, retry_if_ended
from rest_rl.errors import UserError
from rest_rl.evaluate.benchmarks.bfcl.gold import DONE_GOLD, build_gold
from rest_rl.evaluate.benchmarks.bfcl.groups import (
    MULTI_TURN,
    RELEVANCE,
    UNANSWERED,
    official_averages,
    select_categories,
)
from rest_rl.evaluate.conversation import Benchmark, Conversation, Reply, Request, SingleTurn, parse_reply
from rest_rl.formats import ToolFormat
from rest_rl.response import Gold, ParsedResponse, ToolCall

MAX_REASON_LENGTH = 300
SANDBOX_ENDED = "sandbox_ended"
Entry = Mapping[str, Any]
Calls = list[dict[str, Any]]


class SandboxPool:
    """A thread-safe pool that gives each sandbox to one user at a time and creates another when all are in use."""

    def __init__(self, package: BfclPackage, seconds: float, memory_mb: int) -> None:
        self._make = lambda: Sandbox(package, seconds=seconds, memory_mb=memory_mb)
        self._made: list[Sandbox] = []
        self._idle: list[Sandbox] = []

    def acquire(self) -> Sandbox:
        try:
            return self._idle.pop()  # pop without checking first: another thread may take the last one in between
        except IndexError:
            self._made.append(sandbox := self._make())
            return sandbox

    def release(self, sandbox: Sandbox) -> None:
        self._idle.append(sandbox)

    @contextmanager
    def borrow(self) -> Iterator[Sandbox]:
        sandbox = self.acquire()
        try:
            yield sandbox
        finally:
            self.release(sandbox)

    def close(self) -> None:
        made, self._made, self._idle = self._made, [], []
        for sandbox in made:
            sandbox.close()


class Bfcl(Benchmark):
    """The BFCL benchmark, version v3 or v4, with all or some of its categories."""

    name = "bfcl"

    def __init__(
        self, version: Version, categories: Sequence[str] | None = None, *, seconds: float = 20.0, memory_mb: int = 2048
    ) -> None:
        """Load the samples of the given categories or groups (non_live, live, multi_turn, all); None loads all samples.

        The limits for executing and checking the calls of a sample are `seconds` of CPU time and `memory_mb`. Raises
        UserError for an unknown category, or if the bfcl-eval release is not installed.
        """
        self.version: Version = version
        self.categories = select_categories(version, categories)
        package = find_package(version)
        self.pin = package.pin
        self._pool = SandboxPool(package, seconds, memory_mb)
        try:
            with self._pool.borrow() as sandbox:
                self._constants = sandbox.constants()
                entries = [entry for category in self.categories for entry in sandbox.entries(category)]
        except BaseException:
            self._pool.close()
            raise
        self._entries = index_by_id(entries)
        self.groups: Mapping[str, Any] = {name: entry["category"] for name, entry in self._entries.items()}

    def start(self, identity: str, tool_format: ToolFormat) -> Conversation:
        if (entry := self._entries.get(identity)) is None:
            expected = f"one of the {len(self._entries)} samples of {', '.join(self.categories)}"
            raise UserError(f"unknown id {identity!r}", expected, "correct the id, or add its category")
        kind = MultiTurnConversation if entry["category"] in MULTI_TURN else SingleTurnConversation
        try:
            return kind(entry, tool_format, self._pool, self._constants)
        except SandboxError as error:
            raise UserError(f"{error}", remedy="check the available memory and continue with --resume") from error

    def extras(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return `official`, the averages of the official table over fully scored categories, and `version`."""
        numbers = Counter(self.groups.values())
        scored = Counter(row["category"] for row in rows if "error" not in row)
        correct = Counter(row["category"] for row in rows if row.get("correct"))
        complete = {name: (correct[name], number) for name, number in numbers.items() if scored[name] == number}
        return {"official": official_averages(self.version, complete), "version": self.version}

    def close(self) -> None:
        self._pool.close()


class SingleTurnConversation(SingleTurn):
    """The conversation of a single-turn BFCL sample; the verdict depends only on the calls in the response."""

    def __init__(self, entry: Entry, tool_format: ToolFormat, pool: SandboxPool, constants: Mapping[str, Any]) -> None:
        self._entry, self._pool = entry, pool
        tools = to_tools(entry["function"], constants["types"])
        sample = ToolSample(entry["id"], opening_messages(entry, 0), tools, build_gold(entry), kind=entry["category"])
        super().__init__(sample, tool_format, lambda _, parsed: self._judge(parsed))

    def _judge(self, parsed: ParsedResponse) -> Mapping[str, Any]:
        # Formats that write values as text leave open whether 5 is a number or a string. The schema decides, but some
        # gold answers contradict their function's schema, so the untyped calls get a second chance.
        calls = coerce_calls(parsed, parameter_schemas(self.sample.tools))
        verdict = self._check(parsed, calls)
        if not verdict.valid and calls != parsed.calls and (other := self._check(parsed, parsed.calls)).valid:
            calls, verdict = parsed.calls, other
        return {"calls": [to_record(call) for call in calls], **verdict_fields(verdict)}

    def _check(self, parsed: ParsedResponse, calls: Sequence[ToolCall]) -> Verdict:
        category: str = self._entry["category"]
        if category in UNANSWERED:
            return Verdict(False, "irrelevance_error:call", f"{calls[0].name:.80}") if calls else Verdict(True)
        if not calls:
            return Verdict(False, "no_call", "; ".join(parsed.problems))
        if category == RELEVANCE:
            offered = parameter_schemas(self.sample.tools)
            fits = any(not find_call_problem(call, offered) for call in calls)
            return Verdict(fits, "" if fits else "relevance_error:no_tool_of_the_sample")
        written = [call for call in map(to_sendable, calls) if call]
        if len(written) < len(calls):
            return Verdict(False, "too_large", "the arguments of a call are too large or no JSON")
        named = [{call["name"]: call["arguments"]} for call in written]
        try:
            with self._pool.borrow() as sandbox:
                return sandbox.check_calls(self._entry["id"], category, named)
        except SandboxError as error:
            return Verdict(False, "sandbox" if error.is_limit else SANDBOX_ENDED, str(error))


class MultiTurnConversation(Conversation):
    """The conversation of a multi-turn BFCL sample. In each turn the model responds until it makes no call."""

    # State: `_messages` is the history that the next request shows. `_responses`, `_calls` and `_executed` are nested
    # by turn and step: texts and calls for the record, and the calls that passed the check, which are the ones executed
    # and judged. The backends' state (files, orders, tickets, ...) exists only in the sandbox's fork. It is created by
    # the first call, and if the process dies it is rebuilt by replaying `_executed`.

    def __init__(self, entry: Entry, tool_format: ToolFormat, pool: SandboxPool, constants: Mapping[str, Any]) -> None:
        self._entry, self._format, self._pool, self._constants = entry, tool_format, pool, constants
        with pool.borrow() as sandbox:
            self._gold = sandbox.gold_calls(entry["id"])
        self._tools = to_tools(entry["function"], constants["types"])
        held_out = [doc for docs in (entry.get("missed_function") or {}).values() for doc in docs]
        # upstream also executes held-out functions before their turn, and the gold of multi_turn_miss_func_49 needs it
        self._properties = parameter_schemas([*self._tools, *to_tools(held_out, constants["types"])])
        self._messages: list[dict[str, Any]] = []
        self._responses: list[list[str]] = []
        self._calls: list[list[Calls]] = []
        self._executed: list[list[Calls]] = []
        self._turn = self._step = 0
        self._is_over = False
        self._failure: Verdict | None = None
        self._sandbox: Sandbox | None = None
        self._session: Session | None = None
        self._begin_turn()

    def request(self) -> Request | None:
        if self._is_over:
            return None
        calls = self._gold[self._turn] if self._step == 0 else []
        gold = Gold(tuple(ToolCall(call["name"], call["arguments"]) for call in calls)) if calls else DONE_GOLD
        identity, kind = self._entry["id"], self._entry["category"]
        sample = ToolSample(identity, tuple(self._messages), self._tools, gold, kind=kind)
        return Request(sample, self._turn, self._step)

    def receive(self, reply: Reply) -> None:
        assert not self._is_over
        parsed = parse_reply(reply, self._format)
        calls = coerce_calls(parsed, self._properties)
        self._responses[-1].append(reply.text)
        self._messages.append(self._to_message(parsed, reply.text, calls))
        if not calls:
            self._turn += 1
            self._is_over = self._turn == len(self._entry["question"])
            if not self._is_over:
                self._begin_turn()
            return
        self._calls[-1].append([to_record(call) for call in calls])
        try:
            self._execute(calls)
        except SandboxError as error:
            self._give_up("multi_turn:sandbox" if error.is_limit else SANDBOX_ENDED, str(error))
            return
        self._step += 1
        if self._step <= self._constants["max_steps"]:
            return
        if self._turn + 1 == len(self._entry["question"]):
            self._is_over = True  # upstream detects a forced end by missing turns, so the last turn is still judged
        else:
            self._give_up("multi_turn:force_terminated", f"turn {self._turn} did not end within {self._step} steps")

    def record(self) -> Mapping[str, Any]:
        return {"response": self._responses, "calls": self._calls}

    def outcome(self) -> Mapping[str, Any]:
        assert self._is_over
        verdict = self._failure
        try:
            verdict = verdict or self._open_session().check(self._executed)
        except SandboxError as error:
            verdict = Verdict(False, "multi_turn:sandbox" if error.is_limit else SANDBOX_ENDED, str(error))
        return {**self.record(), **verdict_fields(verdict)}

    def close(self) -> None:
        session, self._session = self._session, None
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is None:
            return
        try:
            if session is not None:
                session.close()
        except SandboxError:
            pass  # the process died with the session; the next user of the sandbox gets a new one
        finally:
            self._pool.release(sandbox)

    def _begin_turn(self) -> None:
        # A turn may reveal held-out functions; without a user message, upstream's fixed text announces them.
        messages = list(opening_messages(self._entry, self._turn))
        held_out = (self._entry.get("missed_function") or {}).get(str(self._turn))
        if held_out:
            self._tools += to_tools(held_out, self._constants["types"])
            messages = messages or [{"role": "user", "content": self._constants["updated_functions"]}]
        self._messages += messages
        self._step = 0
        for record in (self._responses, self._calls, self._executed):
            record.append([])

    def _give_up(self, error_type: str, message: str) -> None:
        self._failure, self._is_over = Verdict(False, error_type, message), True

    def _to_message(self, parsed: ParsedResponse, text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        # The thought is a separate field, which most chat templates do not render. A response that the format cannot
        # parse enters the history as its text after the thoughts.
        rest = text.rpartition("</think>")[2].strip()
        is_unread = not parsed.answer and not calls and not rest.startswith("<think>")
        message: dict[str, Any] = {"role": "assistant", "content": rest if is_unread else parsed.answer or ""}
        message |= {"reasoning_content": parsed.thought} if parsed.thought else {}
        if calls:
            message["tool_calls"] = [
                {"id": self._call_id(number), "type": "function", "function": to_record(call)}
                for number, call in enumerate(calls)
            ]
        return message

    def _call_id(self, number: int) -> str:
        return f"call_{self._turn}_{self._step}_{number}"

    def _execute(self, calls: Sequence[ToolCall]) -> None:
        # invalid calls are not executed, but the model sees one result per call, in order
        problems = [find_call_problem(call, self._properties) for call in calls]
        valid_calls = [to_record(call) for call, problem in zip(calls, problems, strict=True) if not problem]
        results = iter(self._execute_in_session(valid_calls) if valid_calls else [])
        if valid_calls:
            self._executed[-1].append(valid_calls)
        for number, (call, problem) in enumerate(zip(calls, problems, strict=True)):
            content = f"Error: {problem}; the call was not executed." if problem else next(results)
            message = {"role": "tool", "name": call.name[:200], "tool_call_id": self._call_id(number)}
            self._messages.append({**message, "content": content})

    def _execute_in_session(self, calls: Calls) -> list[str]:
        # If something outside killed the process (say, the kernel under memory pressure), a new process repeats all
        # earlier calls of the conversation first; the backends are deterministic. A limit would be hit again: no retry.
        try:
            return self._open_session().execute(calls)
        except SandboxError as error:
            if error.is_limit:
                raise

        def replay() -> list[str]:
            self._session = None
            for earlier in (step for turn in self._executed for step in turn):
                self._open_session().execute(earlier)
            return self._open_session().execute(calls)

        return retry_if_ended(replay)

    def _open_session(self) -> Session:
        # lazily: a conversation without calls needs no sandbox
        if self._session is None:
            self._sandbox = self._sandbox or self._pool.acquire()
            self._session = self._sandbox.session(self._entry["id"])
        return self._session


def opening_messages(entry: Entry, turn: int) -> tuple[dict[str, Any], ...]:
    # the user's message, in some samples preceded by a system message or earlier turns
    return tuple({"role": message["role"], "content": message["content"]} for message in entry["question"][turn])


def index_by_id(entries: Sequence[dict[str, Any]]) -> dict[str, Entry]:
    # v3 has two samples named live_relevance_3-3-0; the second becomes live_relevance_3-3-0#2
    found: dict[str, Entry] = {}
    seen: Counter[str] = Counter()
    for entry in entries:
        identity = entry["id"]
        seen[identity] += 1
        identity += f"#{seen[identity]}" if seen[identity] > 1 else ""
        found[identity] = {**entry, "id": identity}
    return found


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    # a process that keeps dying yields an error, not a verdict
    if verdict.error_type == SANDBOX_ENDED:
        return {"error": verdict.message[:MAX_REASON_LENGTH]}
    reason = "" if verdict.valid else f"{verdict.error_type}: {verdict.message}"[:MAX_REASON_LENGTH]
    return {"correct": verdict.valid, "reason": reason}
