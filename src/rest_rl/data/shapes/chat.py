"""Chat rows as OpenAI, Hugging Face and ShareGPT write them -> dialogues."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rest_rl.data.reading import load_json, read_literal, read_literals
from rest_rl.data.reasons import Finding, RowRejectedError, finding
from rest_rl.data.samples import THINK, Dialogue, ToolSample, decompose_around
from rest_rl.data.schemas import read_tools
from rest_rl.formats import get_format
from rest_rl.response import ParsedResponse, ToolCall

_OPENING = re.compile(
    r"(?:\A|(?<=\n))[ \t]*(?:# Tools[ \t]*\n|You are a function[- ]calling (?:AI |LLM |language )?model\b)"
)
_ENDS = ("</tools>", "</tool_call>")


class ToolText(NamedTuple):
    """The tools that a system text lists, and what else it says (None for a text of unknown build)."""

    rest: str | None
    tools: list[Any] | None


def tool_text(system: str) -> ToolText | None:
    """How a system text describes tools; None for one that does not.

    The known texts open as Hermes' or Qwen's do and end with the last `</tools>` or `</tool_call>`.
    """
    listed, opening = _listed(system), _OPENING.search(system)
    if opening is None or "</tools>" not in system[opening.start() :]:
        return ToolText(None, listed) if listed else None
    end = max(system.rfind(tag) + len(tag) for tag in _ENDS if tag in system)
    rest = "\n\n".join(filter(None, (system[: opening.start()].strip(), system[end:].lstrip(" \t\r\n.").rstrip())))
    return ToolText(rest, listed)


def _listed(system: str) -> list[Any] | None:
    """The objects between `<tools>` and `</tools>`, from the first such pair that holds any."""
    for piece in system.split("<tools>")[1:]:
        inner, closed, _ = piece.partition("</tools>")
        values = read_literals(inner) if closed else None
        values = values[0] if values and len(values) == 1 and isinstance(values[0], list) else values
        if values and all(isinstance(value, dict) for value in values):
            return values
    return None


def in_order_of_calls(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The messages, with the results behind each turn in the order of its calls where ids show another, and findings.

    Results are matched by id, several calls of one id in their order, and results without an id in the order of the
    calls that are left. Results of no call and calls without a result are noted and stay where they are. One result
    without an id may answer all calls of its turn, and the last turn of a dialogue waits for its results.
    """
    ordered = list(messages)
    found: list[Finding] = []
    for at, end in _blocks(messages):
        calls = _calls(messages[at]) if at >= 0 else []
        if calls is None:  # calls that cannot be read, which is said elsewhere
            continue
        results = messages[at + 1 : end]
        matched = _matched(calls, results)
        slots = [slot for slot, call in enumerate(matched) if call is not None]
        by_call = sorted(slots, key=lambda slot: matched[slot] or 0)
        if by_call != slots:
            shown = ", ".join(str(results[slot].get("tool_call_id")) for slot in slots)
            found.append(finding("results_reordered", f"got the results of message {at} in the order {shown}"))
            for slot, taken in zip(slots, by_call, strict=True):
                ordered[at + 1 + slot] = results[taken]
        found += _unmatched(at, calls, results, matched, is_last=end == len(messages))
    return ordered, found


def _blocks(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int]]:
    """(position of a turn with calls, or -1 or of another message before stray results; end of the results behind)."""
    at = -1
    while at < len(messages):
        end = at + 1
        while end < len(messages) and messages[end].get("role") == "tool":
            end += 1
        if end > at + 1 or (at >= 0 and messages[at].get("tool_calls")):
            yield at, end
        at = end


