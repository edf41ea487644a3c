"""The gold of a sample against the tools of its prompt: what no answer could match, and what is stored as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from rest_rl.data.json_text import load_json, read_literal
from rest_rl.data.reasons import Finding, finding
from rest_rl.data.samples import ToolSample
from rest_rl.response import Gold, ToolCall

_OTHER_KEYS = {
    "patternProperties", "propertyNames", "unevaluatedProperties", "dependentSchemas",
    "anyOf", "oneOf", "allOf", "if", "then", "else", "$ref", "$dynamicRef",
}  # fmt: skip
"""Words of JSON schema that may allow arguments beside `properties`."""
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
"""What a tool without parameters takes."""
_PYTHON_WORDS = {"True": True, "False": False}


def checked_gold(sample: ToolSample, keep: Iterable[str]) -> tuple[ToolSample, list[Finding]]:
    """The sample, its values of the schema's types where text spelt them exactly, and what was found.

    Reasons in `keep` are noted and change nothing.
    """
    if not sample.gold.calls:
        problems = [] if sample.gold.answer else [finding("empty_turn", "got neither calls nor text", sample.id, keep)]
        return sample, problems
    functions = map(_function, sample.tools)
    schemas = {function["name"]: function.get("parameters", _NO_ARGUMENTS) or {} for function in functions}
    found: list[Finding] = []
    calls = []
    for call in sample.gold.calls:
        if call.name not in schemas:
            offered = ", ".join(schemas) or "none"
            found.append(finding("unknown_tool", f"got {call.name!r}, offered are {offered}", sample.id, keep))
            calls.append(call)
            continue
        arguments, problems = _checked_arguments(call, schemas[call.name], frozenset(keep))
        found += [finding(reason, f"{call.name}: {detail}", sample.id, keep) for reason, detail in problems]
        calls.append(ToolCall(call.name, arguments))
    return replace(sample, gold=Gold(tuple(calls), sample.gold.answer)), found


def with_repaired_history(sample: ToolSample, repaired: Mapping[int, Gold]) -> ToolSample:
    """The sample with the repaired golds of earlier turns, by their position, in its history too.

    Otherwise its prompt would show calls in the form that was repaired.
    """
    changed = {
        at: _with_calls_of(sample.messages[at], gold) for at, gold in repaired.items() if at < len(sample.messages)
    }
    messages = tuple(changed.get(at, message) for at, message in enumerate(sample.messages))
    return replace(sample, messages=messages) if changed else sample


def _with_calls_of(message: Mapping[str, Any], gold: Gold) -> dict[str, Any]:
    pairs = zip(message["tool_calls"], gold.calls, strict=True)
    calls = [{**call, "function": {"name": new.name, "arguments": dict(new.arguments)}} for call, new in pairs]
    return {**message, "tool_calls": calls}


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return tool.get("function", tool)


def _checked_arguments(
    call: ToolCall, schema: Mapping[str, Any], keep: frozenset[str]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    problems: list[tuple[str, str]] = []
    arguments = dict(call.arguments)
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        for name, value in arguments.items():
            if name in properties:
                arguments[name], problem = _checked_value(value, properties[name], name, keep)
                problems += problem
            elif schema.get("additionalProperties") in (None, False) and not _OTHER_KEYS & set(schema):
                known = ", ".join(properties) or "none"
                problems.append(("undocumented_argument", f"got {name!r}, documented are {known}"))
    problems += [
        ("missing_argument", f"got no {name!r}, which is required")
        for name in _list(schema.get("required"))
        if name not in arguments
    ]
    if not all(map(_is_finite, arguments.values())):
        problems.append(("not_a_number", "got NaN or an infinity as a value"))
    return arguments, problems


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _checked_value(value: Any, schema: Any, name: str, keep: frozenset[str]) -> tuple[Any, list[tuple[str, str]]]:
    schema = schema if isinstance(schema, Mapping) else {}
    if _has_type(value, schema) or value in _list(schema.get("enum")):
        return value, list(_outside_enum(value, schema, name))
    shown = f"got {name} = {value!r:.80}, the schema says {schema.get('type')}"
    spelt = _spelt(value) if isinstance(value, str) else None
    if spelt is None or not _has_type(spelt, schema):
        return value, [("broken_value" if _is_fragment(value, spelt) else "wrong_type", shown)]
    reason = "json_as_string" if isinstance(spelt, (list, dict)) else "number_as_string"
    return (value if reason in keep else spelt), [(reason, shown), *_outside_enum(spelt, schema, name)]


def _outside_enum(value: Any, schema: Mapping[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """For a value, and each one inside it, that its enum does not have; null is left out and fits every schema."""
    enum, items, properties = (schema.get(key) for key in ("enum", "items", "properties"))
    if value is not None and isinstance(enum, list) and enum and value not in enum:
        yield "not_in_enum", f"got {name} = {value!r:.80}, the enum has {', '.join(map(str, enum))}"
    if isinstance(value, (list, tuple)) and isinstance(items, Mapping):
        for number, item in enumerate(value):
            yield from _outside_enum(item, items, f"{name}[{number}]")
    if isinstance(value, Mapping) and isinstance(properties, Mapping):
        for key in value:
            if isinstance(properties.get(key), Mapping):
                yield from _outside_enum(value[key], properties[key], f"{name}.{key}")


def _spelt(text: str) -> Any:
    """The number, boolean, array or object that a text spells, with no white space around it; None for another.

    Arrays and objects may be written as Python's.
    """
    if text in _PYTHON_WORDS:
        return _PYTHON_WORDS[text]
    try:
        value = load_json(text) if text == text.strip() else None
    except ValueError:
        value = read_literal(text) if text.startswith(("[", "{", "(")) else None
    return None if isinstance(value, str) or not _is_finite(value) else value


def _is_fragment(value: Any, spelt: Any) -> bool:
    """Whether a value is text that begins as an array or object and does not end as one."""
    return isinstance(value, str) and spelt is None and value.lstrip().startswith(("[", "{"))


def _has_type(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value has one of the schema's types; a schema without types takes all, and so does null."""
    names = schema.get("type")
    names = [names] if isinstance(names, str) else names
    if not names or value is None:
        return True
    return any(_is(value, name) for name in names)


def _is(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (name == "number" or isinstance(value, int) or value.is_integer())
    kinds: dict[str, type | tuple[type, ...]] = {
        "string": str, "boolean": bool, "array": (list, tuple), "object": Mapping, "null": type(None)
    }  # fmt: skip
    return isinstance(value, kinds[name]) if name in kinds else True


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, (list, tuple)) else True
