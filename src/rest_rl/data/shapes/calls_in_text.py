"""Find calls that are written into an assistant's text, in the notation of any format."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from rest_rl.data.reading import read_literal, read_literals
from rest_rl.formats import get_format
from rest_rl.response import ParsedResponse, ToolCall

# Tags around calls written as objects: Hermes and Qwen, Glaive, Llama 3.
_OBJECT_TAGS = (("<tool_call>", "</tool_call>"), ("<functioncall>", "</functioncall>"), ("<|python_tag|>", None))
# Text that can only start a call. A tag in quotes does not match, because the text only mentions it.
_MARKED = re.compile(
    r"""(?<![`'"])(?:<tool_call>\s*(?:[\[{<]|\Z)|<functioncall>|<\|python_(?:tag|start)\|>|<function=[^<>\s]+>"""
    r"""|\[TOOL_CALLS\]\s*(?:[\[{]|[\w.-]{1,200}\s*(?:\[|\{)))"""
)
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
    """The calls found in a text, and the remaining text."""

    said: str
    calls: tuple[ToolCall, ...]


def find_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> WrittenCalls | None:
    """Return the calls in an assistant's text (without its think block), or None if the text is a plain answer.

    Raises:
        ValueError: The text begins like a call but cannot be read as one.
    """
    # An answer must never become a call by accident. After a tag of a format, any call counts. Without a tag, only
    # calls of offered tools at the end of the text count; other JSON, code and bracketed lists are answers. The
    # notations are tried from the most to the least specific.
    body = text.strip()
    while stop := next((stop for stop in _STOPS if body.endswith(stop)), None):
        body = body.removesuffix(stop).rstrip()
    schemas = {function["name"]: function.get("parameters") for function in (tool["function"] for tool in tools)}
    if ("<" in body or "[TOOL_CALLS]" in body) and _MARKED.search(body):
        found = _read_tagged(body) or _read_llama_functions(body) or _read_by_format(body, schemas)
        is_call = True
    else:
        found = _read_bare_objects(body, schemas) if schemas else None
        if found is None and schemas and "[" in body and "(" in body:
            found = _if_offered(_if_clean(get_format("pythonic").parse(body, spans=False)), schemas)
        is_call = found is None and _has_begun(body, schemas)
    if found is None and is_call:
        raise ValueError(f"the call cannot be read: {body[:120]!r}")
    return found


def _read_tagged(body: str) -> WrittenCalls | None:
    for opening, closing in _OBJECT_TAGS:
        if opening in body:
            said, inside = _cut(body, opening, closing)
            calls = [_read_objects(inner, needs_arguments=False) for inner in inside]
            return None if None in calls else WrittenCalls(said, tuple(call for each in calls for call in each or ()))
    return None


def _read_llama_functions(body: str) -> WrittenCalls | None:
    # `<function=name>{"key": value}</function>`, the custom calls of Llama 3.1
    said, inside = _cut(body, "<function=", "</function>")
    pairs = [
        (name.strip(), read_literal(arguments)) for name, _, arguments in (inner.partition(">") for inner in inside)
    ]
    if not pairs or not all(isinstance(arguments, Mapping) for _, arguments in pairs):
        return None
    return WrittenCalls(said, tuple(ToolCall(name, arguments) for name, arguments in pairs))


# (the text outside the tags, each text inside); an unclosed tag extends to the end.
def _cut(body: str, opening: str, closing: str | None) -> tuple[str, list[str]]:
    outside, *pieces = body.split(opening)
    cut = [piece.partition(closing) if closing else (piece, "", "") for piece in pieces]
    said = [outside.strip(), *(after.strip() for _, _, after in cut)]
    return "\n".join(filter(None, said)), [inner for inner, _, _ in cut]


def _read_by_format(body: str, schemas: Mapping[str, Any]) -> WrittenCalls | None:
    if "<tool_call>" not in body:  # the parser of qwen3_coder requires the outer block, which some rows omit
        body = body.replace("<function=", "<tool_call>\n<function=")
        body = body.replace("</function>", "</function>\n</tool_call>")
    for name in ("mistral", "qwen3_coder", "pythonic"):
        parsed = get_format(name).parse(body, spans=False)
        if found := _if_clean(parsed):
            return _with_texts(found, body, schemas) if parsed.text_values else found
    return None


def _if_clean(parsed: ParsedResponse) -> WrittenCalls | None:
    is_clean = parsed.calls and parsed.well_formed and not parsed.unreadable_calls
    return WrittenCalls(parsed.answer or "", parsed.calls) if is_clean else None


def _if_offered(found: WrittenCalls | None, offered: Collection[str]) -> WrittenCalls | None:
    return found if found and all(call.name in offered for call in found.calls) else None


def _with_texts(found: WrittenCalls, body: str, schemas: Mapping[str, Any]) -> WrittenCalls:
    # The notation of qwen3_coder has no quotes, so the parser guesses types. Where the schema says string, the original
    # text replaces the guess: "0450" must not become 450.
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


def _read_bare_objects(body: str, schemas: Mapping[str, Any]) -> WrittenCalls | None:
    begin = _OBJECT_BEGINS.search(body) if "{" in body else None
    calls = _read_objects(body[begin.end() :], needs_arguments=True) if begin else None
    return _if_offered(WrittenCalls(body[: begin.start()].strip(), calls), schemas) if begin and calls else None


def _has_begun(body: str, offered: Collection[str]) -> bool:
    # True if the text begins like a call of an offered tool and is not complete JSON for something else, for example
    # the description of a tool.
    begun = _BEGUN.match(body)
    is_offered = begun is not None and (begun["object"] or begun["pythonic"].rstrip()) in offered
    return is_offered and (read_literals(body) is None or _read_objects(body, needs_arguments=True) is not None)


def _read_objects(text: str, *, needs_arguments: bool) -> tuple[ToolCall, ...] | None:
    text = text.strip().strip(";").strip()
    if glaive := _GLAIVE.match(text):
        arguments = read_literal(glaive[2])
        return (ToolCall(glaive[1], arguments),) if isinstance(arguments, Mapping) else None
    values = [item for value in read_literals(text) or [] for item in (value if isinstance(value, list) else [value])]
    calls = [_read_object(value, needs_arguments) for value in values]
    return tuple(call for call in calls if call) if calls and None not in calls else None


def _read_object(value: Any, needs_arguments: bool) -> ToolCall | None:
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
