"""Training samples: a dialogue becomes one single-turn sample per assistant turn.

A `Dialogue` is what public data sets hold (OpenAI messages with `tool_calls` and tool results, tools as JSON schemas).
`decompose` cuts it into `ToolSample`s: the full history before one assistant turn, and that turn's gold. ResT trains
on single turns; a multi-turn task enters it through its histories.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rest_rl.data.reading import TooDeepError, load_json
from rest_rl.errors import UserError
from rest_rl.response import Gold, ToolCall

ROLES = ("system", "user", "assistant", "tool")
THINK = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
"""A think block at the start of a text."""


@dataclass(frozen=True)
class Dialogue:
    """A whole conversation in OpenAI shape; assistant turns carry `content`, `tool_calls`, `reasoning_content`.

    A turn of `weight` 0 (OpenAI's fine-tuning shape) is not to be learnt: it gives no sample and stays in histories.
    With `tools_in_prompt` the messages describe the tools in their own words.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    kind: str = "dialogue"
    tools_in_prompt: bool = False


@dataclass(frozen=True)
class ToolSample:
    """One assistant turn to learn: the history before it, the tools on offer and what the turn should contain.

    `messages` never hold the turn itself. `thought` is the demonstration's reasoning, if it has one. `kind` names the
    sort of task and is the row of every result table. With `tools_in_prompt` the messages describe the tools in their
    own words: `tools` then serve the checks and are not given to a chat template. `preamble` is what the turn says
    before its calls; it is no answer, since the turn waits for results.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    gold: Gold
    thought: str | None = None
    kind: str = "single"
    tools_in_prompt: bool = False
    preamble: str | None = None


class BadTurn(NamedTuple):
    """A message that cannot be read, or an assistant turn that comes after one; `reason` is a key of REASONS."""

    position: int
    problem: str
    reason: str


def decompose(dialogue: Dialogue) -> list[ToolSample]:
    """One sample per assistant turn, each with the full history before it; K assistant turns give K samples.

    Text beside tool calls is that turn's preamble and no answer: a turn that calls tools waits for their results.
    Reasoning (`reasoning_content` or a leading `<think>` block) is left out of the histories, as Qwen3's chat template
    does; what was said stays. A dialogue without assistant turns gives no sample.

    Raises:
        UserError: the messages are not a dialogue.
    """
    if not dialogue.messages:
        raise UserError(f"dialogue {dialogue.id!r} with no messages", "at least a user message", "remove the row")
    samples, bad = decompose_readable(dialogue)
    if bad:
        raise UserError(f"dialogue {dialogue.id!r} ({bad[0].problem})", "messages as OpenAI writes them", "fix the row")
    return samples


def decompose_readable(dialogue: Dialogue) -> tuple[list[ToolSample], list[BadTurn]]:
    """`decompose` that stops at a message it cannot read: (samples of the turns before it, what gave none).

    The history of every later turn would have a hole, so each of them is named as well.
    """
    history: list[dict[str, Any]] = []
    samples: list[ToolSample] = []
    for index, raw in enumerate(dialogue.messages):
        try:
            message = _read_message(raw, f"message {index}")
        except UserError as error:
            reason = "too_deep" if isinstance(error.__cause__, TooDeepError) else "bad_turn"
            return samples, [BadTurn(index, str(error), reason), *_report_turns_after(dialogue, index)]
        is_learnt = message.pop("weight", 1) != 0
        if message["role"] == "assistant":
            thought, said, calls = _read_assistant(message)
            if is_learnt:
                samples.append(
                    ToolSample(
                        id=f"{dialogue.id}/{len(samples)}",
                        messages=tuple(history),
                        tools=dialogue.tools,
                        gold=Gold(calls, None if calls else said),
                        thought=thought,
                        kind=dialogue.kind,
                        tools_in_prompt=dialogue.tools_in_prompt,
                        preamble=said if calls else None,
                    )
                )
            message = {key: value for key, value in message.items() if key != "reasoning_content"}
            message["content"] = said or ""
        history.append(message)
    return samples, []


def _report_turns_after(dialogue: Dialogue, index: int) -> Iterator[BadTurn]:
    for at, raw in enumerate(dialogue.messages):
        if at > index and isinstance(raw, Mapping) and raw.get("role") == "assistant" and raw.get("weight", 1) != 0:
            told = f"got message {at}, a turn after message {index}, which cannot be read"
            yield BadTurn(at, told, "broken_history")


def _read_message(raw: Any, where: str) -> dict[str, Any]:
    role = raw.get("role") if isinstance(raw, Mapping) else None
    if role not in ROLES:
        raise UserError(f"{where} of role {role!r}", f"one of {', '.join(ROLES)}", "rename the role")
    message = dict(raw)
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(content, str | None):
        got = f"{where} with content of type {type(content).__name__}"
        raise UserError(got, "text", "join the text parts into one string")
    if calls is not None and (isinstance(calls, str) or not isinstance(calls, Sequence)):
        raise UserError(f"{where} with tool_calls {calls!r}", "a list of calls", "write each call as an object")
    if calls and role != "assistant":
        raise UserError(f"{where} with tool_calls and role {role}", "role assistant", "correct the role")
    if calls:
        message["tool_calls"] = [_read_call(call, where) for call in calls]
    else:
        message.pop("tool_calls", None)
        if content is None:
            raise UserError(f"{where} with neither content nor tool_calls", "one of them", "remove the message")
    return message


def _read_call(raw: Any, where: str) -> dict[str, Any]:
    """The call in OpenAI shape with its arguments as an object (chat templates want objects, not JSON text)."""
    function = raw.get("function", raw) if isinstance(raw, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            got = f"{where} with arguments {arguments!r:.200} ({error})"
            raise UserError(got, "JSON", "repair the row") from error
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise UserError(
            f"{where} with tool call {raw!r}",
            "{'function': {'name': text, 'arguments': object}}",
            "give every call a name and an arguments object ({} if it takes none)",
        )
    return to_message_call(ToolCall(name, arguments), **({"id": raw["id"]} if "id" in raw else {}))


def _read_assistant(message: Mapping[str, Any]) -> tuple[str | None, str | None, tuple[ToolCall, ...]]:
    """(thought, text, calls) of an assistant message; the text is its answer, or stands beside its calls."""
    text = (message.get("content") or "").strip()
    thought = (message.get("reasoning_content") or "").strip()
    if match := THINK.match(text):
        thought, text = thought or match.group(1).strip(), text[match.end() :].strip()
    return thought or None, text or None, get_calls(message)


def get_calls(message: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """The calls of a message that was read."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return tuple(ToolCall(function["name"], function["arguments"]) for function in functions)


def to_message_call(call: ToolCall, **extra: Any) -> dict[str, Any]:
    """A call as an entry of `tool_calls`; `extra` goes before it, such as its id."""
    return {**extra, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}


def to_json(sample: ToolSample) -> dict[str, Any]:
    """The sample as a JSON object, one row of a JSONL file; `from_json` is its inverse."""
    calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in sample.gold.calls]
    row = {
        "id": sample.id,
        "kind": sample.kind,
        "messages": list(sample.messages),
        "tools": list(sample.tools),
        "gold": {"calls": calls, "answer": sample.gold.answer},
        "thought": sample.thought,
    }
    present = {"tools_in_prompt": sample.tools_in_prompt, "preamble": sample.preamble}
    return {**row, **{name: value for name, value in present.items() if value}}


