"""One acceptable answer per sample of BFCL, as an oracle gives it: what proves that the whole path can score 100 %.

The published answers list alternatives per argument; an alternative "" means that the argument may be left out. The
arguments of Java and JavaScript functions are asked for, and checked, as literals of these languages in strings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rest_rl.evaluate.benchmarks.bfcl.groups import RELEVANCE, UNANSWERED
from rest_rl.response import Gold, ToolCall

LiteralWriter = Callable[[Any, Mapping[str, Any]], Any]
"""How a language writes a value, given the schema of its argument."""
DONE_GOLD = Gold((), "Done.")
"""How an oracle ends a turn."""
NO_TOOL_GOLD = Gold((), "None of the tools can do this.")
OMITTED = ""
"""The alternative of an argument that may be left out."""
JAVA_CLASSES = {"integer": "int", "any": "Object"}
"""Types of the published functions that Java calls something else."""
PLAUSIBLE: Mapping[str, Any] = {"integer": 1, "float": 1.0, "boolean": True, "array": [], "tuple": [], "dict": {}}
"""A value of each published type; any other is text."""


def build_gold(entry: Mapping[str, Any]) -> Gold:
    """An acceptable answer to a single-turn sample, as the sandbox lists it."""
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
            # of a lone function the checker takes the name from its document, and v3's simple_363 has another
            doc = docs.get(name, entry["checked"][0])
            calls.append(ToolCall(doc["name"], choose_arguments(alternatives, doc["parameters"], literal)))
    return Gold(tuple(calls))


def plausible_call(doc: Mapping[str, Any]) -> ToolCall:
    """A call with a value for every required argument."""
    parameters = doc["parameters"]
    kinds = {name: parameters["properties"].get(name, {}).get("type") for name in parameters.get("required", [])}
    return ToolCall(doc["name"], {name: PLAUSIBLE.get(kind, "text") for name, kind in kinds.items()})


def choose_arguments(
    alternatives: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any], literal: LiteralWriter
) -> dict[str, Any]:
    """One value per argument: the first alternative; nothing for what may be left out and is not required."""
    chosen: dict[str, Any] = {}
    for name, choices in alternatives.items():
        may_be_omitted = OMITTED in choices and name not in parameters.get("required", [])
        if choices and not may_be_omitted:
            chosen[name] = literal(choose_value(first_given(choices)), parameters["properties"].get(name, {}))
    return chosen


def first_given(choices: Sequence[Any]) -> Any:
    return next((choice for choice in choices if choice != OMITTED), OMITTED)


def choose_value(value: Any) -> Any:
    """An alternative with its own alternatives settled: those of an object's values, also in a list of objects.

    They go one level deep: the checker compares what lies further inside as it stands.
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
    """How a category writes a value of an argument, given the argument's published schema."""
    if category.endswith("javascript"):
        return javascript_literal
    return java_literal if category.endswith("java") else lambda value, schema: value


def java_literal(value: Any, schema: Mapping[str, Any]) -> str:
    """A value as Java source, by the type of its argument; text is left bare, as the answers have it.

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
        # upstream takes the quotes off the strings of an ArrayList and leaves them on those of an array
        elements = ", ".join(item if isinstance(item, str) else _java_element(item, items) for item in value)
        return f"new {JAVA_CLASSES.get(items, items)}[]{{{elements}}}"
    return value if isinstance(value, str) else _java_element(value, kind)


def _java_element(value: Any, kind: str | None) -> str:
    if isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    return f"{value}{ {'long': 'L', 'float': 'f'}.get(kind or '', '') }"


def javascript_literal(value: Any, schema: Mapping[str, Any]) -> str:
    """A value as JavaScript source, by the type of its argument; text is left bare, as the answers have it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) + ("n" if schema.get("type") == "Bigint" else "")
