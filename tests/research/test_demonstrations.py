"""Demonstrations of the tool world: the right ones score full marks, single-call ones only where one call is right."""

from __future__ import annotations

import random

import pytest

from research.demonstrations import render_demonstration, render_single_call
from rest_rl.data.tool_world import SPLITS, Decision, tool_world
from rest_rl.formats import get_format
from tests.scores import exact_match, score

TOOLRL = get_format("toolrl")


@pytest.mark.parametrize("name", ["toolrl", "hermes"])
def test_every_demonstration_scores_full_marks(name: str) -> None:
    tool_format = get_format(name)
    for split in SPLITS:
        for sample in tool_world(6, 150, split):
            parsed = tool_format.parse(render_demonstration(sample, name))
            assert exact_match(parsed, sample.gold)
            assert score(parsed, sample.gold)[1:3] == (1.0, 1.0)


@pytest.mark.parametrize("decision", ["reasoning", "call"])
def test_a_single_call_is_right_only_where_one_call_is(decision: Decision) -> None:
    kinds = set()
    for sample in tool_world(7, 150, decision=decision):
        response = render_single_call(sample, random.Random(0))
        parsed = TOOLRL.parse(response)
        assert len(parsed.calls) == 1
        assert parsed.well_formed
        assert exact_match(parsed, sample.gold) == (len(sample.gold.calls) == 1)
        if sample.gold.calls:
            assert parsed.calls[0] == sample.gold.calls[0]
        else:  # a needless call, of an offered tool and with values of the request
            offered = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in sample.tools}
            assert parsed.calls[0].arguments.keys() == offered[parsed.calls[0].name].keys()
            request = sample.messages[-1]["content"]
            assert all(f'"{value}"' in request for value in parsed.calls[0].arguments.values())
        if decision == "call":
            assert (sample.thought or "") in response
        kinds.add(sample.kind)
    assert kinds == {"single", "parallel", "dependent", "none"}
