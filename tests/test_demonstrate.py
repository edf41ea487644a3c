from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rest_rl import UserError, write_demonstrations
from rest_rl.cli.app import app
from rest_rl.data import shop
from rest_rl.data.samples import decompose
from rest_rl.envs.demonstrate import demonstrate
from rest_rl.envs.guard import Limits
from rest_rl.envs.session import Result
from rest_rl.envs.shop import Shop
from tests.live_environment import Counter, CounterSession

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_tools.py"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def simplify(message: Mapping[str, Any]) -> tuple[Any, ...]:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return message["role"], message.get("content"), calls


@pytest.mark.parametrize("split", shop.SPLITS)
def test_demonstrations_of_the_shop_are_its_dialogues_without_thoughts(split: str) -> None:
    made = [found.dialogue for found in demonstrate(Shop(), 12, split, seed=3)]
    for dialogue, own in zip(made, islice(shop.dialogues(3, split), 12), strict=True):
        assert dialogue is not None
        for sample, expected in zip(decompose(dialogue), decompose(own), strict=True):
            assert sample.gold == expected.gold
            assert sample.thought in (None, "")
            assert sample.tools == expected.tools
            assert list(map(simplify, sample.messages)) == list(map(simplify, expected.messages))


def test_a_task_that_ends_with_a_call_has_no_answer_after_it(tmp_path: Path) -> None:
    written = write_demonstrations(f"{EXAMPLE}:Assistant", tmp_path / "demos.jsonl", number=9)
    rows = read(tmp_path / "demos.jsonl")
    assert written == (9, 9, ())
    assert [len(row["gold"]["calls"]) for row in rows] == [1] * 9
    assert {row["messages"][0]["role"] for row in rows} == {"user"}


def test_the_gold_answer_ends_the_others(tmp_path: Path) -> None:
    assert write_demonstrations("shop", tmp_path / "demos.jsonl", number=2).tasks == 2
    last = [row for row in read(tmp_path / "demos.jsonl") if not row["gold"]["calls"]]
    assert [row["gold"]["answer"] for row in last] == [shop.ANSWER] * 2


class Own(Counter):
    """The counter with tasks and sessions of a test's own; `tasks` maps ids to attributes of the sessions."""

    def __init__(self, tasks: Mapping[Any, Mapping[str, Any]], with_ids: bool = True) -> None:
        self.own, self.with_ids = tasks, with_ids

    def tasks(self, split: str, seed: int, number: int) -> list[Any]:
        return [{"id": name} if self.with_ids else {} for name in self.own][:number]

    def open(self, task: Any, seed: int) -> Any:
        return type("Session", (CounterSession,), dict(self.own[task.get("id", 0)]))(0)


