"""Demonstrations of the tool world: the right ones score full marks, and one defect is never fully right."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from research.demonstrations import DEFECTS, Defect, render_corrupted_demonstration, render_demonstration
from rest_rl.data.tool_world import SPLITS, tool_world
from rest_rl.formats import get_format
from tests.scores import exact_match, score

TRAIN = tool_world(0, 600)


@pytest.mark.parametrize("name", ["toolrl", "hermes"])
def test_every_demonstration_scores_full_marks(name: str) -> None:
    tool_format = get_format(name)
    for split in SPLITS:
        for sample in tool_world(6, 150, split):
            parsed = tool_format.parse(render_demonstration(sample, name))
            assert exact_match(parsed, sample.gold)
            assert score(parsed, sample.gold)[1:3] == (1.0, 1.0)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_corrupted_demonstration_is_never_fully_right(defect: Defect) -> None:
    rng, tool_format = random.Random(0), get_format("toolrl")
    for sample in TRAIN[:150]:
        reward = score(tool_format.parse(render_corrupted_demonstration(sample, rng, defect)), sample.gold)
        assert reward.format < 1 or reward.accuracy < 1
        if defect not in ("broken_tag", "missing_call") and sample.kind != "none":
            assert reward.format == 1


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defective_call_keeps_its_filler(defect: Defect) -> None:
    for sample in tool_world(7, 40, decision="call"):
        assert score(get_format("toolrl").parse(render_demonstration(sample)), sample.gold).total == pytest.approx(1.0)
        response = render_corrupted_demonstration(sample, random.Random(1), defect)
        parsed = get_format("toolrl").parse(response)
        assert score(parsed, sample.gold).total < 1
        assert (sample.thought or "") in response


def test_a_defective_call_without_a_thought_is_explained() -> None:
    sample = next(sample for sample in TRAIN if sample.gold.calls)
    response = render_corrupted_demonstration(replace(sample, thought=None), random.Random(1), "wrong_tool")
    assert response == render_corrupted_demonstration(sample, random.Random(1), "wrong_tool")
