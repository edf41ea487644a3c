"""Training samples: a dialogue becomes one single-turn sample per assistant turn.

A `Dialogue` is what public data sets hold (OpenAI messages with `tool_calls` and tool results, tools as JSON schemas).
`decompose` cuts it into `ToolSample`s: the full history before one assistant turn, and that turn's gold. ResT trains
on single turns; a multi-turn task enters it through its histories.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rest_rl.data.reading import load_json
from rest_rl.response import Gold, ToolCall

ROLES = ("system", "user", "assistant", "tool")
THINK = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
"""A think block at the start of a text."""


@dataclass(frozen=True)
class Dialogue:
    """A whole conversation in OpenAI shape; assistant turns carry `content`, `tool_calls`, `reasoning_content`.

    A turn of `weight` 0 (OpenAI's fine-tuning shape) is not to be learnt: it gives no sample and stays in histories.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    kind: str = "dialogue"


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
    """A message that cannot be read, or (`follows`) an assistant turn that comes after one."""

    position: int
    problem: str
    follows: bool = False


def decompose(dialogue: Dialogue) -> list[ToolSample]:
    """One sample per assistant turn, each with the full history before it; K assistant turns give K samples.

    Text beside tool calls is that turn's preamble and no answer: a turn that calls tools waits for their results.
    Reasoning (`reasoning_content` or a leading `<think>` block) is left out of the histories, as Qwen3's chat template
    does; what was said stays. ValueError on messages that are not a dialogue. A dialogue without assistant turns gives
    no sample.
    """
    samples, bad = decompose_around(dialogue)
    if bad:
        raise ValueError(f"dialogue {dialogue.id!r}, {bad[0].problem}")
    return samples


def decompose_around(dialogue: Dialogue) -> tuple[list[ToolSample], list[BadTurn]]:
    """`decompose` that stops at a message it cannot read: (samples of the turns before it, what gave none).

    The history of every later turn would have a hole, so each of them is named as well. ValueError for no messages.
    """
    if not dialogue.messages:
        where = f"dialogue {dialogue.id!r}"
        raise ValueError(f"{where}: got no messages; expected at least a user message; remove the row")
    history: list[dict[str, Any]] = []
    samples: list[ToolSample] = []
    for index, raw in enumerate(dialogue.messages):
        try:
            message = _checked_message(raw, f"message {index}")
        except ValueError as error:
            return samples, [BadTurn(index, str(error)), *_turns_after(dialogue, index)]
        is_learnt = message.pop("weight", 1) != 0
        if message["role"] == "assistant":
            thought, said, calls = _split_turn(message)
            gold, preamble = (Gold(calls), said) if calls else (Gold((), said), None)
            identity, shown = f"{dialogue.id}/{len(samples)}", tuple(history)
            sample = ToolSample(identity, shown, dialogue.tools, gold, thought, dialogue.kind, preamble=preamble)
            samples += [sample] if is_learnt else []
            message = _without_reasoning(message, said)
        history.append(message)
    return samples, []


def _turns_after(dialogue: Dialogue, index: int) -> Iterator[BadTurn]:
    for at, raw in enumerate(dialogue.messages):
        if at > index and isinstance(raw, Mapping) and raw.get("role") == "assistant" and raw.get("weight", 1) != 0:
            yield BadTurn(at, f"message {at}: got a turn after message {index}, which cannot be read", follows=True)


def _checked_message(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = raw.get("role") if isinstance(raw, Mapping) else None
    if role not in ROLES:
        raise ValueError(f"{where}: got role {role!r}; expected one of {', '.join(ROLES)}; rename the role")
    message = dict(raw)
    content, calls = message.get("content"), message.get("tool_calls")
    if content is not None and not isinstance(content, str):
        got = type(content).__name__
        raise ValueError(f"{where}: got content of type {got}; expected text; join the text parts into one string")
    if calls is not None and (isinstance(calls, str) or not isinstance(calls, Sequence)):
        raise ValueError(f"{where}: got tool_calls {calls!r}; expected a list of calls; write each call as an object")
    if calls and role != "assistant":
        raise ValueError(f"{where}: got tool_calls in a message of role {role}; expected role assistant; mend the role")
    if calls:
        message["tool_calls"] = [_checked_call(call, where) for call in calls]
    else:
        message.pop("tool_calls", None)
    if content is None and not calls:
        raise ValueError(f"{where}: got neither content nor tool_calls; expected one of them; remove the message")
    return message


def _checked_call(raw: Any, where: str) -> dict[str, Any]:
    """The call in OpenAI shape with its arguments as an object (chat templates want objects, not JSON text)."""
    function = raw.get("function", raw) if isinstance(raw, Mapping) else None
    if not isinstance(function, Mapping):
        function = {}
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise ValueError(f"{where}: got arguments {arguments!r}; expected JSON ({error}); repair the row") from None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ValueError(
            f"{where}: got tool call {raw!r}; expected {{'function': {{'name': text, 'arguments': object}}}}; "
            "give every call a name and an arguments object ({} if it takes none)"
        )
    extra = {key: raw[key] for key in ("id",) if key in raw}
    return {**extra, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _split_turn(message: Mapping[str, Any]) -> tuple[str | None, str | None, tuple[ToolCall, ...]]:
    """(thought, text, calls) of an assistant message; the text is its answer, or stands beside its calls."""
    text = (message.get("content") or "").strip()
    thought = (message.get("reasoning_content") or "").strip()
    if match := THINK.match(text):
        thought, text = thought or match.group(1).strip(), text[match.end() :].strip()
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = tuple(ToolCall(function["name"], function["arguments"]) for function in functions)
    return thought or None, text or None, calls


def _without_reasoning(message: Mapping[str, Any], said: str | None) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**kept, "content": said or ""}


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
    """The sample of one JSONL row; ValueError names the field that is missing or of the wrong type."""
    where = f"sample {row.get('id')!r}" if isinstance(row, Mapping) else "sample"
    messages, tools = _field(row, "messages", list, where), _field(row, "tools", list, where)
    if not messages:
        raise ValueError(f"{where}: got no messages; expected at least a user message; remove the row")
    return ToolSample(
        id=_field(row, "id", str, where),
        messages=tuple(_checked_message(message, f"{where}, message {i}") for i, message in enumerate(messages)),
        tools=tuple(_checked_tool(tool, f"{where}, tool {i}") for i, tool in enumerate(tools)),
        gold=_gold(_field(row, "gold", Mapping, where), f"{where}, gold"),
        thought=_field(row, "thought", (str, type(None)), where),
        kind=_field({"kind": "single", **row}, "kind", str, where),
        tools_in_prompt=_field({"tools_in_prompt": False, **row}, "tools_in_prompt", bool, where),
        preamble=(_field(row, "preamble", (str, type(None)), where) or "").strip() or None,
    )


def _checked_tool(raw: Any, where: str) -> dict[str, Any]:
    function = raw.get("function", raw) if isinstance(raw, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"{where}: got {repr(raw)[:80]}; expected {{'type': 'function', 'function': {{'name': text, 'description': "
            "text, 'parameters': JSON schema}}; write each tool as an object"
        )
    return dict(raw)


def _gold(row: Mapping[str, Any], where: str) -> Gold:
    calls = [_checked_call(call, where)["function"] for call in _field(row, "calls", list, where)]
    answer = _field(row, "answer", (str, type(None)), where)
    return Gold(tuple(ToolCall(call["name"], call["arguments"]) for call in calls), (answer or "").strip() or None)


def _field(row: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = row.get(name) if isinstance(row, Mapping) else row
    if not isinstance(value, kind):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(
            f"{where}: got {name} = {value!r}; expected {expected}; write rows with rest_rl.data.samples.to_json"
        )
    return value


class DigestSet:
    """Digests that were added; two different texts share one with probability n^2 / 2^65 (3e-8 for a million)."""

    def __init__(self) -> None:
        """Empty."""
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, digest: int) -> bool:
        return self._slots[self._slot(digest)] == digest

    def add(self, digest: int) -> bool:
        """Whether it is new."""
        slot = self._slot(digest)
        if self._slots[slot] == digest:
            return False
        self._slots[slot] = digest
        self._count += 1
        if 2 * self._count > len(self._slots):
            self._grow()
        return True

    def _slot(self, digest: int) -> int:
        """Its place, or the free one where it belongs (0 marks a free place; `digest_of` never gives 0)."""
        slots, mask = self._slots, len(self._slots) - 1
        slot = digest & mask
        while (there := slots[slot]) and there != digest:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(16 * len(old)))
        for digest in old:
            if digest:
                self._slots[self._slot(digest)] = digest


def digest_of(value: Any) -> int:
    """64 bits of a JSON value, never 0; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") or 1


def prompt_digest(sample: ToolSample) -> int:
    """Digest of messages and tools."""
    return digest_of([sample.messages, sample.tools])


def gold_digest(sample: ToolSample) -> int:
    """Digest of the gold."""
    return digest_of([[(call.name, call.arguments) for call in sample.gold.calls], sample.gold.answer])


def leak_digest(sample: ToolSample) -> int:
    """Digest of what a prompt asks, for finding it in another file.

    Roles, texts without their white space, calls, and the names of the tools; not the system text, the ids and the
    layout of the schemas, which another copy of the same data set may write in another way.
    """
    said = [
        [message["role"], "".join(str(message.get("content") or "").split()), _called(message)]
        for message in sample.messages
        if message["role"] != "system"
    ]
    return digest_of([said, sorted(str(tool.get("function", tool).get("name")) for tool in sample.tools)])


def _called(message: dict[str, Any]) -> list[Any]:
    return [call.get("function", call) for call in message.get("tool_calls") or ()]