def always(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def fail(*_: Any) -> Any:
    raise KeyError("boom")


SOLVED = {"verify": always(Result(parts={"success": 1.0}))}


@pytest.mark.parametrize(
    ("session", "reason"),
    [
        ({"verify": always(Result(reward=0.0))}, "reward 0.5, last result 2"),
        ({**SOLVED, "gold_calls": None}, "no gold calls"),
        ({**SOLVED, "gold_calls": always([{"name": "nope", "arguments": {}}])}, "there is no tool named nope"),
        ({**SOLVED, "gold_calls": always([{"name": "f", "arguments": {"x": "1"}}])}, "is not of type 'integer'"),
        ({**SOLVED, "gold_calls": always([{"name": "f", "arguments": "{"}])}, "gold_calls has"),
        ({**SOLVED, "gold_calls": always(["f"])}, "gold_calls has"),
        ({**SOLVED, "call_tool": fail}, "KeyError: 'boom'"),
        ({**SOLVED, "initial_messages": fail}, "start: KeyError"),
        ({**SOLVED, "verify": fail}, "verify: KeyError"),
        ({**SOLVED, "initial_messages": always([{"role": "user", "content": [{"type": "text"}]}])}, "content"),
    ],
)
def test_a_task_that_is_not_solved_is_left_out_with_the_reason(tmp_path: Path, session: Any, reason: str) -> None:
    written = write_demonstrations(Own({"a": SOLVED, "b": session}), tmp_path / "demos.jsonl")
    assert (written.samples, written.tasks, len(written.failures)) == (3, 1, 1)
    assert "'b'" in written.failures[0]
    assert reason in written.failures[0]
    assert [row["id"] for row in read(tmp_path / "demos.jsonl")] == ["a/0", "a/1", "a/2"]


def test_turns_of_the_prompt_are_not_demonstrated(tmp_path: Path) -> None:
    prompt = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    write_demonstrations(Own({"a": {**SOLVED, "initial_messages": always(prompt)}}), tmp_path / "demos.jsonl")
    rows = read(tmp_path / "demos.jsonl")
    assert len(rows) == 3
    assert all(row["messages"][:3] == prompt for row in rows)


def test_gold_may_be_an_answer_or_text(tmp_path: Path) -> None:
    tasks = {
        "answer": {**SOLVED, "gold_calls": always([]), "gold_answer": always("No.")},
        "number": {**SOLVED, "gold_answer": always(42)},
        "text": {**SOLVED, "gold_calls": always([{"name": "f", "arguments": '{"x": 3}'}])},
    }
    assert write_demonstrations(Own(tasks), tmp_path / "demos.jsonl").failures == ()
    rows = {row["id"]: row["gold"] for row in read(tmp_path / "demos.jsonl")}
    assert rows["answer/0"]["answer"] == "No."
    assert rows["number/2"]["answer"] == "42"
    assert rows["text/0"]["calls"] == [{"name": "f", "arguments": {"x": 3}}]


def test_long_results_are_cut(tmp_path: Path) -> None:
    session = {**SOLVED, "call_tool": always(Result("x" * 10_000))}
    write_demonstrations(Own({"a": session}), tmp_path / "demos.jsonl", limits=Limits(result_tokens=5))
    result = read(tmp_path / "demos.jsonl")[1]["messages"][-1]
    assert result["content"] == "x" * 20 + " [cut: 20 of 10000 characters]"


def test_tasks_without_ids_get_numbers_and_seeds_of_their_own() -> None:
    found = list(demonstrate(Own({0: SOLVED, 1: SOLVED}, with_ids=False), 2))
    assert [each.dialogue and each.dialogue.id for each in found] == ["0", "1"]
    seeds = []

    class Seeded(Own):
        def open(self, task: Any, seed: int) -> Any:
            seeds.append(seed)
            return super().open(task, seed)

    list(demonstrate(Seeded({0: SOLVED, 1: SOLVED}, with_ids=False), 2))
    assert len(set(seeds)) == 2


class Repeated(Own):
    def tasks(self, split: str, seed: int, number: int) -> list[Any]:
        return super().tasks(split, seed, number) * 2


class Unreachable(Own):
    def tasks(self, split: str, seed: int, number: int) -> list[Any]:
        raise ConnectionError("no network")


LOST = {**SOLVED, "initial_messages": fail}


@pytest.mark.parametrize(
    ("environment", "split", "message"),
    [
        (Own({"a": {"verify": always(Result(reward=0.0))}}), "", "no task was solved"),
        (Own({}), "", "there are no tasks"),
        (Own({"a": SOLVED}), "dev", "the split is 'dev'"),
        (Repeated({"a": SOLVED}), "", "several tasks have the same id"),
    ],
)
def test_mistakes_leave_the_file_as_it_is(tmp_path: Path, environment: Any, split: str, message: str) -> None:
    (tmp_path / "demos.jsonl").write_text("old")
    with pytest.raises(UserError, match=message):
        write_demonstrations(environment, tmp_path / "demos.jsonl", split=split)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_error_of_the_environment_is_not_one_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="no network"):
        write_demonstrations(Unreachable({}), tmp_path / "new" / "demos.jsonl")
    assert not list(tmp_path.iterdir())


def test_sessions_that_never_start_are_given_up(tmp_path: Path) -> None:
    tried = []
    with pytest.raises(UserError, match="start: KeyError"):
        write_demonstrations(Own(dict.fromkeys(range(9), LOST)), tmp_path / "demos.jsonl", on_task=tried.append)
    assert tried == [1, 2, 3]


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "demos.jsonl"
    result = CliRunner().invoke(
        app, ["env", "demonstrate", "shop", "--out", str(out), "-n", "3", "--split", "unseen_goals"]
    )
    assert result.exit_code == 0, result.output
    assert f"{len(read(out))} samples from 3 tasks" in result.output
    result = CliRunner().invoke(app, ["env", "demonstrate", "shop", "--out", str(tmp_path / "demos.txt")])
    assert isinstance(result.exception, UserError)
