"""Calls that an assistant turn writes out in its text, in the notation of any format -> the calls, and what is left.

A turn that calls in its text must not become an answer: it would teach a model to answer where it should call.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rest_rl.data.json_text import read_literal, read_literals
from rest_rl.formats import get_format
from rest_rl.response import ParsedResponse, ToolCall

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
