"""Fabricated rows of every supported shape, and helpers that load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rest_rl.data.check import DataReport
from rest_rl.data.load import load_dataset
from rest_rl.data.samples import ToolSample
from rest_rl.response import ToolCall

WEATHER = {
    "name": "get_weather",
    "description": "The weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
WRAPPED = {"type": "function", "function": WEATHER}
CALL = ToolCall("get_weather", {"city": "Oslo", "days": 2})
QUESTION = {"role": "user", "content": "Weather in Oslo?"}
ARGUMENTS = '{"city": "Oslo", "days": 2}'


def load_rows(tmp_path: Path, *rows: Any, **settings: Any) -> tuple[list[ToolSample], DataReport]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return load_dataset(str(path), **settings)


def load_one(tmp_path: Path, row: Any, **settings: Any) -> ToolSample:
    (sample,), report = load_rows(tmp_path, row, **settings)
    assert report.reasons == {}
    assert sum(report.sources.values()) == 1
    return sample


TURNS = {
    "text arguments": {"tool_calls": [{"function": {"name": "get_weather", "arguments": ARGUMENTS}}]},
    "object arguments": {"tool_calls": [{"function": {"name": "get_weather", "arguments": json.loads(ARGUMENTS)}}]},
    "bare calls": {"tool_calls": [{"name": "get_weather", "arguments": json.loads(ARGUMENTS)}]},
    "calls as text": {"tool_calls": json.dumps([{"name": "get_weather", "parameters": json.loads(ARGUMENTS)}])},
    "one call": {"tool_calls": {"name": "get_weather", "arguments": ARGUMENTS}},
    "function_call": {"content": None, "function_call": {"name": "get_weather", "arguments": ARGUMENTS}},
    "hermes": {"content": f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'},
}

SYSTEM = """You are a helpful assistant.

**Available Tools**
In your response, you can use the following tools:
1. Name: get weather
Description: The weather
of a city
Parameters: {"city": {"type": "string", "default": ""}, "days": {"type": "int, optional", "default": ""}}
2. Name: stop
Description: Stop
Parameters: {}

**Steps for Each Turn**
1. **Think:** ..."""
HISTORY = """**Dialogue Records History**
<user> Hello </user>

<think> greet </think>
<response> Hi </response>

<user> Oslo? </user>

<think> call </think>
<tool_call>
{"name": "get weather", "parameters": {"city": "Oslo"}}
{"name": "stop", "parameters": {}}
</tool_call>
<obs> [{"name": "get weather", "results": {"sky": "grey"}}, {"name": "stop", "results": "ok"}] </obs>
"""
OUTPUT = """<think> I could write <tool_call> {"name": "stop", "parameters": {}} </tool_call> here. </think>
<tool_call>
{"name": "get weather", "parameters": {"city": "Rome"}}
</tool_call>"""
RAW = {"instruction": SYSTEM, "input": HISTORY, "output": OUTPUT}
ROWS = {
    "raw": RAW,
    "parquet": {
        "data_source": "rlla",
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": HISTORY}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": OUTPUT},
        "extra_info": {"split": "train", "index": 0, "instruction": SYSTEM, "input": HISTORY, "output": OUTPUT},
    },
}
