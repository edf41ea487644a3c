"""Checking never raises, whatever a row contains, and every row is kept, repaired or rejected."""

from __future__ import annotations

import copy
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_rl.cli.app import main
from rest_rl.data.load import load_dataset
from rest_rl.data.reasons import ALLOWABLE_REASONS
from rest_rl.data.samples import from_json, to_json
from rest_rl.data.shapes import SHAPES
from rest_rl.data.tool_world import tool_world
from rest_rl.data.write import sample_writer
from rest_rl.formats import FORMATS
from tests.made_up_rows import HISTORY, OUTPUT, QUESTION, RAW, ROWS, SYSTEM, TURNS, WEATHER

TOOLACE = {
    "system": f"Functions: {json.dumps([WEATHER])}",
    "conversations": [{"from": "user", "value": "?"}, {"from": "assistant", "value": '[get_weather(city="Oslo")]'}],
}
REQUEST = {
    "instruction": 'API-Request: ...\nAPI descriptions:\n{"name": "f", "parameters": {"x": {"type": "str"}}}\n',
    "input": "User: ?\nAPI-Request: [f(x='1')]->2\nGenerate API Request: ",
    "output": "API-Request: [f(x='3')]",
}
ROWS_OF = {
    "samples": to_json(tool_world(0, 1)[0]),
    "messages": {
        "messages": [QUESTION, {"role": "assistant", **TURNS["text arguments"]}, QUESTION],
        "tools": [WEATHER],
    },
    "toolrl": RAW,
    "toolace": TOOLACE,
    "xlam": {
        "query": "?",
        "tools": json.dumps([WEATHER]),
        "answers": '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]',
    },
    "api_bank": {"system": SYSTEM, "user": HISTORY, "answer": [{"name": "stop", "parameters": {}}]},
    "api_bank_train": REQUEST,
}
SHREDS = [
    "",
    " ",
    "{",
    "[",
    "[{",
    '{"name"',
    "<user>",
    "</think>",
    "\ud800",
    "[" * 200 + "]" * 200,
    '{"a": NaN}',
    OUTPUT,
]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(SHREDS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "name", "arguments", "parameters", "type", "properties", "required", "enum", "from"]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


CALL = {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
MORE_KEYS = [
    *("tool_calls", "function_call", "weight", "name", "role", "content", "reasoning_content", "preamble", "thought"),
    *("tools_in_prompt", "system", "id", "kind", "enum", "items", "anyOf", "nullable", "additionalProperties"),
]
MORE_VALUES: list[Any] = [
    *([CALL], ["str"], [CALL, "str"], CALL, [{}], "f()", 0, ["a"], {"a": 1}, "<tool_call>{'name': 'f'}</tool_call>"),
    *(
        "[TOOL_CALLS] [",
        "<function=f>",
        '{"name": "get_weather", "parameters": {',
        "You are a function calling AI model",
    ),
    *("# Tools\n<tools>{}</tools>", '# Tools\n<tools>[{"name": 3}]</tools>', "<think>", "assistant"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in items for deeper in places(item, (*path, key)))][1 if not path else 0 :]


def value_at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def spoiled(draw: st.DrawFn, source: str) -> Any:
    """A row of that shape with one or two of its values replaced or cut short, or given to an object without them."""
    row = copy.deepcopy(ROWS_OF[source])
    for _ in range(draw(st.integers(0, 2))):
        objects = [path for path in [(), *places(row)] if isinstance(value_at(row, path), dict)]
        key = draw(st.sampled_from(MORE_KEYS))
        value_at(row, draw(st.sampled_from(objects)))[key] = copy.deepcopy(draw(JUNK | st.sampled_from(MORE_VALUES)))
    for _ in range(draw(st.integers(0, 2))):
        *path, last = draw(st.sampled_from(places(row)))
        holder = value_at(row, tuple(path))
        old = holder[last]
        cut = draw(st.integers(0, len(old))) if isinstance(old, str) else None
        holder[last] = (
            draw(JUNK) if cut is None or draw(st.booleans()) else old[:cut] + draw(st.sampled_from(SHREDS)) + old[cut:]
        )
    return row


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("source", SHAPES)
@settings(max_examples=20)
@given(st.data())
def test_no_row_crashes_the_check(
    tmp_path_factory: pytest.TempPathFactory, source: str, named: bool, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(spoiled(source), min_size=4, max_size=8))
    folder = tmp_path_factory.mktemp("rows")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep_prompts = data.draw(st.booleans())
    config = {"source": source if named else "auto", "keep_prompts": keep_prompts}
    config["mask_names"] = 0.0 if keep_prompts else 0.5
    load_dataset(str(path), test=str(path), **config)
    samples, report = load_dataset(str(path), test=str(path), allow=ALLOWABLE_REASONS, **config)
    assert report.rows == len(rows) == report.kept + report.repaired + report.rejected
    assert len(samples) == report.samples
    assert all(located.finding.detail for located in report.findings)
    json.dumps(report.to_json()).encode()
    assert [from_json(json.loads(json.dumps(to_json(sample)))) for sample in samples] == samples
    for ending in ("jsonl", "parquet"):
        with sample_writer(folder / f"out.{ending}") as write:
            for sample in samples:
                write(sample)


@pytest.mark.parametrize("source", SHAPES)
@settings(max_examples=10)
@given(st.data())
def test_no_row_crashes_a_command(tmp_path_factory: pytest.TempPathFactory, source: str, data: st.DataObject) -> None:
    """Each ends with a status, whatever the rows and options; an error is one line."""
    folder = tmp_path_factory.mktemp("rows")
    for name in ("rows", "test"):
        rows = data.draw(st.lists(spoiled(source), min_size=2, max_size=5))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"--mask-names": ["1.0", "0.5"], "--allow": ["unknown_tool", "duplicate"], "--source": ["auto", source]}
    chosen = [
        part for key in options if data.draw(st.booleans()) for part in (key, data.draw(st.sampled_from(options[key])))
    ]
    chosen += ["--keep-prompts"] if data.draw(st.booleans()) else []
    path = str(folder / "rows.jsonl")
    test = ["--test", str(folder / "test.jsonl")]
    for command in (
        ["check", path, "--json", *test],
        ["check", path, "--max-prompt-tokens", "1"],
        ["convert", path, "--out", str(folder / "out.parquet"), *test],
        ["show", path, "1", "--format", data.draw(st.sampled_from(["auto", *FORMATS]))],
        ["split", path, "--test", "0.5", "--out", str(folder / "split")],
    ):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
            status = main(["data", *command, *chosen])
        told = errors.getvalue()
        assert status == (2 if told else 0)
        assert not told or (told.startswith("error: ") and told.count("\n") == 1)


def test_rows_are_valid_before_they_are_corrupted(tmp_path: Path) -> None:
    for source, row in ROWS_OF.items():
        path = tmp_path / f"{source}.jsonl"
        path.write_text(json.dumps(row))
        _, report = load_dataset(str(path))
        assert (report.sources, report.rejected) == ({source: 1}, 0), (source, report.findings)
    assert set(ROWS_OF) == set(SHAPES)
    assert ROWS["raw"] == RAW
