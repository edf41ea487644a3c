"""A dialogue of K assistant turns gives K samples or findings, and no turn is in its own prompt."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.made_up_rows import QUESTION, WEATHER, load_rows


@st.composite
def dialogues(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turns whose texts are all different, so that a leak or a loss shows."""
    kinds = draw(st.lists(st.sampled_from(["user", "assistant", "call", "tool", "empty", "stray"]), max_size=9))
    messages: list[dict[str, Any]] = [{"role": "user", "content": "<0>"}]
    for number, kind in enumerate(kinds, 1):
        call = {
            "function": {"name": "stray" if kind == "stray" else "get_weather", "arguments": {"city": f"<{number}>"}}
        }
        messages.append(
            {"role": "assistant", "content": None, "tool_calls": [call]}
            if kind in ("call", "stray")
            else {"role": "assistant", "content": ""}
            if kind == "empty"
            else {"role": kind, "content": f"<{number}>"}
        )
    return messages


@given(dialogues(), st.integers(0, 12))
def test_k_turns_give_k_samples(
    tmp_path_factory: pytest.TempPathFactory, messages: list[dict[str, Any]], broken_at: int
) -> None:
    """Each turn gives its sample or its finding; no prompt has its own turn, and each is the beginning of the next."""
    if broken_at < len(messages) and messages[broken_at].get("tool_calls"):
        messages[broken_at]["tool_calls"][0]["function"]["arguments"] = "{broken"
    row = {"messages": messages, "tools": [WEATHER]}
    samples, report = load_rows(tmp_path_factory.mktemp("dialogue"), row)
    turns = sum(message["role"] == "assistant" for message in messages)
    lost = [f for _, _, f in report.findings if f.severity == "rejected" and f.reason != "no_assistant_turn"]
    assert len(samples) + len(lost) == turns
    assert report.rows == report.kept + report.repaired + report.rejected == 1
    assert report.kept == (turns > 0 and not lost)
    read_messages = messages[:broken_at] if any(f.reason == "bad_turn" for f in lost) else messages
    for before, sample in itertools.pairwise(samples):
        assert sample.messages[: len(before.messages)] == before.messages
    for sample in samples:
        own = json.dumps([sample.gold.answer, [call.arguments for call in sample.gold.calls]])
        shown = json.dumps(sample.messages)
        marks = [f"<{n}>" for n in range(len(messages)) if f"<{n}>" in own]
        assert len(marks) == 1
        assert marks[0] not in shown
        assert [m["role"] for m in sample.messages] == [m["role"] for m in read_messages[: len(sample.messages)]]
        for message, kept in zip(messages, sample.messages, strict=False):
            assert not message.get("content") or message["content"] == kept["content"]
            calls = [call["function"]["arguments"] for call in kept.get("tool_calls", ())]
            assert calls == [call["function"]["arguments"] for call in message.get("tool_calls") or ()]


def test_a_turn_with_a_wrong_gold_stays_in_the_history(tmp_path: Path) -> None:
    call = {"function": {"name": "no_such_tool", "arguments": "{}"}}
    turns = [
        QUESTION,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "?"},
        {"role": "assistant", "content": "Sorry."},
    ]
    (sample,), report = load_rows(tmp_path, {"messages": turns, "tools": [WEATHER]})
    assert (sample.gold.answer, len(sample.messages)) == ("Sorry.", 3)
    assert (report.repaired, report.reasons) == (1, {"unknown_tool": 1})
    assert report.findings[0].finding.sample == "rows-1/0"


def test_a_turn_of_weight_zero_is_only_history(tmp_path: Path) -> None:
    turns = [
        QUESTION,
        {"role": "assistant", "content": "Perhaps.", "weight": 0},
        {"role": "user", "content": "Look!"},
        {"role": "assistant", "content": "Rain.", "weight": 1},
    ]
    (sample,), report = load_rows(tmp_path, {"messages": turns})
    assert [message["content"] for message in sample.messages] == ["Weather in Oslo?", "Perhaps.", "Look!"]
    assert not any("weight" in message for message in sample.messages)
    assert (sample.gold.answer, report.kept, report.reasons) == ("Rain.", 1, {"weight_zero": 1})
    samples, report = load_rows(tmp_path, {"messages": turns[:2]})
    assert (samples, report.reasons) == ([], {"no_assistant_turn": 1})
    call = {"role": "assistant", "weight": 0, "function_call": {"name": "w", "arguments": "{}"}}
    _, report = load_rows(tmp_path, {"messages": [QUESTION, {"role": "robot", "content": ""}, call, turns[3]]})
    assert report.reasons == {"bad_turn": 1, "broken_history": 1, "weight_zero": 1, "missing_result": 1}
    assert len([found for found in report.findings if found.finding.reason == "broken_history"]) == 1