def from_json(row: Mapping[str, Any]) -> ToolSample:
    """The sample of one JSONL row; UserError names the field that is missing or of the wrong type."""
    where = f"sample {row.get('id')!r}" if isinstance(row, Mapping) else "sample"
    messages, tools = _require_field(row, "messages", list, where), _require_field(row, "tools", list, where)
    if not messages:
        raise UserError(f"{where} with no messages", "at least a user message", "remove the row")
    gold = _require_field(row, "gold", Mapping, where)
    calls = [_read_call(call, f"{where}, gold") for call in _require_field(gold, "calls", list, f"{where}, gold")]
    answer = _require_field(gold, "answer", str | None, f"{where}, gold")
    return ToolSample(
        id=_require_field(row, "id", str, where),
        messages=tuple(_read_message(message, f"{where}, message {i}") for i, message in enumerate(messages)),
        tools=tuple(_read_tool(tool, f"{where}, tool {i}") for i, tool in enumerate(tools)),
        gold=Gold(get_calls({"tool_calls": calls}), (answer or "").strip() or None),
        thought=_require_field(row, "thought", str | None, where),
        kind=_require_field({"kind": "single", **row}, "kind", str, where),
        tools_in_prompt=_require_field({"tools_in_prompt": False, **row}, "tools_in_prompt", bool, where),
        preamble=(_require_field(row, "preamble", str | None, where) or "").strip() or None,
    )


def _read_tool(raw: Any, where: str) -> dict[str, Any]:
    function = raw.get("function", raw) if isinstance(raw, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f"{where} = {repr(raw)[:80]}",
            "{'type': 'function', 'function': {'name': text, 'description': text, 'parameters': JSON schema}}",
            "write each tool as an object",
        )
    return dict(raw)


def _require_field(row: Any, name: str, kind: Any, where: str) -> Any:
    value = row.get(name) if isinstance(row, Mapping) else row
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", str(kind))
        raise UserError(f"{where} with {name} = {value!r}", expected, "write rows with rest_rl.data.samples.to_json")
    return value


def compute_digest(value: Any) -> int:
    """64 bits of a JSON value; the order of keys does not count. Of a million, two share one with probability 3e-8."""
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def compute_leak_digest(sample: ToolSample) -> int:
    """Digest of what a prompt asks, for finding it in another file.

    Roles, texts without their white space, calls, and the names of the tools; not the system text, the ids and the
    layout of the schemas, which another copy of the same data set may write in another way.
    """
    said = [
        [
            message["role"],
            "".join(str(message.get("content") or "").split()),
            [call.get("function", call) for call in message.get("tool_calls") or ()],
        ]
        for message in sample.messages
        if message["role"] != "system"
    ]
    return compute_digest([said, sorted(str(tool.get("function", tool).get("name")) for tool in sample.tools)])
