"""Published files: each count equals one made independently, with regular expressions on the raw text."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections import Counter
from functools import cache
from typing import Any

import pytest

from rest_rl.data.check import DataReport
from rest_rl.data.load import load_dataset
from rest_rl.data.samples import ToolSample
from rest_rl.formats import get_format
from tests.published_data import published_file
from tests.scores import exact_match

BLOCK = re.compile(r"<(user|tool_call|obs|response)>")
SFT = "toolrl/rlla_sft.json"


@cache
def raw(name: str) -> list[dict[str, Any]]:
    return json.loads(published_file(name).read_text(encoding="utf-8"))


@cache
def loaded(name: str, keep_prompts: bool = False) -> tuple[list[ToolSample], DataReport]:
    return load_dataset(str(published_file(name)), keep_prompts=keep_prompts)


def literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def documented(system: str) -> dict[str, dict[str, Any]]:
    """Parameters by tool name, in both spellings of an entry."""
    tools = system[: system.index("**Steps for Each Turn**")]
    entry = re.compile(
        r"\n\d+\. (?:Name: ([^\n]+)\nDescription: .*?|([^\n:]+): .*?)\nParameters: (\{.*?\})(?=\n)", re.DOTALL
    )
    return {first or second: literal(parameters) for first, second, parameters in entry.findall(tools)}


def calls_in(output: str) -> list[dict[str, Any]]:
    """The JSON lines of what follows the thought."""
    after = output.rsplit("</think>", 1)[1]
    return [json.loads(line) for line in after.splitlines() if line.startswith("{")]


def defects(name: str, arguments: dict[str, Any], tools: dict[str, dict[str, Any]]) -> set[str]:
    """What is wrong with one call, told apart by the texts of types and values alone."""
    if name not in tools:
        return {"unknown_tool"}
    found = {"undocumented_argument"} if set(arguments) - set(tools[name]) else set()
    for key, value in arguments.items():
        kind = str(tools[name].get(key, {}).get("type", "")).lower().split(",")[0]
        if not isinstance(value, str):
            found |= {"wrong_type"} if kind == "int" and isinstance(value, float) and value % 1 else set()
        elif kind in ("int", "integer", "float", "bool", "boolean") and re.fullmatch(
            r"-?\d+(\.\d+)?|[Tt]rue|[Ff]alse", value
        ):
            found.add("number_as_string")
        elif re.match(r"list|array|dict|tuple", kind) and value[:1] in ("[", "{"):
            found.add("broken_value" if value.count('"') % 2 or not parses(value) else "json_as_string")
        elif kind not in ("string", "str", "") and "string" not in kind and not kind.startswith("callable"):
            found.add("wrong_type")
    return found


def parses(text: str) -> bool:
    try:
        literal(text)
    except (ValueError, SyntaxError):
        return False
    return True


REJECTING = {"unknown_tool", "undocumented_argument", "broken_value"}


def test_every_row_of_rlla_sft_is_accounted_for() -> None:
    expected: Counter[str] = Counter()
    rejected = repaired = 0
    for row in raw(SFT):
        found = {
            reason
            for call in calls_in(row["output"])
            for reason in defects(call["name"], call["parameters"], documented(row["instruction"]))
        }
        thought = row["output"].rsplit("</think>", 1)[0].split("<think>", 1)[1]
        expected.update(
            found | ({"thought_quotes_tags"} if re.search(r"</?(tool_call|response|think)>", thought) else set())
        )
        names = re.findall(r"^\d+\. Name: (.+)$", row["instruction"], re.MULTILINE)
        expected.update({"duplicate_tool"} if len(names) > len(set(names)) else ())
        rejected += bool(found & REJECTING)
        repaired += bool(found & {"number_as_string", "json_as_string"}) and not found & REJECTING
    samples, report = loaded(SFT)
    assert report.reasons == expected
    assert (report.rows, report.rejected, report.repaired) == (400, rejected, repaired)
    assert report.kept == 400 - rejected - repaired
    assert len(samples) == report.samples == 400 - rejected


def test_histories_of_rlla_sft_are_whole() -> None:
    """Messages by role against the tags of the flattened text, and every block's text is somewhere in them."""
    by_id = {sample.id: sample for sample in loaded(SFT)[0]}
    for number, row in enumerate(raw(SFT), 1):
        sample = by_id.get(f"rlla_sft-{number}")
        if sample is None:
            continue
        tags = Counter(BLOCK.findall(row["input"]))
        roles = Counter(message["role"] for message in sample.messages)
        calls = sum(len(message.get("tool_calls", ())) for message in sample.messages)
        lines = sum(line.startswith('{"name"') for line in row["input"].splitlines())
        assert (roles["user"], calls) == (tags["user"], lines)
        assert roles["assistant"] == tags["tool_call"] + tags["response"]
        shown = "".join(str(message["content"]) for message in sample.messages)
        for text in re.findall(r"<(?:user|response)>(.*?)</", row["input"], re.DOTALL):
            assert text.strip() in shown
        assert "<" not in re.sub(r"<(?!/?(user|think|tool_call|obs|response)>)", "", shown)


