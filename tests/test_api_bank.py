"""API-Bank: the published metric with its quirks, the strict one, the ceilings; by hand, and on the published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_rl.evaluate.benchmarks.api_bank import (
    ApiBank,
    find_arguments_problem,
    matches_gold_value,
    parse_published_calls,
    soft_match,
)
from rest_rl.evaluate.conversation import Reply, Request
from rest_rl.formats import FORMATS, get_format
from rest_rl.response import ToolCall
from tests.published_data import published_file

GOLD = {"name": "AddAgenda", "parameters": {"content": "Meeting", "count": "5"}}
CALL = json.dumps(GOLD)
SYSTEM = (
    "You can use the following tools:\n1. Name: AddAgenda\nDescription: Adds.\nParameters: {'content': {'description': "
    "'text', 'type': 'str'}, 'count': {'description': 'n', 'type': 'int'}}\n\n**Steps"
)
ROW = {"system": SYSTEM, "user": "**Dialogue Records History**\n<user> Add it. </user>", "answer": [GOLD], "other": {}}


def soft(text: str) -> bool:
    return soft_match(parse_published_calls(text), GOLD)


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        (f"<think> a </think>\n<tool_call>\n{CALL}\n</tool_call>", True),
        (CALL, True),  # tags are not required
        (f"<tool_call>\nprose\n{CALL}\n</tool_call>", True),  # lines that are not JSON are skipped
        (f'<tool_call>\n{{"name": "X", "parameters": {{}}}}\n{CALL}\n</tool_call>', True),  # any call may match
        ('{"content": "Meeting", "count": "5"}', True),  # without a name: arguments of the right tool
        ('{"count": "5", "content": "Meeting"}', True),  # keys have no order
        (json.dumps(CALL), True),  # a JSON string that contains a call is parsed again
        (f"[1]\n{CALL}", True),  # a list is compared as arguments, and differs
        (f'<tool_call>\n{{"name": "AddAgenda", "arguments": {json.dumps(GOLD["parameters"])}}}\n</tool_call>', False),
        (CALL.replace('"5"', "5"), False),  # the published metric compares types
        (f"null\n{CALL}", False),  # a JSON line that is not an object ends the search
        (f"7\n{CALL}", False),
        (f'"prose"\n{CALL}', False),
        (f'["name", "parameters"]\n{CALL}', False),
        (f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n</tool_call>", False),  # the last opening tag counts
        (CALL.replace("AddAgenda", "addagenda"), False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_soft_is_the_published_metric(text: str, is_right: bool) -> None:
    assert soft(text) is is_right


@pytest.mark.parametrize(
    ("value", "gold", "is_equal"),
    [
        ("5", "5", True), (5, "5", True), (5.0, "5", True), ("5.0", "5", False), (True, "True", True),
        (True, "true", True), (True, "1", False), ([1, "a"], "[1, 'a']", True), ({"k": 1}, '{"k": 1}', True),
        ("", "", True), ([], "5", False), (None, "None", True), (None, "five", False), (5, "five", False),
        ("meeting", "Meeting", False),
    ],
)  # fmt: skip
def test_a_value_equals_the_text_that_denotes_it(value: Any, gold: str, is_equal: bool) -> None:
    assert matches_gold_value(value, gold) is is_equal


def test_a_difference_is_described() -> None:
    gold = GOLD["parameters"]
    assert isinstance(gold, dict)
    assert find_arguments_problem(ToolCall("AddAgenda", {"content": "Meeting", "count": 5}), gold) == ""
    assert find_arguments_problem(ToolCall("AddAgenda", {"content": "Meeting"}), gold) == "missing arguments ['count']"
    assert find_arguments_problem(ToolCall("AddAgenda", {**gold, "x": 1}), gold) == "extra arguments ['x']"
    assert "'Lunch', expected 'Meeting'" in find_arguments_problem(
        ToolCall("AddAgenda", {**gold, "content": "Lunch"}), gold
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for level in (1, 2, 3):
        answer = GOLD if level == 2 else [GOLD]
        rows = [{**ROW, "answer": answer}] * level
        (tmp_path / f"level-{level}-api_processed.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


def verdict(bank: ApiBank, text: str, name: str = "toolrl", identity: str = "Level1_0") -> dict[str, Any]:
    conversation = bank.start(identity, get_format(name))
    request = conversation.request()
    assert isinstance(request, Request)
    conversation.receive(Reply(text=text))
    assert conversation.request() is None
    return dict(conversation.outcome())


def test_strict_requires_one_call_in_tags(folder: Path) -> None:
    bank = ApiBank(folder, keep_prompts=False)
    right = f"<think> a </think>\n<tool_call>\n{CALL}\n</tool_call>"
    assert verdict(bank, right)["strict"]
    assert verdict(bank, right.replace('"5"', "5"))["strict"]
    twice = verdict(bank, f"<think> a </think>\n<tool_call>\n{CALL}\n{CALL}\n</tool_call>")
    assert (twice["soft"], twice["strict"], twice["reason"]) == (True, False, "2 calls, expected one")
    untagged = verdict(bank, CALL)
    assert (untagged["soft"], untagged["strict"], untagged["reason"]) == (True, False, "0 calls, expected one")
    broken = verdict(bank, f"<think> a </think>\n<tool_call>\n{{\n{CALL}\n</tool_call>")
    assert (broken["soft"], broken["strict"]) == (True, False)
    assert broken["reason"].startswith("unreadable call")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_gold_passes_in_every_format(folder: Path, name: str) -> None:
    bank = ApiBank(folder, keep_prompts=False)
    for identity in bank.groups:
        sample = bank.items[identity].sample
        outcome = verdict(bank, get_format(name).render(None, sample.gold.calls, None), name, identity)
        assert (outcome["soft"], outcome["strict"], outcome["reason"]) == (True, True, "")


def test_calls_parsed_by_a_server_are_judged_like_text(folder: Path) -> None:
    bank = ApiBank(folder, keep_prompts=False)
    conversation = bank.start("Level2_0", get_format("toolrl"))
    arguments = GOLD["parameters"]
    assert isinstance(arguments, dict)
    conversation.receive(Reply(text="", calls=(ToolCall("AddAgenda", arguments),)))
    assert dict(conversation.outcome())["soft"] is True


def test_groups_and_pin(folder: Path) -> None:
    bank = ApiBank(folder, keep_prompts=True)
    assert list(bank.groups.items()) == [
        ("Level1_0", 1), ("Level2_0", 2), ("Level2_1", 2), ("Level3_0", 3), ("Level3_1", 3), ("Level3_2", 3)
    ]  # fmt: skip
    assert "6 samples" in bank.pin
    assert bank.items["Level1_0"].sample.messages[0]["content"] == SYSTEM  # kept prompts are verbatim


@pytest.mark.parametrize(
    ("content", "match"),
    [("{", "Expecting"), ("{}", "contains dict"), ("[3]", "Level1_0 has type int"), ("[{}]", "Level1_0")],
)
def test_a_broken_file_is_reported(folder: Path, content: str, match: str) -> None:
    (folder / "level-1-api_processed.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        ApiBank(folder, keep_prompts=False)


def test_a_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"level-1-, level-2- and level-3-api_processed\.json as --data"):
        ApiBank(tmp_path / "none", keep_prompts=False)


def published_bank(*, keep_prompts: bool) -> ApiBank:
    return ApiBank(published_file("api_bank/level-1-api_processed.json").parent, keep_prompts=keep_prompts)


def test_published_files_count_as_published() -> None:
    bank = published_bank(keep_prompts=True)
    levels = list(bank.groups.values())
    assert [levels.count(level) for level in (1, 2, 3)] == [399, 67, 131]


@pytest.mark.parametrize("name", ["toolrl", "hermes", "qwen3_coder"])
def test_published_gold_scores_full_marks(name: str) -> None:
    bank = published_bank(keep_prompts=name == "toolrl")
    for identity in bank.groups:
        sample = bank.items[identity].sample
        outcome = verdict(bank, get_format(name).render(None, sample.gold.calls, None), name, identity)
        assert (identity, outcome["soft"], outcome["strict"]) == (identity, True, True)


def test_only_the_published_metric_rejects_numbers() -> None:
    bank = published_bank(keep_prompts=True)
    counts = {"soft": 0, "strict": 0}
    for identity in bank.groups:
        call = bank.items[identity].sample.gold.calls[0]
        typed = {
            name: int(value) if value.isdigit() and str(int(value)) == value else value
            for name, value in call.arguments.items()
        }
        outcome = verdict(
            bank, get_format("toolrl").render(None, [ToolCall(call.name, typed)], None), identity=identity
        )
        counts["soft"] += outcome["soft"]
        counts["strict"] += outcome["strict"]
    assert counts == {"soft": 487, "strict": 597}  # 81.57 % of 597, as the published script counts them


def test_samples_that_no_correct_response_passes_are_listed() -> None:
    ceilings = published_bank(keep_prompts=False).extras([])["ceilings"]
    assert {level: len(ceiling["ids"]) for level, ceiling in ceilings.items()} == {
        "Level1": 8,
        "Level2": 6,
        "Level3": 0,
    }
    assert set(ceilings["Level2"]["ids"]) == {f"Level2_{index}" for index in (6, 13, 14, 19, 25, 54)}
    assert all("device_id" in defect for defect in ceilings["Level1"]["ids"].values())
    assert ceilings["Level1"]["accuracy"] == pytest.approx(391 / 399)
