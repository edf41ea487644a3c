"""Check the gold calls of a sample against the schemas of its tools, and repair values that are stored as text.

Types, enums and required arguments are checked here and not by jsonschema, because in a call a null means an omitted
argument and a quoted number can be repaired. Violations of other keywords, found by jsonschema, are only noted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from rest_rl.data.reading import load_json, read_literal
from rest_rl.data.reasons import RowFinding, make_finding
from rest_rl.data.samples import ToolSample, to_message_call
from rest_rl.response import Gold, ToolCall

# Keywords that may allow arguments that `properties` does not list.
_EXTRA_ARGUMENT_KEYWORDS = {
    "patternProperties", "propertyNames", "unevaluatedProperties", "dependentSchemas",
    "anyOf", "oneOf", "allOf", "if", "then", "else", "$ref", "$dynamicRef",
}  # fmt: skip
# Keywords that jsonschema checks.
_VALIDATOR_KEYWORDS = {
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const", "not",
    "minLength", "maxLength", "minItems", "maxItems", "uniqueItems", "prefixItems", "contains",
    "minProperties", "maxProperties", "dependentRequired", "anyOf", "oneOf", "allOf", "if", "$ref",
}  # fmt: skip
# Keywords that are not checked, because a regular expression from a data set may backtrack without end.
_SKIPPED_KEYWORDS = ("pattern", "patternProperties", "$dynamicRef")
# Schemas with more references are not checked: a chain in which each refers to the next twice takes 2^n steps.
_MAX_REFERENCES = 32
# Schema of a tool without parameters.
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
_PYTHON_WORDS = {"True": True, "False": False}
_PYTHON_TYPES: dict[str, Any] = {
    "string": str, "boolean": bool, "array": (list, tuple), "object": Mapping, "null": type(None)
}  # fmt: skip
Problems = Iterator[tuple[str, str]]


def check_against_tools(sample: ToolSample, allow: Collection[str] = ()) -> tuple[ToolSample, list[RowFinding]]:
    """Check the gold calls against the schemas of the tools; return the repaired sample and the findings.

    Text such as "5" becomes a value of the schema's type, such as 5. Findings with a reason in `allow` are only noted.
    """
    # Two tools with one name are a problem only if they differ. If the gold calls neither, this is only noted.
    functions = [tool.get("function", tool) for tool in sample.tools]
    by_name: dict[str, Any] = {}
    twice = {each["name"] for each in functions if by_name.setdefault(each["name"], each) != each}
    uncalled = twice - {call.name for call in sample.gold.calls}  # the gold does not depend on which one is meant
    found = [
        make_finding(
            "duplicate_tool",
            f"two different tools have the name {name!r}",
            sample.id,
            ("duplicate_tool",) if name in uncalled else allow,
        )
        for name in sorted(twice)
    ]
    if not sample.gold.calls:
        is_empty = not sample.gold.answer
        found += (
            [make_finding("empty_turn", "the turn has neither calls nor text", sample.id, allow)] if is_empty else []
        )
        return sample, found
    schemas = {function["name"]: function.get("parameters", _NO_ARGUMENTS) or {} for function in functions}
    calls = []
    for call in sample.gold.calls:
        if call.name not in schemas:
            detail = f"{call.name!r} is not offered; offered tools: {', '.join(schemas) or 'none'}"
            found.append(make_finding("unknown_tool", detail, sample.id, allow))
        if call.name not in schemas or (call.name in twice and "duplicate_tool" not in allow):
            calls.append(call)
            continue
        arguments = dict(call.arguments)
        problems = list(_repair_arguments(arguments, schemas[call.name], allow))
        found += [make_finding(reason, f"{call.name}: {detail}", sample.id, allow) for reason, detail in problems]
        calls.append(ToolCall(call.name, arguments))
    return replace(sample, gold=Gold(tuple(calls), sample.gold.answer)), found


def repair_history(sample: ToolSample, repaired: Mapping[int, Gold]) -> ToolSample:
    """Return the sample with earlier turns of its history replaced by their repaired gold turns.

    An earlier turn may also be the gold turn of another sample, in which its calls were repaired. The history must
    then show the repaired calls, too. `repaired` maps indices in `sample.messages` to gold turns.
    """
    messages = list(sample.messages)
    for at, gold in repaired.items():
        if at < len(messages):
            pairs = zip(messages[at]["tool_calls"], gold.calls, strict=True)
            messages[at] = {**messages[at], "tool_calls": [{**old, **to_message_call(new)} for old, new in pairs]}
    return replace(sample, messages=tuple(messages)) if repaired else sample


# Repairs `arguments` in place and yields (reason, detail) for everything wrong. Each argument is checked with its own
# schema first. Then come the names of missing and undocumented arguments, and jsonschema last, so that it sees the
# repaired values. At most one finding of jsonschema is reported.
def _repair_arguments(arguments: dict[str, Any], schema: Mapping[str, Any], allow: Collection[str]) -> Problems:
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        for name, value in arguments.items():
            if name in properties:
                arguments[name], problems = _repair_value(value, properties[name], name, allow)
                yield from problems
            elif schema.get("additionalProperties") in (None, False) and not _EXTRA_ARGUMENT_KEYWORDS & set(schema):
                yield (
                    "undocumented_argument",
                    f"{name!r} is not in the schema; documented arguments: {', '.join(properties) or 'none'}",
                )
    for name in _as_list(schema.get("required")):
        if name not in arguments:
            yield "missing_argument", f"the required argument {name!r} is missing"
    if not all(map(_is_finite, arguments.values())):
        yield "not_a_number", "a value is NaN or an infinity"
    yield from _validate_rest(arguments, schema)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# (value, problems). Text is repaired only if it spells a value of the schema's type exactly: "3" for an integer, but
# not " 3" or "three". Text that begins like an array or object and cannot be parsed is a broken value; any other
# mismatch is only a wrong type. A value that the enum contains is right whatever its type.
def _repair_value(value: Any, schema: Any, name: str, allow: Collection[str]) -> tuple[Any, list[tuple[str, str]]]:
    schema = schema if isinstance(schema, Mapping) else {}
    if _has_type(value, schema) or value in _as_list(schema.get("enum")):
        return value, list(_check_enum(value, schema, name))
    shown = f"{name} is {value!r:.80}, but its type in the schema is {schema.get('type')}"
    spelt = _parse_spelled_value(value) if isinstance(value, str) else None
    if spelt is None or not _has_type(spelt, schema):
        is_fragment = isinstance(value, str) and spelt is None and value.lstrip().startswith(("[", "{"))
        return value, [("broken_value" if is_fragment else "wrong_type", shown)]
    reason = "json_as_string" if isinstance(spelt, list | dict) else "number_as_string"
    return value if reason in allow else spelt, [(reason, shown), *_check_enum(spelt, schema, name)]


def _has_type(value: Any, schema: Mapping[str, Any]) -> bool:
    # A schema without types accepts everything; null fits every schema because it means an omitted argument.
    names = schema.get("type")
    names = [names] if isinstance(names, str) else names
    return not names or value is None or any(_is_of_type(value, name) for name in names)


def _is_of_type(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (name == "number" or isinstance(value, int) or value.is_integer())
    return isinstance(value, _PYTHON_TYPES[name]) if name in _PYTHON_TYPES else True


def _check_enum(value: Any, schema: Mapping[str, Any], name: str) -> Problems:
    enum, items, properties = (schema.get(key) for key in ("enum", "items", "properties"))
    if value is not None and isinstance(enum, list) and enum and value not in enum:
        yield "not_in_enum", f"{name} is {value!r:.80}, but its enum allows only {', '.join(map(repr, enum))}"
    if isinstance(value, list | tuple) and isinstance(items, Mapping):
        for number, item in enumerate(value):
            yield from _check_enum(item, items, f"{name}[{number}]")
    if isinstance(value, Mapping) and isinstance(properties, Mapping):
        for key in value:
            if isinstance(properties.get(key), Mapping):
                yield from _check_enum(value[key], properties[key], f"{name}.{key}")


def _parse_spelled_value(text: str) -> Any:
    # The number, boolean, array or object that the text spells without surrounding white space, otherwise None. Python
    # spellings of booleans, lists, tuples and dicts count too.
    if text in _PYTHON_WORDS:
        return _PYTHON_WORDS[text]
    try:
        value = load_json(text) if text == text.strip() else None
    except ValueError:
        value = read_literal(text) if text.startswith(("[", "{", "(")) else None
    return None if isinstance(value, str) or not _is_finite(value) else value


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list | tuple) else True


def _validate_rest(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> Problems:
    # Building a validator takes far longer than the checks above, so schemas without its keywords skip it.
    words = list(_iter_keywords(schema))
    if _VALIDATOR_KEYWORDS.isdisjoint(words) or words.count("$ref") > _MAX_REFERENCES:
        return
    from referencing import Registry

    given = {name: value for name, value in arguments.items() if value is not None}
    # Keywords already checked above, for the arguments as a whole (path length 0) and for a single argument (1).
    told_above = {0: ("required", "additionalProperties"), 1: ("type", "enum")}
    try:
        validator = _validator_class()(schema, registry=Registry())  # an empty registry never fetches a reference
        errors = (e for e in validator.iter_errors(given) if e.validator not in told_above.get(len(e.path), ()))
        error = next(errors, None)
    except Exception:  # schemas of a data set may contain anything, and jsonschema raises accordingly
        return
    if error is not None:
        yield "breaks_schema", f"{error.json_path}: {error.message}"


@cache
def _validator_class() -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import create

    checks = {word: check for word, check in Draft202012Validator.VALIDATORS.items() if word not in _SKIPPED_KEYWORDS}
    return create(Draft202012Validator.META_SCHEMA, checks)


def _iter_keywords(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            yield key
            yield from _iter_keywords(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _iter_keywords(item)