def _calls(message: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    calls = message.get("tool_calls") or []
    is_readable = isinstance(calls, (list, tuple)) and all(isinstance(call, Mapping) for call in calls)
    return list(calls) if is_readable else None


def _matched(calls: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """For each result the number of its call, or None."""
    left = list(range(len(calls)))
    have_ids = any(call.get("id") is not None for call in calls)
    matched: list[int | None] = [None] * len(results)
    for with_ids in (True, False):
        for slot, result in enumerate(results):
            identity = result.get("tool_call_id") if have_ids else None
            if (identity is not None) != with_ids:
                continue
            fitting = (number for number in left if identity is None or calls[number].get("id") == identity)
            matched[slot] = next(fitting, None)
            left = [number for number in left if number != matched[slot]]
    return matched


def _unmatched(
    at: int,
    calls: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    matched: Sequence[int | None],
    *,
    is_last: bool,
) -> Iterator[Finding]:
    for slot, result in enumerate(results):
        if matched[slot] is None:
            shown = f"{result.get('tool_call_id')}: {result.get('content')!r:.80}"
            yield finding("orphan_result", f"got message {at + 1 + slot}, a result that answers no call: {shown}")
    answers_all = any(result.get("tool_call_id") is None for result in results)
    missing = [number for number in range(len(calls)) if number not in matched]
    if missing and not answers_all and not (is_last and not results):
        shown = ", ".join(str(calls[number].get("id")) for number in missing)
        yield finding("missing_result", f"got no result for {len(missing)} calls of message {at} ({shown})")


_OBJECT_TAGS = (("<tool_call>", "</tool_call>"), ("<functioncall>", "</functioncall>"), ("<|python_tag|>", None))
"""Tags around calls written as objects: of Hermes and Qwen, Glaive, Llama 3."""
_MARKED = re.compile(
    r"""(?<![`'"])(?:<tool_call>\s*(?:[\[{<]|\Z)|<functioncall>|<\|python_(?:tag|start)\|>|<function=[^<>\s]+>"""
    r"""|\[TOOL_CALLS\]\s*(?:[\[{]|[\w.-]{1,200}\s*(?:\[|\{)))"""
)
"""Text that only a call begins with; a tag in quotes is spoken of."""
_STOPS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>")
_OBJECT_BEGINS = re.compile(r"""\A(?=[\[{])|^[ \t]*(?=(?:\[\s*)?\{\s*["'](?:name|type)["']\s*:)""", re.MULTILINE)
_BEGUN = re.compile(
    r"""\[?\s*\{\s*["']name["']\s*:\s*["'](?P<object>[^"'\n]+)["']\s*,\s*["'](?:arguments|parameters)["']"""
    r"""|\[\s*(?P<pythonic>[^\s()\[\]=,"'][^()\[\]=,"'\n]*)\(""",
)
_GLAIVE = re.compile(r"""\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"arguments"\s*:\s*'(\{.*\})'\s*\}\Z""", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=[^>]*>\n?(.*?)\n?</parameter>", re.DOTALL)
_CALL_KEYS = {"name", "arguments", "parameters", "id", "type", "function"}


class WrittenCalls(NamedTuple):
    """The calls that stand in a text, and the text beside them."""

    said: str
    calls: tuple[ToolCall, ...]


def written_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> WrittenCalls | None:
    """The calls of an assistant's text (without its think block); None for a plain answer.

    Behind a tag of a format any call counts; without one, calls of the tools on offer that end the text. Other JSON,
    code and lists in brackets are answers. ValueError for what begins as a call and cannot be read as one.
    """
    body = _without_stop(text.strip())
    schemas = {function["name"]: function.get("parameters") for function in (tool["function"] for tool in tools)}
    if ("<" in body or "[TOOL_CALLS]" in body) and _MARKED.search(body):
        found = _tagged(body) or _llama_functions(body) or _by_format(body, schemas)
        if found is None:
            raise ValueError(f"got a call as text that cannot be read: {body[:120]!r}")
        return found
    found = _bare_objects(body, schemas) if schemas else None
    if found is None and schemas and "[" in body and "(" in body:
        found = _of_tools(_clean(get_format("pythonic").parse(body, spans=False)), schemas)
    if found is None and _has_begun(body, schemas):
        raise ValueError(f"got a call as text that cannot be read: {body[:120]!r}")
    return found


def _without_stop(text: str) -> str:
    end = len(text)
    while stop := next((stop for stop in _STOPS if text.endswith(stop, 0, end)), None):
        end -= len(stop)
        while end and text[end - 1].isspace():
            end -= 1
    return text[:end]


def _tagged(body: str) -> WrittenCalls | None:
    """Objects between (or behind) tags."""
    for opening, closing in _OBJECT_TAGS:
        if opening in body:
            said, inside = _cut(body, opening, closing)
            calls = [_calls_of(inner, needs_arguments=False) for inner in inside]
            return None if None in calls else WrittenCalls(said, tuple(call for each in calls for call in each or ()))
    return None


def _llama_functions(body: str) -> WrittenCalls | None:
    """`<function=name>{"key": value}</function>`, the custom calls of Llama 3.1."""
    said, inside = _cut(body, "<function=", "</function>")
    parts = [inner.partition(">") for inner in inside]
    values = [read_literal(arguments) for _, _, arguments in parts]
    if not parts or not all(isinstance(value, Mapping) for value in values):
        return None
    calls = [ToolCall(name.strip(), value) for (name, _, _), value in zip(parts, values, strict=True)]
    return WrittenCalls(said, tuple(calls))


def _cut(body: str, opening: str, closing: str | None) -> tuple[str, list[str]]:
    """(the text outside, each text inside) of tags; what is not closed ends with the text."""
    outside, *pieces = body.split(opening)
    said, inside = [outside.strip()], []
    for piece in pieces:
        inner, _, after = piece.partition(closing) if closing else (piece, "", "")
        inside.append(inner)
        said.append(after.strip())
    return "\n".join(filter(None, said)), inside


def _by_format(body: str, schemas: Mapping[str, Any]) -> WrittenCalls | None:
    if "<tool_call>" not in body:  # qwen3_coder wants its functions in blocks
        body = body.replace("<function=", "<tool_call>\n<function=")
        body = body.replace("</function>", "</function>\n</tool_call>")
    for name in ("mistral", "qwen3_coder", "pythonic"):
        parsed = get_format(name).parse(body, spans=False)
        if found := _clean(parsed):
            return _with_texts(found, body, schemas) if parsed.text_values else found
    return None


def _clean(parsed: ParsedResponse) -> WrittenCalls | None:
    is_clean = parsed.calls and parsed.well_formed and not parsed.unreadable_calls
    return WrittenCalls(parsed.answer or "", parsed.calls) if is_clean else None


def _with_texts(found: WrittenCalls, body: str, schemas: Mapping[str, Any]) -> WrittenCalls:
    """Values written as text stay text where the schema says string: `0450` and `12` may be a number there, or not."""
    texts = _PARAMETER.findall(body)
    if len(texts) != sum(len(call.arguments) for call in found.calls):
        return found
    at, calls = iter(texts), []
    for call in found.calls:
        properties = (schemas.get(call.name) or {}).get("properties") or {}
        values = {
            key: text if (properties.get(key) or {}).get("type") == "string" and not isinstance(value, str) else value
            for (key, value), text in zip(call.arguments.items(), at, strict=False)
        }
        calls.append(ToolCall(call.name, values))
    return WrittenCalls(found.said, tuple(calls))


def _bare_objects(body: str, schemas: Mapping[str, Any]) -> WrittenCalls | None:
    begin = _OBJECT_BEGINS.search(body) if "{" in body else None
    calls = _calls_of(body[begin.end() :], needs_arguments=True) if begin else None
    return _of_tools(WrittenCalls(body[: begin.start()].strip(), calls), schemas) if begin and calls else None


def _of_tools(found: WrittenCalls | None, offered: Collection[str]) -> WrittenCalls | None:
    return found if found and all(call.name in offered for call in found.calls) else None


def _has_begun(body: str, offered: Collection[str]) -> bool:
    """Whether a text begins as a call of a tool on offer does, and is no description of one."""
    begun = _BEGUN.match(body)
    is_offered = begun is not None and (begun["object"] or begun["pythonic"].rstrip()) in offered
    return is_offered and (read_literals(body) is None or _calls_of(body, needs_arguments=True) is not None)


def _calls_of(text: str, *, needs_arguments: bool) -> tuple[ToolCall, ...] | None:
    """All objects of a text as calls; None unless each of them is one."""
    text = text.strip().strip(";").strip()
    if glaive := _GLAIVE.match(text):
        arguments = read_literal(glaive[2])
        return (ToolCall(glaive[1], arguments),) if isinstance(arguments, Mapping) else None
    calls = [_call_of(value, needs_arguments) for value in _flat(read_literals(text) or [])]
    return tuple(call for call in calls if call) if calls and None not in calls else None


def _flat(values: Iterable[Any]) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _call_of(value: Any, needs_arguments: bool) -> ToolCall | None:
    """The call that an object is; None for other objects, such as the description of a tool."""
    if not isinstance(value, Mapping) or not set(value) <= _CALL_KEYS:
        return None
    function = value["function"] if isinstance(value.get("function"), Mapping) else value
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    arguments = read_literal(arguments) if isinstance(arguments, str) and arguments.strip() else arguments
    if arguments in (None, "") and not needs_arguments:
        arguments = {}
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        return None
    is_schema = "type" in arguments and isinstance(arguments.get("properties"), Mapping)
    return None if is_schema else ToolCall(name, arguments)


ROLE_NAMES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool", "tool_response": "tool",
    "function_response": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip
"""Roles as they are written; `call` is an assistant turn whose text is the call."""
Tools = tuple[dict[str, Any], ...]
_KEPT = ("name",)
_REASONING = ("reasoning_content", "reasoning", "thinking")


def load_messages(row: Mapping[str, Any], identity: str, keep_prompts: bool) -> tuple[list[ToolSample], list[Finding]]:
    """The samples of a row with `messages` (or `conversations`) and `tools` (or `functions`)."""
    raw = next((row[key] for key in ("messages", "conversations", "conversation") if row.get(key) is not None), None)
    raw = read_literal(raw) if isinstance(raw, str) else raw
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise RowRejectedError("bad_row", f"got messages of type {type(raw).__name__}, expected a list")
    tools = read_tools(next((row[key] for key in ("tools", "functions") if row.get(key) is not None), None))
    found: list[Finding] = []
    messages = [chat_message(message, found) for message in raw]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    messages, tools, in_prompt = _without_tool_text(messages, tools, keep_prompts, found)
    messages, problems = in_order_of_calls([_with_calls(message, tools, found) for message in messages])
    found += problems
    samples, found = samples_of(Dialogue(identity, tuple(messages), tools), found)
    return ([replace(sample, tools_in_prompt=True) for sample in samples] if in_prompt else samples), found


def _without_tool_text(
    messages: list[dict[str, Any]], tools: Tools, keep_prompts: bool, found: list[Finding]
) -> tuple[list[dict[str, Any]], Tools, bool]:
    """(messages, tools, whether a message describes them): tools are described once, by the chat template.

    With `keep_prompts` the system text stays and is the one that describes them.
    """
    first: dict[str, Any] = messages[0] if messages else {"role": None}
    described = tool_text(first["content"]) if first["role"] == "system" and isinstance(first["content"], str) else None
    if described is None or not (tools or described.tools):
        return messages, tools, False
    if described.rest is None:
        if tools:
            found.append(finding("tools_twice", f"got the system text {first['content']!r:.120}"))
        return messages, tools, False
    tools = tools or read_tools(described.tools)
    if keep_prompts:
        return messages, tools, True
    found.append(finding("tools_in_system", f"got the system text {first['content']!r:.120}"))
    kept = [{**first, "content": described.rest}] if described.rest else []
    return [*kept, *messages[1:]], tools, False


def _with_calls(message: dict[str, Any], tools: Tools, found: list[Finding]) -> dict[str, Any]:
    """An assistant's message with the calls that its text writes out; what cannot be read is left to be refused."""
    content = message.get("content")
    if message["role"] != "assistant" or message.get("tool_calls") or not isinstance(content, str):
        return message
    thought = THINK.match(content)
    head = thought.group() if thought else ""
    try:
        written = written_calls(content[len(head) :], tools)
    except ValueError:
        return {**message, "tool_calls": content[len(head) :][:200]}
    if written is None:
        return message
    found.append(finding("call_as_text", f"got {content[len(head) :]!r:.120}"))
    calls = [{"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}} for c in written.calls]
    return {**message, "content": head + written.said, "tool_calls": calls}


def samples_of(dialogue: Dialogue, found: list[Finding]) -> tuple[list[ToolSample], list[Finding]]:
    """One sample per assistant turn, and a finding for every turn that gives none."""
    if not dialogue.messages:
        raise RowRejectedError("no_assistant_turn", "got no messages")
    samples, bad = decompose_around(dialogue)
    found += [finding("broken_history" if turn.follows else "bad_turn", turn.problem) for turn in bad]
    if not samples and not bad:
        told = f"got {len(dialogue.messages)} messages, none of the assistant to learn"
        raise RowRejectedError("no_assistant_turn", told)
    return samples, found


def chat_message(raw: Any, found: list[Finding]) -> dict[str, Any]:
    """One message under our names; what cannot be read is left for `decompose_around` to name."""
    if not isinstance(raw, Mapping):
        return {"role": None}
    given = raw.get("role", raw.get("from"))
    role = ROLE_NAMES.get(given.lower(), given) if isinstance(given, str) else given
    content = _joined(raw.get("content", raw.get("value")))
    message: dict[str, Any] = {"role": role, "content": content}
    message |= {key: raw[key] for key in _KEPT if isinstance(raw.get(key), str)}
    message |= _identity(raw, "tool_call_id")
    if role in ("call", "assistant") and raw.get("weight") == 0:
        found.append(finding("weight_zero", f"got an assistant turn of weight 0: {content!r:.80}"))
        message["weight"] = 0
    if role == "call":
        return {**message, "role": "assistant", "content": "", "tool_calls": _read_calls(content, found)}
    if role == "assistant":
        return _assistant(message, raw, found)
    if content is None or (isinstance(content, (Mapping, list)) and role == "tool"):
        message["content"] = "" if content is None else json.dumps(content, ensure_ascii=False)
    return message


def _joined(content: Any) -> Any:
    """Content parts that are all text as one text."""
    if not isinstance(content, (list, tuple)) or not content:
        return "" if content == [] else content
    texts = [
        part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None for part in content
    ]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content  # type: ignore[arg-type]


def _assistant(message: dict[str, Any], raw: Mapping[str, Any], found: list[Finding]) -> dict[str, Any]:
    message.pop("tool_call_id", None)
    reasoning = next((raw[key] for key in _REASONING if isinstance(raw.get(key), str)), None)
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = raw.get("tool_calls") or raw.get("function_call")
    content = message["content"]
    if calls:
        message["tool_calls"] = _read_calls(calls, found)
    elif content is None:
        message["content"] = ""
    return message


def _read_calls(value: Any, found: list[Finding]) -> Any:
    """A list of calls from one call, a list, or the text of either."""
    if isinstance(value, str):
        value = _read_text(value, found)
    if isinstance(value, Mapping):
        value = [value]
    return [_read_call(call, found) for call in value] if isinstance(value, (list, tuple)) else value


def _read_call(call: Any, found: list[Finding]) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    key = "arguments" if "arguments" in function else "parameters"
    arguments = function.get(key)
    if isinstance(arguments, str) and arguments.strip():
        arguments = _read_text(arguments, found)
    elif arguments is None:
        arguments = {}
    return {
        **_identity(call, "id"),
        "type": "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }


def _identity(raw: Mapping[str, Any], key: str) -> dict[str, str]:
    """An id as text: a number is the same id on both sides; nothing for none."""
    value = raw.get(key)
    return {key: str(value)} if isinstance(value, (str, int)) and not isinstance(value, bool) else {}


def _read_text(text: str, found: list[Finding]) -> Any:
    """The value of a text; a Python literal is a repair, and what is neither stays text."""
    try:
        return load_json(text)
    except ValueError:
        value = read_literal(text)
        if not isinstance(value, (Mapping, list)):
            return text
        found.append(finding("arguments_as_python", f"got {text[:80]!r}"))
        return value
