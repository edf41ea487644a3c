"""Training samples: a dialogue becomes one single-turn sample per assistant turn.

A `Dialogue` has the form of public data sets: OpenAI messages with `tool_calls` and tool results, and tools as JSON
schemas. `decompose` splits it into `ToolSample`s, each with the full history before one assistant turn and the gold of
that turn. ResT trains on single turns; multi-turn tasks are covered by the histories.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """A conversation in OpenAI's form; assistant turns have `content`, `tool_calls` and `reasoning_content`.

    A turn of `weight` 0 (as in OpenAI's fine-tuning format) gives no sample but stays in histories. With
    `tools_in_prompt`, the messages already describe the tools.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    kind: str = "dialogue"
    tools_in_prompt: bool = False


@dataclass(frozen=True)
class ToolSample:
    """One assistant turn to train on: the history before it, the offered tools, and the gold of the turn.

    Attributes:
        id: Unique name of the sample.
        messages: The history; it does not contain the turn itself.
        tools: The offered tools as JSON schemas.
        gold: The expected calls, or the expected answer.
        thought: The reasoning in the demonstration, if any.
        kind: The kind of task, such as `single` or `parallel`; result tables group responses by kind.
        tools_in_prompt: Whether the messages already describe the tools. `tools` are then used for checks only, and
            not passed to the chat template.
        preamble: The text next to the calls. It does not count as an answer, because the turn waits for results.
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
    """A message that cannot be read, or an assistant turn after such a message; `reason` is a key of REASONS."""

    position: int
    problem: str
    reason: str


def decompose(dialogue: Dialogue) -> list[ToolSample]:
    """Split a dialogue into one sample per assistant turn, each with the full history before it.

    Text next to tool calls becomes the preamble of the turn and not its answer, because the turn waits for results.
    Histories contain all messages but no reasoning (`reasoning_content` or a leading `<think>` block), as with Qwen3's
    chat template. A dialogue without assistant turns gives no sample.

    Raises:
        UserError: A message cannot be read, or the dialogue is empty.
    """
    if not dialogue.messages:
        raise UserError(f"dialogue {dialogue.id!r} has no messages", "at least a user message", "remove the row")
    samples, bad = decompose_readable(dialogue)
    if bad:
        raise UserError(f"dialogue {dialogue.id!r}: {bad[0].problem}")
    return samples


def iterate_samples(dialogues: Iterable[Dialogue]) -> Iterator[ToolSample]:
    """Yield the samples of dialogues in order."""
    return (sample for dialogue in dialogues for sample in decompose(dialogue))


def decompose_readable(dialogue: Dialogue) -> tuple[list[ToolSample], list[BadTurn]]:
    """Split a dialogue as `decompose` does, but stop at the first message that cannot be read.

    Returns:
        The samples of the turns before that message, and the message together with every assistant turn after it.
        Those turns are lost too, because their history would have a gap.
    """
    # One pass with a growing history: a sample takes the history as it is before its turn, and then the turn itself is
    # appended without its reasoning. Tuples share the message objects, so K turns cost O(K * messages) references.
    history: list[dict[str, Any]] = []
    samples: list[ToolSample] = []
    for index, raw in enumerate(dialogue.messages):
        try:
            message = _read_message(raw, f"message {index}")
        except UserError as error:
            reason = "too_deep" if isinstance(error.__cause__, TooDeepError) else "bad_turn"
            return samples, [BadTurn(index, str(error), reason), *_report_turns_after(dialogue, index)]
        is_trained = message.pop("weight", 1) != 0
        if message["role"] == "assistant":
            thought, said, calls = _read_assistant(message)
            if is_trained:
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
            problem = f"message {at} comes after message {index}, which cannot be read"
            yield BadTurn(at, problem, "broken_history")


def _read_message(raw: Any, where: str) -> dict[str, Any]:
    role = raw.get("role") if isinstance(raw, Mapping) else None
    if role not in ROLES:
        raise UserError(f"{where} has the role {role!r}", f"one of {', '.join(ROLES)}", "rename the role")
    message = dict(raw)
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(content, str | None):
        problem = f"the content of {where} is of type {type(content).__name__}"
        raise UserError(problem, "text", "join the text parts into one string")
    if calls is not None and (isinstance(calls, str) or not isinstance(calls, Sequence)):
        raise UserError(f"tool_calls of {where} is {calls!r}", "a list of calls", "write each call as an object")
    if calls and role != "assistant":
        raise UserError(f"{where} has tool_calls but the role {role}", "the role assistant", "fix the role")
    if calls:
        message["tool_calls"] = [_read_call(call, where) for call in calls]
    else:
        message.pop("tool_calls", None)
        if content is None:
            raise UserError(
                f"{where} has neither content nor tool_calls", remedy="add one of them or remove the message"
            )
    return message


def _read_call(raw: Any, where: str) -> dict[str, Any]:
    # OpenAI stores arguments as JSON text, but chat templates expect an object.
    function = raw.get("function", raw) if isinstance(raw, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            problem = f"the arguments {arguments!r:.200} in {where} are not JSON ({error})"
            raise UserError(problem, remedy="fix the row") from error
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise UserError(
            f"{where} has the tool call {raw!r}",
            "{'function': {'name': text, 'arguments': object}}",
            "give every call a name and an arguments object ({} if it has none)",
        )
    return to_message_call(ToolCall(name, arguments), **({"id": raw["id"]} if "id" in raw else {}))


def _read_assistant(message: Mapping[str, Any]) -> tuple[str | None, str | None, tuple[ToolCall, ...]]:
    text = (message.get("content") or "").strip()
    thought = (message.get("reasoning_content") or "").strip()
    if match := THINK.match(text):
        thought, text = thought or match.group(1).strip(), text[match.end() :].strip()
    return thought or None, text or None, get_calls(message)


def get_calls(message: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """Return the calls of a message in OpenAI's form."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return tuple(ToolCall(function["name"], function["arguments"]) for function in functions)


def to_message_call(call: ToolCall, **extra: Any) -> dict[str, Any]:
    """Return a call as an entry of `tool_calls`; `extra` fields such as its id come first."""
    return {**extra, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}


def to_json(sample: ToolSample) -> dict[str, Any]:
    """Return the sample as a JSON object, one row of a JSONL file; `from_json` is the inverse."""
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
    """Return the sample of a JSONL row; raise UserError if a field is missing or has the wrong type."""
    where = f"sample {row.get('id')!r}" if isinstance(row, Mapping) else "sample"
    messages, tools = _require_field(row, "messages", list, where), _require_field(row, "tools", list, where)
    if not messages:
        raise UserError(f"{where} has no messages", "at least a user message", "remove the row")
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
            f"{where} is {repr(raw)[:80]}",
            "{'type': 'function', 'function': {'name': text, 'description': text, 'parameters': JSON schema}}",
            "write each tool as an object",
        )
    return dict(raw)


def _require_field(row: Any, name: str, kind: Any, where: str) -> Any:
    value = row.get(name) if isinstance(row, Mapping) else row
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", str(kind))
        raise UserError(
            f"{name} of {where} is {value!r:.200}", expected, "write rows with rest_rl.data.samples.to_json"
        )
    return value


def compute_digest(value: Any) -> int:
    """Return a 64-bit digest of JSON, whatever the key order; a million values collide with a probability of 3e-8."""
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def compute_leak_digest(sample: ToolSample) -> int:
    """Return a digest of a sample's prompt that is the same in all copies of a data set, to find leaked prompts.

    The digest covers roles, texts without white space, calls, and tool names, but no system messages, ids or schemas,
    because copies of a data set format these differently.
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
