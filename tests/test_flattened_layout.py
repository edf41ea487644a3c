"""Prompts as ToolRL published them: read off its files, written for other samples, asked for by `rest-rl eval`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rest_rl.cli.app import main
from rest_rl.config import RunConfig
from rest_rl.data.flattened_layout import FlattenedLayout, Frame, frame_of, render_history, render_tools
from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import ToolSample, to_json
from rest_rl.data.shapes import RowContext, toolrl
from rest_rl.data.shapes.toolrl import parse_history, parse_tools
from rest_rl.evaluate.benchmarks.bfcl.benchmark import Bfcl
from rest_rl.evaluate.conversation import Reply
from rest_rl.formats import get_format
from rest_rl.response import Gold
from rest_rl.train.named_models import embedded_model_dir
from tests.made_up_rows import HISTORY, QUESTION, RAW, ROWS, SYSTEM, WRAPPED
from tests.model_families import FAMILIES, family_tokenizer
from tests.model_server import Server, reply_with
from tests.published_data import published_file

FRAME = Frame("Use the following tools:\n", "\n\n**Steps** one, two.")
OPEN = {
    "type": "function",
    "function": {
        "name": "disk.open",
        "description": "Open a file",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string", "description": "Größe"},
                "how": {"type": "object", "properties": {"mode": {"type": "string"}}, "required": ["mode"]},
            },
            "required": ["path", "how"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {}}}


def calling(thought: str | None, *calls: tuple[str, dict[str, Any]], content: str = "") -> dict[str, Any]:
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    tool_calls = [{"id": f"c{i}", "type": "function", "function": one} for i, one in enumerate(functions)]
    thinking = {"reasoning_content": thought} if thought else {}
    return {"role": "assistant", "content": content, **thinking, "tool_calls": tool_calls}


def result(content: str, **named: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, **named}


SAMPLE = ToolSample(
    "bfcl_0",
    (
        {"role": "system", "content": "Answer in Danish."},
        {"role": "user", "content": "Open a.txt and tell the time."},
        calling("Two calls.", ("disk.open", {"path": "a.txt", "how": {"mode": "r"}}), ("clock", {})),
        result('{"text": "æ", "line": 1}', name="disk.open", tool_call_id="c0"),
        result("12:00", name="clock", tool_call_id="c1"),
        {"role": "assistant", "content": "It is noon.", "reasoning_content": "I know."},
        {"role": "user", "content": "Thanks."},
    ),
    (OPEN, CLOCK),
    Gold((), "Bye."),
)
PROMPT_SYSTEM = """\
Use the following tools:
1. Name: disk.open
Description: Open a file
Parameters: {"path": {"type": "string", "description": "Gr\\u00f6\\u00dfe"}, "how": {"type": "object", "properties": \
{"mode": {"type": "string"}}, "required": ["mode"]}}
Required: ["path", "how"]
2. Name: clock
Description:\x20
Parameters: {}

**Steps** one, two.

Answer in Danish."""
PROMPT_USER = """\
**Dialogue Records History**
<user> Open a.txt and tell the time. </user>

<think> Two calls. </think>
<tool_call>
{"name": "disk.open", "parameters": {"path": "a.txt", "how": {"mode": "r"}}}
{"name": "clock", "parameters": {}}
</tool_call>
<obs> [{"name": "disk.open", "results": {"text": "\\u00e6", "line": 1}}, {"name": "clock", "results": "12:00"}] </obs>

<think> I know. </think>
<response> It is noon. </response>

