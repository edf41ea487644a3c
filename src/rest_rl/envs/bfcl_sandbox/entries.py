"""Convert BFCL's function documents to tool definitions, and the calls in responses to the values that BFCL expects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rest_rl.data.reading import read_literal
from rest_rl.data.schemas import read_tool
from rest_rl.response import ParsedResponse, ToolCall

FALLBACK_TYPE = "string"
"""The JSON type of a parameter whose BFCL type has no JSON equivalent."""
MAX_CALL_LENGTH = 1_000_000
"""Calls with more characters of JSON are neither executed nor checked."""
PYTHON_TYPES: Mapping[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}
"""The Python types of each JSON type; bool is checked separately because it is a subclass of int."""


def to_tools(docs: Iterable[Mapping[str, Any]], types: Mapping[str, str]) -> tuple[dict[str, Any], ...]:
    """Convert function documents to tool definitions; `types` maps BFCL's type names to JSON Schema types.

    Only types change. Dots in names, defaults, `required`, and `response` (which chat templates may ignore) are kept.
    """

    def in_json_types(schema: Mapping[str, Any]) -> dict[str, Any]:
        read = dict(schema)
        if "type" in read:
            read["type"] = types.get(read["type"], FALLBACK_TYPE)
        if isinstance(read.get("properties"), Mapping):
            read["properties"] = {name: in_json_types(part) for name, part in read["properties"].items()}
        if isinstance(read.get("items"), Mapping):
            read["items"] = in_json_types(read["items"])
        return read

    shown = [{**doc, "parameters": in_json_types(doc["parameters"])} for doc in docs]
    return tuple(read_tool(doc, f"function {doc['name']!r}") for doc in shown)


def parameter_schemas(tools: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    functions = [tool["function"] for tool in tools]
    return {function["name"]: function["parameters"].get("properties", {}) for function in functions}


def coerce_calls(parsed: ParsedResponse, tools: Mapping[str, Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """Return the calls of a response; values that its format writes as text get the types in the tools' schemas."""
    if not parsed.text_values:
        return parsed.calls
    return tuple(
        ToolCall(call.name, {name: coerce_value(value, known.get(name, {})) for name, value in call.arguments.items()})
        for call in parsed.calls
        for known in [tools.get(call.name, {})]
    )


def coerce_value(value: Any, schema: Mapping[str, Any]) -> Any:
    """Convert a value to the schema's type: 5 becomes "5" for a string, "[1]" becomes [1] for an array.

    Text that does not represent a value of the type stays text; the checker then judges it.
    """
    kind = str(schema.get("type"))
    if kind == "string":
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str) or kind not in PYTHON_TYPES:
        return value
    literal = read_literal(value)
    fits = isinstance(literal, PYTHON_TYPES[kind]) and isinstance(literal, bool) == (kind == "boolean")
    return literal if fits else value


def to_sendable(call: ToolCall) -> dict[str, Any] | None:
    """Return the call as a JSON object, or None if it is too large or cannot be represented in JSON."""
    written = {"name": call.name, "arguments": dict(call.arguments)}
    try:
        return written if len(json.dumps(written)) <= MAX_CALL_LENGTH else None
    except (TypeError, ValueError, RecursionError):
        return None


def to_record(call: ToolCall) -> dict[str, Any]:
    """Return the call as written to samples.jsonl, without its arguments if they are too large or not valid JSON."""
    return to_sendable(call) or {"name": call.name[:200], "arguments": {}}


def find_call_problem(call: ToolCall, tools: Mapping[str, Mapping[str, Any]]) -> str:
    """Return why a call cannot be executed, or an empty text. The model sees the text: do not reword it."""
    if call.name not in tools:
        return f"there is no tool named {call.name[:80]!r}"
    known = tools[call.name]
    if unknown := [name for name in call.arguments if name not in known]:
        named = ", ".join(repr(name[:80]) for name in unknown[:5])
        return f"{call.name} has no argument {named}; its arguments are {', '.join(known) or 'none'}"
    if to_sendable(call) is None:
        return f"the arguments of {call.name} are too large (more than {MAX_CALL_LENGTH:,} characters) or no JSON"
    return ""
