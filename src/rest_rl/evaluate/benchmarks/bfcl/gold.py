"""Build one acceptable answer per single-turn BFCL sample. The oracle returns these answers and must score 100 %.

The published answers list alternatives per argument; the alternative "" means that the argument may be omitted. The
arguments of Java and JavaScript functions are strings that contain literals of these languages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rest_rl.evaluate.benchmarks.bfcl.groups import RELEVANCE, UNANSWERED
from rest_rl.response import Gold, ToolCall

LiteralWriter = Callable[[Any, Mapping[str, Any]], Any]
"""Writes a value in a programming language, given the schema of its argument."""
DONE_GOLD = Gold((), "Done.")
"""The oracle's response at the end of a turn."""
NO_TOOL_GOLD = Gold((), "None of the tools can do this.")
OMITTED = ""
"""The alternative that marks an optional argument."""
JAVA_CLASSES = {"integer": "int", "any": "Object"}
"""The Java names of types in the published function documents."""
PLAUSIBLE: Mapping[str, Any] = {"integer": 1, "float": 1.0, "boolean": True, "array": [], "tuple": [], "dict": {}}
"""An example value per published type; other types get a text."""


def build_gold(entry: Mapping[str, Any]) -> Gold:
    """Return an acceptable answer to `entry`, a single-turn sample from `Sandbox.entries`."""
    category: str = entry["category"]
    if category in UNANSWERED:
        return NO_TOOL_GOLD
    if category == RELEVANCE:
        return Gold((plausible_call(entry["checked"][0]),))
    literal = select_literal_writer(category)
    docs = {doc["name"]: doc for doc in entry["checked"]}
    calls = []
    for answer in entry["ground_truth"]:
        for name, alternatives in answer.items():
            # if there is one function, the checker takes the name from its document; v3's simple_363 has another there
            doc = docs.get(name, entry["checked"][0])
            calls.append(ToolCall(doc["name"], choose_arguments(alternatives, doc["parameters"], literal)))
    return Gold(tuple(calls))


def plausible_call(doc: Mapping[str, Any]) -> ToolCall:
    """Return a call of the function that `doc` describes, with an example value for every required argument."""
    parameters = doc["parameters"]
    kinds = {name: parameters["properties"].get(name, {}).get("type") for name in parameters.get("required", [])}
    return ToolCall(doc["name"], {name: PLAUSIBLE.get(kind, "text") for name, kind in kinds.items()})


def choose_arguments(
    alternatives: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any], literal: LiteralWriter
) -> dict[str, Any]:
    """Choose the first alternative of each argument and write it with `literal`; omit arguments that may be omitted."""
    chosen: dict[str, Any] = {}
    for name, choices in alternatives.items():
        may_be_omitted = OMITTED in choices and name not in parameters.get("required", [])
        if choices and not may_be_omitted:
            chosen[name] = literal(choose_value(first_given(choices)), parameters["properties"].get(name, {}))
    return chosen


def first_given(choices: Sequence[Any]) -> Any:
    return next((choice for choice in choices if choice != OMITTED), OMITTED)


def choose_value(value: Any) -> Any:
    """Choose the first alternative of every field of an object, or of the objects in a list; omit optional fields.

    Only these fields list alternatives. The checker compares the values nested in them literally.
    """
    if isinstance(value, list):
        return [choose_value(item) if isinstance(item, Mapping) else item for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: first_given(choices) if isinstance(choices, list) else choices
        for key, choices in value.items()
        if not isinstance(choices, list) or OMITTED not in choices
    }


def select_literal_writer(category: str) -> LiteralWriter:
    """Return the function that writes argument values as literals of the category's programming language."""
    if category.endswith("javascript"):
        return javascript_literal
    return java_literal if category.endswith("java") else lambda value, schema: value


def java_literal(value: Any, schema: Mapping[str, Any]) -> str:
    """Write a value as a Java literal of the type in `schema`. Text stays unquoted, as in the published answers.

    >>> java_literal([101, 202], {"type": "ArrayList", "items": {"type": "long"}})
    'new ArrayList<>(Arrays.asList(101L, 202L))'
    """
    kind = schema.get("type")
    items = schema.get("items", {}).get("type", "any")
    if isinstance(value, Mapping):
        puts = " ".join(f'put("{key}", {_java_element(item, "any")});' for key, item in value.items())
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    if isinstance(value, list) and kind == "ArrayList":
        return f"new ArrayList<>(Arrays.asList({', '.join(_java_element(item, items) for item in value)}))"
    if isinstance(value, list):
        # upstream removes the quotes from the strings of an ArrayList, but not from those of an array
        elements = ", ".join(item if isinstance(item, str) else _java_element(item, items) for item in value)
        return f"new {JAVA_CLASSES.get(items, items)}[]{{{elements}}}"
    return value if isinstance(value, str) else _java_element(value, kind)


def _java_element(value: Any, kind: str | None) -> str:
    if isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    return f"{value}{ {'long': 'L', 'float': 'f'}.get(kind or '', '') }"


def javascript_literal(value: Any, schema: Mapping[str, Any]) -> str:
    """Write a value as a JavaScript literal, by its type in `schema`. Text stays unquoted, as in published answers."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) + ("n" if schema.get("type") == "Bigint" else "")
