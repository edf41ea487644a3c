"""System texts that describe tools: removed if they are in Hermes' or Qwen's form, otherwise noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_rl.data.shapes.chat import split_tool_text
from tests.made_up_rows import ARGUMENTS, CALL, QUESTION, WEATHER, WRAPPED, load_rows

CALLED = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
SHOWN = '<tool_call>\n{"arguments": <args-dict>, "name": <function-name>}\n</tool_call>'
HERMES = (
    "You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML tags. "
    f"Here are the tools: <tools> {json.dumps([WRAPPED])} </tools>. For each function call return an object:\n{SHOWN}\n"
)
LAST = (
    "You are a function calling AI model. You are provided with signatures within <tools></tools> XML tags.\n"
    f"{SHOWN}\nHere are the available tools:\n<tools> {json.dumps(WRAPPED)} </tools>"
)
QWEN = f"Speak Latin.\n\n# Tools\n\nYou may call functions.\n<tools>\n{json.dumps(WRAPPED)}\n</tools>\n\nSo:\n{SHOWN}"
OWN = f"My own words: <tools>{json.dumps([WEATHER])}</tools>"


def row(system: str, **more: Any) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "system", "value": system},
            {"from": "human", "value": "Weather in Oslo?"},
            {"from": "gpt", "value": CALLED},
        ],
        **more,
    }


@pytest.mark.parametrize("column", [{"tools": json.dumps([WRAPPED])}, {}])
@pytest.mark.parametrize(
    ("system", "rest"), [(HERMES, ""), (LAST, ""), (QWEN, "Speak Latin."), (f"{HERMES}\nBe brief.", "Be brief.")]
)
def test_the_tools_are_described_once(tmp_path: Path, system: str, rest: str, column: dict[str, Any]) -> None:
    (sample,), report = load_rows(tmp_path, row(system, **column))
    said = ({"role": "system", "content": rest},) if rest else ()
    assert (sample.messages, sample.tools, sample.tools_in_prompt) == ((*said, QUESTION), (WRAPPED,), False)
    assert sample.gold.calls == (CALL,)
    assert (report.repaired, report.reasons) == (1, {"call_as_text": 1, "tools_in_system": 1})


@pytest.mark.parametrize("column", [{"tools": json.dumps([WRAPPED])}, {}])
def test_a_kept_prompt_describes_its_tools(tmp_path: Path, column: dict[str, Any]) -> None:
    (sample,), report = load_rows(tmp_path, row(HERMES, **column), keep_prompts=True)
    assert sample.messages[0] == {"role": "system", "content": HERMES}
    assert (sample.tools, sample.tools_in_prompt, report.reasons) == ((WRAPPED,), True, {"call_as_text": 1})


def test_an_unknown_tool_description_stays_and_is_noted(tmp_path: Path) -> None:
    (sample,), report = load_rows(tmp_path, row(OWN, tools=[WEATHER]))
    assert sample.messages[0]["content"] == OWN
    assert report.reasons == {"call_as_text": 1, "tools_twice": 1}


@pytest.mark.parametrize(
    "text", ["Be brief.", "Tags such as <tools></tools>.", "<tools>[1, 2]</tools>", "# Tools\nnone"]
)
def test_other_system_texts_stay(tmp_path: Path, text: str) -> None:
    assert split_tool_text(text) == (text, None)
    turns = {"messages": [{"role": "system", "content": text}, QUESTION, {"role": "assistant", "content": "y"}]}
    (sample,), report = load_rows(tmp_path, {**turns, "tools": [WEATHER]})
    assert (sample.messages[0]["content"], report.reasons) == (text, {})