def test_gold_of_rlla_sft_is_the_last_block() -> None:
    samples, _ = loaded(SFT)
    rows = raw(SFT)
    for sample in samples:
        row = rows[int(sample.id.rsplit("-", 1)[1]) - 1]
        assert [call.name for call in sample.gold.calls] == [call["name"] for call in calls_in(row["output"])]
        assert sample.thought is not None
        assert sample.thought in row["output"]
        rendered = get_format("toolrl").render(None, sample.gold.calls, sample.gold.answer)
        assert exact_match(get_format("toolrl").parse(rendered), sample.gold)


@pytest.mark.parametrize("name", [SFT, *(f"api_bank/level-{level}-api_processed.json" for level in (1, 2, 3))])
def test_kept_prompts_are_the_published_texts(name: str) -> None:
    samples, report = loaded(name, keep_prompts=True)
    assert report.reasons == loaded(name)[1].reasons
    rows = raw(name)
    for sample in samples:
        row = rows[int(sample.id.rsplit("-", 1)[1]) - 1]
        system, user = row.get("instruction", row.get("system")), row.get("input", row.get("user"))
        assert sample.tools_in_prompt
        assert sample.tools == tuple(sample.tools)
        assert [message["content"] for message in sample.messages] == [
            system,
            str(user).replace("***Dialogue", "**Dialogue"),
        ]


@pytest.mark.parametrize(
    ("level", "count", "noted"),
    [
        (
            1,
            399,
            {
                "undocumented_argument": 8,
                "number_as_string": 12,
                "json_as_string": 31,
                "wrong_type": 5,
                "duplicate": 10,
            },
        ),
        (2, 67, {"unknown_tool": 6, "number_as_string": 3, "json_as_string": 6}),
        (3, 131, {"number_as_string": 45, "json_as_string": 10}),
    ],
)
def test_api_bank_loads_whole(level: int, count: int, noted: dict[str, int]) -> None:
    name = f"api_bank/level-{level}-api_processed.json"
    rows = raw(name)
    answers = [row["answer"][0] if isinstance(row["answer"], list) else row["answer"] for row in rows]
    found = [defects(a["name"], a["parameters"], documented(r["system"])) for a, r in zip(answers, rows, strict=True)]
    prompts = Counter(json.dumps([row["system"], row["user"], row["answer"]]) for row in rows)
    counted = Counter(reason for each in found for reason in each) + Counter(duplicate=len(rows) - len(prompts))
    assert counted == noted
    samples, report = loaded(name)
    assert (report.rows, report.kept, report.samples, len(samples)) == (count, count, count, count)
    assert report.reasons == noted
    assert {found.finding.severity for found in report.findings} == {"noted"}
    for sample, answer in zip(samples, answers, strict=True):
        assert [(call.name, call.arguments) for call in sample.gold.calls] == [(answer["name"], answer["parameters"])]


def test_api_bank_histories_are_whole() -> None:
    for level in (1, 2, 3):
        name = f"api_bank/level-{level}-api_processed.json"
        for sample, row in zip(loaded(name)[0], raw(name), strict=True):
            shown = json.dumps(sample.messages)
            blocks = re.findall(r"<(user|response|obs)>(.*?)</\1>", row["user"], re.DOTALL)
            lost = [text for tag, text in blocks if tag != "obs" and json.dumps(text.strip())[1:-1] not in shown]
            assert lost == []
            results = sum(message["role"] == "tool" for message in sample.messages)
            assert results == sum(tag == "obs" for tag, _ in blocks)
            roles = [message["role"] for message in sample.messages]
            assert roles[-1] == "user"
            assert all(a != b for a, b in itertools.pairwise(roles) if a == "user")
