"""Your own row shapes: the example of the docs, from Python and the command line, and shapes that misbehave."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rest_rl.cli.app import main
from rest_rl.cli.data import SHAPES as NAMED
from rest_rl.data.load import check_data, load_dataset
from rest_rl.data.samples import Dialogue, ToolSample
from rest_rl.data.shapes import SHAPES, RowRejectedError, get_shapes
from rest_rl.errors import UserError
from rest_rl.response import Gold, ToolCall
from tests.made_up_rows import QUESTION, WEATHER

DOCS = Path(__file__).parent.parent / "docs" / "data.md"
TICKET = {"question": "How do I reset it?", "reply": "Hold the button."}
CHAT = {"messages": [QUESTION, {"role": "assistant", "content": "Rain."}]}


def save(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example of the docs as `tickets.py`, which is the current one."""
    (example,) = re.findall(
        r"```python\n(from rest_rl.data.samples.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "tickets.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("tickets", None)
    return tmp_path


def test_the_example_of_the_docs_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(here / "rows.jsonl", TICKET, CHAT, {"question": "no reply"})
    samples, report = load_dataset(str(path), source="tickets:TICKETS")
    assert [(sample.id, sample.gold.answer) for sample in samples] == [
        ("rows-1/0", "Hold the button."),
        ("rows-2/0", "Rain."),
    ]
    assert (report.sources, report.reasons) == (
        {"tickets": 1, "messages": 1},
        {"mixed_shapes": 1, "unknown_shape": 1},
    )
    assert main(["data", "check", str(path), "--source", "tickets:TICKETS", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report.to_json()))


def shape(read: Any) -> Any:
    return SimpleNamespace(name="mine", matches=lambda row: "x" in row, read=read)


def test_a_shape_may_give_samples_and_tools_in_any_spelling(tmp_path: Path) -> None:
    def read(row: Any, context: Any) -> Any:
        context.note("unquoted_value", "got one")
        gold = Gold((ToolCall("get_weather", {"city": "Oslo", "days": row["x"]}),))
        yield ToolSample(context.id, (QUESTION,), (WEATHER,), gold)

    samples, report = load_dataset(str(save(tmp_path / "rows.jsonl", {"x": "2", "id": 7})), source=shape(read))
    assert (samples[0].id, samples[0].tools[0]["type"]) == ("7", "function")
    assert samples[0].gold.calls[0].arguments["days"] == 2
    assert report.reasons == {"unquoted_value": 1, "number_as_string": 1}
    path = str(tmp_path / "rows.jsonl")
    assert check_data(path, test=path, source=shape(read)).reasons["leak"] == 1


def rejecting(row: Any, context: Any) -> Any:
    raise RowRejectedError("bad_gold", "got no gold")


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (rejecting, "bad_gold"),
        (lambda row, context: [Dialogue(context.id, ())], "no_assistant_turn"),
        (lambda row, context: [Dialogue(context.id, ({"role": "robot", "content": "x"},))], "bad_turn"),
        (lambda row, context: row["y"], "bad_row"),
        (lambda row, context: [3], "bad_row"),
        (lambda row, context: [Dialogue(context.id, (QUESTION,), (3,))], "bad_tool_schema"),  # type: ignore[arg-type]
        (lambda row, context: [ToolSample("x", ({},), (), Gold())], "bad_row"),
        (lambda row, context: context.note("no such reason", "x"), "bad_row"),
    ],
)
def test_a_row_that_a_shape_cannot_read_rejects_only_itself(tmp_path: Path, read: Any, reason: str) -> None:
    report = check_data(str(save(tmp_path / "rows.jsonl", {"x": 1}, CHAT)), source=shape(read))
    assert (report.rejected, report.samples, report.reasons[reason]) == (1, 1, 1)


@pytest.mark.parametrize("source", ["csv", "no_such_module:SHAPE", "json:loads", ":", 3, object(), SimpleNamespace])
def test_invalid_shapes_are_refused(source: Any) -> None:
    with pytest.raises(UserError):
        get_shapes(source)


def test_the_help_names_every_shape() -> None:
    assert sorted(NAMED.split(", ")[1:-1]) == sorted(SHAPES)
