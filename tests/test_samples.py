"""Dialogues become single-turn samples, and samples survive JSONL."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rest_rl.data.samples import Dialogue, ToolSample, decompose, from_json, to_json
from rest_rl.response import Gold, ToolCall

TOOL = {"type": "function", "function": {"name": "add", "description": "add two numbers", "parameters": {}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2, "é"]}'}}
MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 and 2?"},
    {"role": "assistant", "content": None, "reasoning_content": "I add them.", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "c1"},
    {"role": "assistant", "content": "<think> now I know </think>\nThree."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Welcome."},
)
DIALOGUE = Dialogue("d", MESSAGES, (TOOL,), "chat")


def test_k_assistant_turns_give_k_samples() -> None:
    samples = decompose(DIALOGUE)
    assert [sample.id for sample in samples] == ["d/0", "d/1", "d/2"]
    assert [len(sample.messages) for sample in samples] == [2, 4, 6]
    assert {sample.kind for sample in samples} == {"chat"}


def test_gold_is_the_turn_itself() -> None:
    first, second, third = decompose(DIALOGUE)
    assert first.gold == Gold((ToolCall("add", {"a": 1, "b": [2, "é"]}),), None)
    assert (second.gold, third.gold) == (Gold((), "Three."), Gold((), "Welcome."))
    assert (first.thought, second.thought, third.thought) == ("I add them.", "now I know", None)


def test_no_turn_leaks_into_its_own_history() -> None:
    for turn, sample in enumerate(decompose(DIALOGUE)):
        history = json.dumps(sample.messages)
        assert sum(message["role"] == "assistant" for message in sample.messages) == turn
        assert sample.gold.answer is None or sample.gold.answer not in history
        assert sample.thought is None or sample.thought not in history


def test_histories_contain_calls_as_objects_and_no_reasoning() -> None:
    last = decompose(DIALOGUE)[-1]
    assert last.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": [2, "é"]}
    assert last.messages[4]["content"] == "Three."
    assert all("reasoning_content" not in message for message in last.messages)


@pytest.mark.parametrize(
    ("turn", "thought", "preamble"),
    [
        ({"content": "Let me add."}, None, "Let me add."),
        ({"content": "Let me add.", "reasoning_content": "A sum."}, "A sum.", "Let me add."),
        ({"content": "<think> A sum. </think>\nLet me add."}, "A sum.", "Let me add."),
        ({"content": " ", "reasoning_content": "A sum."}, "A sum.", None),
    ],
)
def test_text_next_to_calls_is_the_preamble(turn: dict[str, Any], thought: str | None, preamble: str | None) -> None:
    """No reasoning and no answer; later histories have it, as the user saw it."""
    result = {"role": "tool", "content": "3", "tool_call_id": "c1"}
    turns = (MESSAGES[1], {"role": "assistant", **turn, "tool_calls": [CALL]}, result, MESSAGES[-1])
    sample, last = decompose(Dialogue("d", turns, (TOOL,)))
    assert (sample.thought, sample.preamble, sample.gold.answer) == (thought, preamble, None)
    assert (last.preamble, last.gold.answer) == (None, "Welcome.")
    told = last.messages[1]
    assert (told["content"], len(told["tool_calls"]), "reasoning_content" in told) == (preamble or "", 1, False)
    row = to_json(sample)
    assert row.get("preamble") == preamble
    assert ("preamble" in row) == (preamble is not None)
    assert from_json(json.loads(json.dumps(row))) == sample


def test_a_dialogue_without_assistant_turns_gives_no_sample() -> None:
    assert decompose(Dialogue("d", MESSAGES[:2], ())) == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "robot", "content": "x"}, "role 'robot'"),
        ({"role": "user"}, "neither content nor tool_calls"),
        ({"role": "user", "content": [{"type": "text"}]}, "is of type list"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": "{}"}}]}, "tool call"),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "are not JSON",
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
            "arguments object",
        ),
        ({"role": "assistant", "content": "", "tool_calls": 3}, "expected a list of calls"),
        (
            {"role": "assistant", "content": "", "tool_calls": "f()"},
            "tool_calls of message 1 is 'f()', expected a list of calls",
        ),
        ({"role": "user", "content": "hi", "tool_calls": ["f"]}, "expected the role assistant"),
    ],
)
def test_bad_messages_are_reported(message: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match="message 1") as error:
        decompose(Dialogue("d", (MESSAGES[1], message), ()))
    assert expected in str(error.value)


def test_an_empty_dialogue_is_refused() -> None:
    with pytest.raises(ValueError, match="no messages"):
        decompose(Dialogue("d", (), ()))


def test_json_round_trip() -> None:
    samples = decompose(DIALOGUE)
    assert [from_json(json.loads(json.dumps(to_json(sample)))) for sample in samples] == samples


def test_a_blank_answer_is_none() -> None:
    turn = {"role": "assistant", "content": "  "}
    (sample,) = decompose(Dialogue("d", ({"role": "user", "content": "hi"}, turn), ()))
    assert sample.gold == Gold()
    assert from_json({**to_json(sample), "gold": {"calls": [], "answer": " "}}).gold == Gold()


def test_json_of_a_sample_is_plain() -> None:
    sample = ToolSample("s", ({"role": "user", "content": "hi"},), (), Gold((ToolCall("f", {"x": None}),), "done"))
    assert from_json(json.loads(json.dumps(to_json(sample)))) == sample


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"messages": "hi"}, "messages of sample 'd/0' is 'hi'"),
        ({"gold": None}, "is None"),
        ({"gold": {"calls": [{"name": "f"}]}}, "gold"),
        ({"gold": {"calls": [], "answer": 3}}, "answer"),
        ({"id": 3}, "id of sample 3 is 3"),
        ({"thought": 1}, "thought"),
        ({"preamble": 1}, "preamble"),
        ({"messages": []}, "no messages"),
        ({"tools": ["f"]}, "write each tool as an object"),
        ({"gold": {"calls": [{"function": None}], "answer": None}}, "tool call"),
    ],
)
def test_bad_rows_are_reported(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match="sample") as error:
        from_json({**to_json(decompose(DIALOGUE)[0]), **change})
    assert expected in str(error.value)
