"""Tasks on BFCL's backends: seeded, isolated, gold worth full marks, none from BFCL's own samples."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from rest_rl.envs.bfcl import ACTIONS, BFCL, HELD_OUT, SPLITS, STEP_SHARE, Action, draw_state, fill_phrase
from rest_rl.envs.bfcl_sandbox.package import find_package
from rest_rl.envs.bfcl_sandbox.sandbox import Sandbox
from rest_rl.envs.check import check_environment
from rest_rl.envs.load import load_environment
from rest_rl.envs.session import OPTIONAL_METHODS
from rest_rl.errors import UserError

N = 50


@pytest.fixture(scope="module")
def world() -> BFCL:
    try:
        find_package("v4")
    except UserError as error:
        pytest.skip(str(error))
    return BFCL()


@pytest.fixture(scope="module")
def tasks(world: BFCL) -> dict[str, list[Any]]:
    return {split: world.tasks(split, 0, N) for split in SPLITS}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def make_task(backend: str, *gold: dict[str, Any], **config: Any) -> dict[str, Any]:
    state, _ = draw_state(random.Random(0), backend)
    tools = sorted({action.method for action in ACTIONS if action.backend == backend})
    return {"id": "1", "request": "?", "backends": [backend], "config": {backend: state | config}, "tools": tools,
            "gold": list(gold)}  # fmt: skip


def play(session: Any, *calls: dict[str, Any]) -> tuple[list[float], float]:
    """Make calls; return the reward of each, and the final one."""
    return [session.call_tool(**each).reward for each in calls], session.verify([]).reward


def test_equal_arguments_give_equal_tasks(world, tasks):
    assert json.loads(json.dumps(tasks)) == tasks
    for split in SPLITS:
        assert BFCL().tasks(split, 0, 5) == tasks[split][:5]
        assert world.tasks(split, 1, 5) != tasks[split][:5]
    every = [task["id"] for split in SPLITS for task in tasks[split]]
    assert len(set(every)) == 2 * N
    with pytest.raises(UserError):
        world.tasks("test", 0, 1)


def test_training_neither_needs_nor_offers_the_unseen_tools(tasks):
    for task in tasks["train"]:
        assert HELD_OUT.isdisjoint(task["tools"])
    for task in tasks["unseen_tools"]:
        assert not HELD_OUT.isdisjoint(each["name"] for each in task["gold"])
    for task in [*tasks["train"], *tasks["unseen_tools"]]:
        assert {each["name"] for each in task["gold"]} < set(task["tools"])
        assert 2 <= len(task["gold"]) <= 4


def list_values(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [each for item in items for each in list_values(item)]
    return [value]


def test_requests_mention_every_value(tasks):
    # Except for what the words of a phrase imply: "start the engine", "count the words", "lock the doors", ...
    implied = ("w", "START", "engage", "on")
    for task in [*tasks["train"], *tasks["unseen_tools"]]:
        values = list_values([each["arguments"] for each in task["gold"] if each["name"] != "pressBrakePedal"])
        shown = [value for value in values if value not in implied and not isinstance(value, bool)]
        assert all(json.dumps(value) in task["request"] for value in shown)


@pytest.mark.parametrize("split", SPLITS)
def test_the_gold_path_gets_1_and_the_empty_path_0(world, tasks, split):
    for task in tasks[split]:
        session = world.open(task, 0)
        steps, final = play(session, *session.gold_calls())
        assert sum(steps) == pytest.approx(STEP_SHARE)
        assert final == pytest.approx(1 - STEP_SHARE)
        assert session.verify([]).parts == {"success": 1.0, "progress": 1.0}
        assert play(world.open(task, 0)) == ([], 0.0)
        assert {"state", "state_hash", "gold_calls"} <= OPTIONAL_METHODS.keys() & set(dir(session))


def test_no_task_is_one_of_bfcl(tasks):
    with Sandbox(find_package("v4")) as sandbox:
        entries = sandbox.entries("multi_turn_base")
    states = {json.dumps([name, state], sort_keys=True) for e in entries for name, state in e["initial_config"].items()}
    assert len(states) > 100
    for task in [*tasks["train"], *tasks["unseen_tools"]]:
        own = {json.dumps([name, state], sort_keys=True) for name, state in task["config"].items()}
        assert states.isdisjoint(own)


def test_a_result_counts_when_it_was_seen(world):
    # Two needed calls share 0.3: 0.15 each, then 0.7.
    task = make_task("TicketAPI", call("get_ticket", ticket_id=101), call("close_ticket", ticket_id=105))
    read, change = task["gold"]
    assert play(world.open(task, 0), change) == ([0.15], 0.0)
    assert play(world.open(task, 0), call("get_ticket", ticket_id=102), change) == ([0.0, 0.15], 0.0)
    steps, final = play(world.open(task, 0), read, read, change)
    assert steps == [0.15, 0.0, 0.15]
    assert final == pytest.approx(0.7)
    # An additional change spoils the state.
    assert play(world.open(task, 0), read, change, call("close_ticket", ticket_id=103))[1] == 0.0


def test_a_failed_call_is_an_error_and_pays_nothing(world):
    session = world.open(make_task("TicketAPI", call("close_ticket", ticket_id=105)), 0)
    result = session.call_tool("close_ticket", {"ticket_id": 999})
    assert (result.error, result.reward, result.done) == ("failed call", 0.0, False)
    assert "999" in result.text
    assert session.call_tool("close_ticket", {"ticket": 105}).error == "failed call"


def test_sessions_share_no_state(world):
    # In the backend, tweets without mentions share the default list of the method, across sessions.
    tweet, mention = call("post_tweet", content="hello"), call("mention", tweet_id=6, mentioned_usernames=["@a"])
    task = make_task("TwitterAPI", tweet)
    first, second = world.open(task, 0), world.open(task, 0)
    play(first, tweet, mention)
    play(second, tweet)
    assert first.state()["TwitterAPI"]["tweets"]["6"]["mentions"] == ["@a"]
    assert second.state()["TwitterAPI"]["tweets"]["6"]["mentions"] == []
    assert second.verify([]).parts["success"] == 1.0
    assert first.state_hash() != second.state_hash()


def test_a_call_over_the_limit_ends_only_its_own_session(world):
    task = make_task("MathAPI", call("add", a=1, b=2))
    result = world.open(task, 0).call_tool("power", {"base": 7, "exponent": 10**9})
    assert (result.done, result.error) == (True, "limit")
    assert play(world.open(task, 0), task["gold"][0]) == ([STEP_SHARE], pytest.approx(0.7))


def test_a_folder_in_itself_is_only_a_wrong_state(world):
    folder = {"type": "directory", "contents": {}}
    root = {"root": {"home": {"type": "directory", "contents": {"a": folder}}}}
    session = world.open(make_task("GorillaFileSystem", call("mkdir", dir_name="b"), **root), 0)
    steps, final = play(session, call("cp", source="a", destination="a"), call("mkdir", dir_name="b"))
    assert (steps[0], final) == (0.0, 0.0)
    assert session.call_tool("pwd", {}).error == ""


def test_a_phrase_shows_all_but_hidden_values():
    phrase = 'set {a.b:small} {unit:="km"} of {names:lists}{hidden:~true}'
    text, made = fill_phrase(random.Random(0), Action("B", "f", phrase, True), {"small": [3], "lists": [["x", "y"]]})
    assert text == 'set 3 "km" of "x", "y"'
    assert made == call("f", a={"b": 3}, unit="km", names=["x", "y"], hidden=True)


def test_the_check_passes(world):
    report = check_environment(load_environment("bfcl-tasks"), number=5)
    assert not report.has_failed
    assert report.policies["gold"]["success"] == 1.0
    assert report.policies["random"]["success"] == report.policies["empty"]["success"] == 0.0