<user> Thanks. </user>"""


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([RAW]), encoding="utf-8")
    return path


def with_thoughts(messages: list[dict[str, Any]], published_text: str) -> list[dict[str, Any]]:
    """What `parse_history` has read, with the thoughts that it leaves out; every published turn begins with one."""
    thoughts = iter(re.findall(r"<think>(.*?)</think>", published_text, re.DOTALL))
    thinking = [
        {**message, "reasoning_content": next(thoughts)} if message["role"] == "assistant" else message
        for message in messages
    ]
    assert next(thoughts, None) is None
    return thinking


def test_the_prompt_of_a_sample() -> None:
    flat = FRAME.flatten(SAMPLE)
    assert [message["role"] for message in flat.messages] == ["system", "user"]
    assert flat.messages[0]["content"] == PROMPT_SYSTEM
    assert flat.messages[1]["content"] == PROMPT_USER
    assert (flat.tools_in_prompt, flat.tools, flat.gold) == (True, SAMPLE.tools, SAMPLE.gold)
    assert FRAME.flatten(flat) is flat
    assert [tool["function"]["name"] for tool in parse_tools(PROMPT_SYSTEM)] == ["disk.open", "clock"]


@pytest.mark.parametrize(
    ("family", "tool_format"), [("qwen3", "toolrl"), ("mistral", "toolrl"), ("qwen3_5", "toolrl+think")]
)
def test_the_template_adds_only_the_roles(family: str, tool_format: str) -> None:
    tokenizer = family_tokenizer(family)
    layout = FlattenedLayout(tokenizer, FRAME, tool_format)
    kept = replace(SAMPLE, messages=FRAME.flatten(SAMPLE).messages, tools_in_prompt=True)
    assert layout.render(SAMPLE) == PromptLayout(tokenizer, tool_format).render(kept)
    assert PROMPT_SYSTEM in layout.render(SAMPLE)
    assert layout.render(SAMPLE).count(PROMPT_USER) == 1
    assert layout.count_tokens(SAMPLE) == len(tokenizer(layout.render(SAMPLE), add_special_tokens=False)["input_ids"])
    with pytest.raises(ValueError, match=r"format is 'hermes', expected 'toolrl'"):
        FlattenedLayout(tokenizer, FRAME, "hermes")


def test_made_up_rows_round_trip() -> None:
    assert render_history(with_thoughts(parse_history(HISTORY), HISTORY)) == HISTORY.rstrip()
    assert "<think>  </think>\n<response> Hi" in render_history(parse_history(HISTORY))


def test_published_rows_round_trip() -> None:
    path = published_file("toolrl/rlla_sft.json")
    rows, frame = json.loads(path.read_text(encoding="utf-8")), frame_of(str(path))
    texts = {row["input"]: render_history(with_thoughts(parse_history(row["input"]), row["input"])) for row in rows}
    changed = [(text, written) for text, written in texts.items() if text != written]
    assert len(rows) == 400
    assert len(changed) == 1  # its result bears another name than the call, which is broken
    assert '<obs> [{"name": "Sending SMS OTP (Custom OTP' in changed[0][0]
    # parse_tools puts types in JSON's words and strips descriptions, so the lists are compared by published schemas
    different = 0
    for row in rows:
        schemas = [json.loads(line) for line in re.findall(r"^Parameters: (.*)$", row["instruction"], re.MULTILINE)]
        tools = [
            {**tool["function"], "parameters": {"properties": schema}}
            for tool, schema in zip(parse_tools(row["instruction"]), schemas, strict=True)
        ]
        different += f"{frame.before}{render_tools(tools)}{frame.after}" != row["instruction"]
    assert different == 1  # a description with a space at its end


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([calling(None, ("f", {"x": "ö"}), content="No.")],
         '<tool_call>\n{"name": "f", "parameters": {"x": "\\u00f6"}}\n</tool_call>\n<response> No. </response>'),
        ([calling("t", ("f", {}), ("g", {})), result("1", tool_call_id="c1"), result("007", tool_call_id="c0")],
         '<obs> [{"name": "g", "results": 1}, {"name": "f", "results": "007"}] </obs>'),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, result("1e5")],
         '<obs> [{"name": "f", "results": "1e5"}] </obs>'),
        ([calling("t", ("f", {}), ("g", {})), result(" both ")], "<obs> both </obs>"),
        ([result("stray")], "<obs> stray </obs>"),
        ([result('"quoted"', name="f")], '<obs> [{"name": "f", "results": "\\"quoted\\""}] </obs>'),
        ([result("null", name="f"), QUESTION],
         '<obs> [{"name": "f", "results": null}] </obs>\n\n<user> Weather in Oslo? </user>'),
        ([{"role": "assistant", "content": None}], "<think>  </think>"),
    ],
)  # fmt: skip
def test_odd_histories(messages: list[dict[str, Any]], text: str) -> None:
    assert render_history([QUESTION, *messages]).endswith(f"\n{text}")


@pytest.mark.parametrize("shape", ["json", "jsonl", "parquet", "samples"])
def test_the_frame_is_read_from_the_first_row_that_has_it(tmp_path: Path, shape: str) -> None:
    path = tmp_path / f"rows.{'jsonl' if shape == 'samples' else shape}"
    (kept,) = toolrl.read(RAW, RowContext("kept", keep_prompts=True))
    rows: list[Any] = [{"messages": [QUESTION]}, {**RAW, "instruction": "no tools"}, RAW]
    if shape == "parquet":
        pq.write_table(pa.Table.from_pylist([ROWS["parquet"]]), path)
    elif shape == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        rows = ["broken", *([to_json(kept)] if shape == "samples" else rows)]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    frame = frame_of(str(path))
    assert SYSTEM.startswith(f"{frame.before}1. Name: get weather\n")
    assert SYSTEM.endswith(f"Parameters: {{}}{frame.after}")
    assert frame.digest != FRAME.digest == replace(FRAME).digest


@pytest.mark.parametrize("row", [{"messages": [QUESTION]}, {**RAW, "instruction": "Use them."}, "broken"])
def test_a_file_without_the_texts_is_refused(tmp_path: Path, row: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"no row of .*rows\.jsonl has ToolRL's system text; pass .* such as rlla_sft\.json"
    ):
        frame_of(str(path))


@pytest.mark.parametrize(
    ("family", "tool_format"), [*((name, FAMILIES[name].tool_format) for name in FAMILIES), ("qwen3", "toolrl")]
)
def test_other_layouts_do_not_show_thoughts(family: str, tool_format: str) -> None:
    layout = PromptLayout(family_tokenizer(family), tool_format)
    thinking = (
        QUESTION,
        calling("secret", ("get_weather", {"city": "Oslo"})),
        result("rain", name="get_weather", tool_call_id="c0"),
    )
    plain = tuple({key: value for key, value in message.items() if key != "reasoning_content"} for message in thinking)
    sample = ToolSample("s", thinking, (WRAPPED,), Gold((), "Rain."))
    assert layout.render(sample) == layout.render(replace(sample, messages=plain))
    assert "secret" not in layout.render(sample)


def test_a_conversation_of_bfcl() -> None:
    try:
        benchmark = Bfcl("v3", ["multi_turn_base"])
    except ValueError as error:
        pytest.skip(str(error))
    tool_format = get_format("toolrl")
    talk = benchmark.start("multi_turn_base_0", tool_format)
    first = talk.request()
    assert first is not None
    before = FRAME.flatten(first.sample).messages[1]["content"]
    call = '<tool_call>\n{"name": "pwd", "parameters": {}}\n</tool_call>'
    talk.receive(Reply(text=f"<think> Where am I? </think>\n{call}"))
    second = talk.request()
    assert second is not None
    after = FRAME.flatten(second.sample).messages[1]["content"]
    talk.close()
    benchmark.close()
    said, told = after.removeprefix(before).rsplit("\n", 1)
    assert before.startswith("**Dialogue Records History**\n<user> ")
    assert said == f"\n\n<think> Where am I? </think>\n{call}"
    assert re.fullmatch(r'<obs> \[\{"name": "pwd", "results": \{"current_working_directory": ".*"\}\}\] </obs>', told)


def run(*arguments: str) -> int:
    return main(["eval", *arguments])


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


TOOL_WORLD = ("tool-world", "--prompts", "2", "--dry-run")
PUBLISHED = ("--prompt", "published", "--prompt-from")


def test_a_dry_run_shows_the_published_prompt(rows_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TOOL_WORLD, *PUBLISHED, str(rows_file)) == 0
    out = shown(capsys)
    assert "prompt published, format toolrl" in out
    assert f"texts from {rows_file}" in out.replace("\n", "")
    assert "following tools:\n1. Name: " in out
    assert "**Dialogue Records History**\n<user> " in out
    assert run(*TOOL_WORLD, "--oracle", *PUBLISHED, str(rows_file)) == 0
    assert "**Dialogue Records History**\n<user> " in shown(capsys)


def test_a_run_with_kept_prompts_is_evaluated_with_them(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model").symlink_to(embedded_model_dir())

    def trained(tool_format: str, path: str) -> tuple[str, ...]:
        text = f'[rest]\nformat = "{tool_format}"\n[data]\npath = "{path}"\nkeep_prompts = true'
        (folder / "config.toml").write_text(RunConfig.from_toml(text).to_toml(), encoding="utf-8")
        return (*TOOL_WORLD, "--model", "mine")

    assert run(*trained("toolrl", "rows.json")) == 0
    out = shown(capsys)
    assert "prompt training, format toolrl (as in mine; texts from rows.json)" in out
    assert "**Dialogue Records History**" in out
    assert run(*trained("toolrl", "gone.json")) == 2
    assert "gone.json does not exist" in (told := capsys.readouterr().err)
    assert "--prompt-from" in told
    assert run(*trained("toolrl", "gone.json"), "--prompt-from", "rows.json") == 0
    assert "texts from rows.json" in shown(capsys)
    assert run(*trained("hermes", "rows.json")) == 0
    assert "**Dialogue Records History**" not in shown(capsys)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--prompt", "published"), "--prompt published needs a file with ToolRL's rows"),
        (("--prompt-from", "rows.json"), "--prompt-from has no effect with --prompt training"),
        (("--prompt", "native", "--prompt-from", "rows.json"), "--prompt-from has no effect with --prompt native"),
        ((*PUBLISHED, "rows.json", "--format", "hermes"), "--prompt published with format hermes, expected toolrl"),
        ((*PUBLISHED, "nothing.json"), "nothing.json does not exist"),
    ],
)
def test_mistakes_are_reported(
    rows_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(rows_file.parent)
    for who in ((), ("--oracle",)):
        assert run(*TOOL_WORLD, *who, *options) == 2
        message = capsys.readouterr().err
        assert told in message
        assert message.count("\n") == 1


def test_a_server_is_sent_the_published_prompt(
    server: Server, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.steps = chain.from_iterable(
        iter(lambda: [reply_with("<think> no </think>\n<response> x </response>")], None)
    )
    who = ("--endpoint", f"{server.url}/v1", "--model", "m", "--ids", "unseen_tools/0")
    out = tmp_path / "out"
    assert run("tool-world", *who, *PUBLISHED, str(rows_file), "--out", str(out)) == 0
    ((_, _, body),) = server.requests
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"].startswith(frame_of(str(rows_file)).before + "1. Name: ")
    assert body["messages"][1]["content"].startswith("**Dialogue Records History**\n<user> ")
    assert "tools" not in body
    assert "texts from" in shown(capsys)
    settings = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    assert settings["prompt_texts"] == frame_of(str(rows_file)).digest
