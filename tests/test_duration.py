"""The duration of a run: sums by hand, and costs measured with the trainer of a tiny policy, by kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rest_rl.config import RunConfig
from rest_rl.train.duration import Amounts, Costs, Duration, Range, format_seconds, predict_duration
from rest_rl.train.estimate import make_estimate_rows
from rest_rl.train.run import estimate_run, make_plan, predict_lengths, predict_turns
from rest_rl.train.trl.timing import pick_evenly, stretch, time_batch
from tests.live_environment import Counter
from tests.tiny_policy import tiny_run

COSTS = Costs(
    batch=2.0, batch_token=0.1, micro_batch=1.0, micro_batch_token=0.01, optimizer=0.5,
    held_out_batch=3.0, held_out_token=0.2,
)  # fmt: skip
AMOUNTS = Amounts(
    tokens=Range(51, 101), steps_per_batch=1, micro_batches=8, steps=10,
    held_out_tokens=Range(51, 101), held_out_batches=4, evaluations=2.5,
)  # fmt: skip


def test_a_duration_by_hand() -> None:
    found = predict_duration(COSTS, AMOUNTS)
    # with 51 tokens: 2 + 0.1 * 50 = 7 to generate, 8 * (1 + 0.01 * 51) + 0.5 = 12.58 to update; likewise with 101
    assert found.generation == pytest.approx((7, 12))
    assert found.update == pytest.approx((12.58, 16.58))
    # an evaluation with 51 tokens: 4 * (3 + 0.2 * 50) = 52; the run has 10 steps and 2.5 evaluations
    assert found.evaluation == pytest.approx((52, 92))
    assert found.run == pytest.approx((10 * 19.58 + 2.5 * 52, 10 * 28.58 + 2.5 * 92))
    # four optimizer steps share a batch of responses
    shared = predict_duration(COSTS, AMOUNTS._replace(steps_per_batch=4))
    assert shared.generation == pytest.approx((7 / 4, 3))
    assert shared.update == found.update


def test_turns_repeat_the_generation_by_hand() -> None:
    found = predict_duration(COSTS, AMOUNTS._replace(turns=2.5))
    # with 51 tokens a turn: 2.5 * 7 = 17.5 to generate, 8 * (1 + 0.01 * 127.5) + 0.5 = 18.7 to update, 2.5 * 52 = 130
    # to evaluate; likewise with 101: 2.5 * 12 = 30, 8 * (1 + 2.525) + 0.5 = 28.7 and 2.5 * 92 = 230
    assert found.generation == pytest.approx((17.5, 30))
    assert found.update == pytest.approx((18.7, 28.7))
    assert found.evaluation == pytest.approx((130, 230))
    assert found.run == pytest.approx((10 * 36.2 + 2.5 * 130, 10 * 58.7 + 2.5 * 230))


class ShortCounter(Counter):
    """Has one gold call more in every other task, unlike the counter with two in each, or none at all."""

    def __init__(self, has_gold: bool = True) -> None:
        super().__init__()
        self.has_gold = has_gold

    def open(self, task: Any, seed: int) -> Any:
        session = super().open(task, seed)
        calls = session.gold_calls() + session.gold_calls()[: int(task["id"][-1]) % 2]
        session.gold_calls = lambda: calls if self.has_gold else []
        return session


@pytest.mark.parametrize(
    ("options", "limit", "turns"),
    [
        ({}, 8, (3.5, 4)),  # two or three gold calls, and an answer
        ({}, 3, (3.0, 3)),  # no more than the limit
        ({"has_gold": False}, 8, (8.0, 8)),
    ],
)
def test_turns_follow_from_gold_calls_or_from_the_limit(
    tables: dict[str, Any], options: dict[str, Any], limit: int, turns: tuple[float, int]
) -> None:
    env = {"path": f"{__file__}:ShortCounter", "options": options, "turns": limit}
    tables = {key: value for key, value in tables.items() if key != "data"}
    assert predict_turns(make_plan({**tables, "env": env}, is_dry=True)) == turns


def test_supervised_training_has_no_generation() -> None:
    costs, none = COSTS._replace(batch=0.0, batch_token=0.0, micro_batch_token=0.0), Range(0, 0)
    found = predict_duration(costs, AMOUNTS._replace(tokens=none, held_out_tokens=none, held_out_batches=0))
    assert found == Duration(none, Range(8.5, 8.5), none, Range(85, 85))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (89, "89 s"),
        (90, "1.5 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
    ],
)
def test_seconds_have_a_unit_that_fits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_large_batch_follows_from_a_part_of_it() -> None:
    calls: list[tuple[int, int]] = []
    first, token = time_batch(lambda rows, tokens: calls.append((rows, tokens)), unit=4, total=64)
    # a warm-up, one unit, then the whole batch with one token and with 16 more, since this costs nothing
    assert calls == [(4, 2), (4, 1), (64, 1), (64, 17)]
    assert first >= 0 <= token
    assert pick_evenly("abcdefgh", 3) == ["a", "c", "f"]  # 0, 8 // 3, 16 // 3
    assert pick_evenly("ab", 4) == ["a", "a", "b", "b"]


def test_completions_are_repeated_to_the_wanted_length() -> None:
    ids_BT = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch: dict[str, Any] = {"completion_ids": ids_BT, "prompt_ids": ids_BT, "advantages": torch.ones(2), "n": 7}
    longer = stretch(batch, 5)
    assert longer["completion_ids"].tolist() == [[1, 2, 3, 1, 2], [4, 5, 6, 4, 5]]
    assert longer["prompt_ids"] is ids_BT
    assert (longer["advantages"].tolist(), longer["n"]) == ([1, 1], 7)
    assert stretch(batch, 0) == batch
    assert stretch(batch, 2)["completion_ids"].tolist() == [[1, 2], [4, 5]]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = tiny_run(tmp_path_factory.mktemp("tiny"))
    return {**found, "data": {**found["data"], "held_out": found["data"]["path"]}, "eval": {"prompts": 4, "every": 1}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # half a group per forward pass, bfloat16 and checkpointing
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "bf16": True,
            "gradient_checkpointing": True,
        },
    ],
)
def test_the_parts_of_a_tiny_run_are_measured(tables: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    estimate = estimate_run({**tables, "trl": {**tables["trl"], **changes}}, out=tmp_path / "run")
    found = estimate.duration
    assert found is not None
    assert all(0 < low <= high for low, high in found)
    # 4 steps; evaluations before, after and, with all prompts, at every step
    for parts in zip(*found, strict=True):
        generation, update, evaluation, whole = parts
        assert whole == pytest.approx(4 * (generation + update) + 6 * evaluation)
    assert len(make_estimate_rows(estimate)) == len(make_estimate_rows(replace(estimate, duration=None))) + 4
    assert not (tmp_path / "run").exists()


def test_supervised_training_is_measured_too(tables: dict[str, Any], tmp_path: Path) -> None:
    trl = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False}
    found = estimate_run({**tables, "eval": {}, "data": {"path": tables["data"]["path"]}, "trl": trl,
                          "rest": {"preset": "sft"}}, out=tmp_path / "run").duration  # fmt: skip
    assert found is not None
    assert found.generation == found.evaluation == (0, 0)
    assert found.run == pytest.approx((2 * found.update.low, 2 * found.update.high))


def test_a_batch_is_as_long_as_its_longest_gold(tables: dict[str, Any]) -> None:
    layout = make_plan(tables, is_dry=True).layout
    golds = ["1" * length for length in range(1, 10)]
    # the tokenizer has a token per digit: of the lengths 1 to 9, index 9 * 2 // 3 is 7, and one token ends it
    assert predict_lengths(golds, layout, number=2, limit=100) == (8, 100)
    assert predict_lengths(golds, layout, number=2, limit=5) == (5, 5)
    assert predict_lengths([], layout, number=2, limit=5) == (1, 5)
    assert RunConfig.from_tables(tables).eval.every == 1
