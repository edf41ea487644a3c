"""Tool schemas and types as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rest_rl.data.tool_schemas import json_type, read_tools
from tests.made_up_rows import ASKED, read


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
def test_a_tool_schema_that_is_no_schema(tmp_path: Path, tools: Any) -> None:
    turns = [ASKED, {"role": "assistant", "content": "y"}]
    samples, report = read(tmp_path, {"messages": turns}, {"messages": turns, "tools": tools})
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
def test_types_as_people_write_them(text: str, schema: dict[str, Any]) -> None:
    assert json_type(text) == schema


def test_a_type_that_json_lacks_is_said_in_words() -> None:
    (tool,) = read_tools([{"name": "f", "parameters": {"g": {"type": "Callable", "description": "a function"}}}])
    assert tool["function"]["parameters"]["properties"]["g"] == {"description": "a function (Callable)"}
