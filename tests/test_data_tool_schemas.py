"""Tool schemas and types in informal spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_rl.data.schemas import json_type, read_tools
from tests.made_up_rows import QUESTION, load_rows


@pytest.mark.parametrize(
    "tools",
    [
        "[{",
        "get_weather",
        [3],
        [{"description": "nameless"}],
        [{"name": "f", "parameters": "city"}],
        [{"name": "f", "parameters": ["city"]}],
        [{"name": "f", "parameters": {"type": "object", "properties": ["city"]}}],
        [{"name": "f", "parameters": {"type": "object", "properties": {"city": "string"}}}],
        [{"name": "f", "parameters": {"city": "string"}}],
        [{"name": "f", "parameters": {"type": 3, "properties": {}}}],
        [{"name": "f", "parameters": {"type": "object", "properties": {}, "required": "city"}}],
        [{"name": "f", "parameters": {"type": "object", "properties": {"c": {"enum": "ab"}}}}],
    ],
)
def test_invalid_tool_schemas(tmp_path: Path, tools: Any) -> None:
    turns = [QUESTION, {"role": "assistant", "content": "y"}]
    samples, report = load_rows(tmp_path, {"messages": turns}, {"messages": turns, "tools": tools})
    assert (len(samples), report.kept, report.reasons) == (1, 1, {"bad_tool_schema": 1})
    assert report.findings[0].row == 2


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("str", {"type": "string"}),
        ("int, optional", {"type": "integer"}),
        ("List[List[float]]", {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
        ("list(str)", {"type": "array", "items": {"type": "string"}}),
        ("Tuple[float, float]", {"type": "array", "items": {"type": "number"}}),
        ("List[Union[int, float]]", {"type": "array", "items": {"type": "number"}}),
        ("Union[str, int]", {"type": ["string", "integer"]}),
        ("Optional[bool]", {"type": "boolean"}),
        ("Dict[str, int]", {"type": "object"}),
        ("['string', 'null']", {"type": ["string", "null"]}),
        ("Callable[[float], float]", {}),
        ("any", {}),
        ("", {}),
    ],
)
def test_informal_types(text: str, schema: dict[str, Any]) -> None:
    assert json_type(text) == schema


def test_an_unknown_type_moves_into_the_description() -> None:
    (tool,) = read_tools([{"name": "f", "parameters": {"g": {"type": "Callable", "description": "a function"}}}])
    assert tool["function"]["parameters"]["properties"]["g"] == {"description": "a function (Callable)"}


ARRAY = {"type": "array", "items": {"type": "string"}, "description": "names"}
ENUM = {"description": "kind", "enum": ["b", "a"], "type": ["string", "null"], "default": None}


@pytest.mark.parametrize(
    "function",
    [
        {"name": "f", "parameters": {"type": "object", "properties": {"a": ARRAY, "k": ENUM}, "required": ["a"]}},
        {"parameters": {"required": [], "properties": {"o": {"items": ARRAY, "type": "array"}}}, "name": "f"},
        {"description": "d", "name": "f", "strict": None},
        {"name": "f", "description": "", "strict": True, "parameters": {}},
        {"name": "f", "parameters": {"$defs": {"x": {"type": "int"}}, "type": "object", "additionalProperties": False}},
    ],
)
def test_a_valid_schema_is_unchanged(function: dict[str, Any]) -> None:
    written = json.dumps({"type": "function", "function": function})
    assert json.dumps(read_tools([json.loads(written)])[0]) == written
    assert json.dumps(read_tools([function])[0]) == written
    assert json.dumps(read_tools([{"type": "function", **function}])[0]) == written
    turned = {"function": function, "type": "function", "cache": 1}
    assert json.dumps(read_tools([turned])[0]) == json.dumps(turned)


def test_conversion_keeps_the_order_of_keys() -> None:
    """Only the words for types change, and the place where a list of required names stands."""
    given = {"input_schema": {"properties": {"a": {"items": {"type": "int"}, "type": "list"}}, "type": "dict"}}
    read_one = read_tools([{**given, "name": "f", "required": ["a"], "description": None}])[0]["function"]
    properties = {"a": {"items": {"type": "integer"}, "type": "array"}}
    parameters = {"properties": properties, "type": "object", "required": ["a"]}
    assert json.dumps(read_one) == json.dumps({"parameters": parameters, "name": "f", "description": ""})
