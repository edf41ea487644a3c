"""The tool world: deterministic, executable, masked, its held-out splits held out, its gold worth full marks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from rest_rl.data.samples import ToolSample, decompose
from rest_rl.data.tool_world import (
    FILLER,
    FILLER_LENGTHS,
    KINDS,
    REFUSAL,
    SPLITS,
    Split,
    dialogues,
    execute,
    is_held_out_value,
    tool_world,
)
from rest_rl.response import ToolCall

N = 600
TRAIN = tool_world(0, N)


def functions(sample: ToolSample) -> list[dict[str, Any]]:
    return [tool["function"] for tool in sample.tools]


def values(sample: ToolSample) -> set[str]:
    """Every value that a sample asks for, calls with or is told of."""
    gold = {v for call in sample.gold.calls for v in call.arguments.values()}
    told = {json.loads(m["content"])["result"] for m in sample.messages if m["role"] == "tool"}
    asked = set(sample.messages[0]["content"].split('"')[1::2])
    return gold | told | asked


@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_gives_the_same_samples_and_another_seed_others(split: Split) -> None:
    assert tool_world(3, 60, split) == tool_world(3, 60, split)
    assert tool_world(3, 60, split)[:17] == tool_world(3, 17, split)
    assert tool_world(3, 60, split) != tool_world(4, 60, split)


def test_shares_of_kinds_are_as_documented() -> None:
    shares = Counter(sample.kind for sample in TRAIN)
    assert {kind: round(shares[kind] / N, 2) for kind in KINDS} == pytest.approx(
        {"single": 0.4, "parallel": 0.2, "dependent": 0.2, "none": 0.2}, abs=0.01
    )


@pytest.mark.parametrize("split", SPLITS)
def test_every_gold_call_can_be_executed_and_results_are_stable(split: Split) -> None:
    for sample in tool_world(1, 200, split):
        for call in sample.gold.calls:
            result = execute(call, sample.tools)
            assert list(json.loads(result)) == ["result"]
            assert execute(call, sample.tools) == result


def test_the_second_call_of_a_dependent_dialogue_takes_the_result_of_the_first() -> None:
    for dialogue in islice(dialogues(2, kinds=["dependent"]), 100):
        first, second = decompose(dialogue)
        history = second.messages
        result = execute(first.gold.calls[0], first.tools)
        assert history[-1] == {"role": "tool", "content": result}
        assert json.loads(result)["result"] in second.gold.calls[0].arguments.values()
        assert json.loads(result)["result"] not in history[0]["content"]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda f: ToolCall("nosuch", {}), "nosuch"),
        (lambda f: ToolCall(f["name"], {}), "arguments"),
        (lambda f: ToolCall(f["name"], dict.fromkeys(f["parameters"]["properties"], 3)), "arguments"),
    ],
)
def test_a_call_that_fits_no_tool_is_refused(call: Callable[[dict[str, Any]], ToolCall], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        execute(call(functions(TRAIN[0])[0]), TRAIN[0].tools)


def test_held_out_splits_share_nothing_with_train() -> None:
    unseen_tools, unseen_values = tool_world(0, N, "unseen_tools"), tool_world(0, N, "unseen_values")

    def templates(samples: list[ToolSample]) -> set[str]:
        return {f["description"] for s in samples for f in functions(s)}

    def names(samples: list[ToolSample]) -> set[str]:
        return {f["name"] for s in samples for f in functions(s)}

    assert not templates(TRAIN) & templates(unseen_tools)
    assert not names(TRAIN) & names(unseen_tools)
    assert not any(is_held_out_value(v) for s in TRAIN + unseen_tools for v in values(s))
    assert all(is_held_out_value(v) for s in unseen_values for v in values(s))


def test_unseen_values_come_with_tools_of_train() -> None:
    seen = {f["description"] for sample in tool_world(5, 3000) for f in functions(sample)}
    assert {f["description"] for s in tool_world(0, 200, "unseen_values") for f in functions(s)} <= seen


def test_names_are_masked_anew_for_every_dialogue() -> None:
    names: dict[str, set[str]] = {}
    for sample in TRAIN:
        for f in functions(sample):
            names.setdefault(f["description"], set()).add(f["name"])
            assert not set(f["name"].split("_")) & set(f["description"].split())
    assert sum(len(of_tool) > 3 for of_tool in names.values()) > 0.8 * len(names)


def test_no_tool_fits_where_the_turn_should_answer() -> None:
    for sample in tool_world(4, 100, kinds=["none"]):
        asked = sample.messages[0]["content"].split()[2]
        assert all(asked not in f["description"] for f in functions(sample))
        assert (sample.gold.calls, sample.gold.answer) == ((), REFUSAL)


@pytest.mark.parametrize(
    "settings", [{"split": "test"}, {"kinds": ["triple"]}, {"num_tools": 1}, {"num_tools": 99}, {"decision": "x"}]
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        tool_world(0, 1, **settings)


def test_where_the_call_decides_the_thought_is_filler_and_names_are_the_templates() -> None:
    for sample in tool_world(7, 60, decision="call"):
        assert set((sample.thought or "").split()) <= set(FILLER)
        assert len((sample.thought or "").split()) in FILLER_LENGTHS
        for function in functions(sample):
            verb, noun = function["name"].split("_")
            assert function["description"] == f"{verb} {noun}"
            assert all(key == value["description"] for key, value in function["parameters"]["properties"].items())


def test_the_asked_tools_are_the_same_wherever_it_is_decided() -> None:
    first, second = tool_world(3, 1)[0], tool_world(3, 1, decision="call")[0]
    assert [f["description"] for f in functions(first)] == [f["description"] for f in functions(second)]
