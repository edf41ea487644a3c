from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rest_rl.cli.app import app
from rest_rl.envs.check import check_environment, random_value
from rest_rl.envs.guard import Limits
from rest_rl.envs.load import load_environment
from rest_rl.envs.session import Result
from rest_rl.envs.shop import Shop
from rest_rl.statistics import compute_auc
from tests.live_environment import Counter, CounterSession, describe

EXAMPLES = Path(__file__).parent.parent / "examples"


def statuses(environment, number=4, **settings):
    report = check_environment(environment, number=number, limits=Limits(timeout=5), **settings)
    return {finding.name: finding.status for finding in report.findings}, report


def test_the_shop_passes():
    found, report = statuses(Shop(), number=6)
    assert set(found.values()) <= {"ok", "not checked"}
    assert not report.has_failed
    assert report.policies["gold"]["success"] == 1
    assert report.policies["empty"]["success"] == report.policies["random"]["success"] == 0
    assert report.policies["gold"]["reward"] > report.policies["partial"]["reward"] > report.policies["empty"]["reward"]


def test_the_example_passes_and_its_tasks_end_with_the_first_effect():
    found, report = statuses(load_environment(f"{EXAMPLES / 'own_tools.py'}:Assistant"))
    assert set(found.values()) <= {"ok", "not checked"}
    assert report.policies["gold"]["success"] == report.policies["repeat"]["success"] == 1


def faulty(**methods):
    """A counter whose sessions have other methods."""
    session = type("Session", (CounterSession,), methods)

    class Faulty(Counter):
        def open(self, task, seed):
            return session(0)

    return Faulty()


SHARED = {"sum": 0}


def add_to_shared(self, name, arguments):
    SHARED["sum"] += 1
    self.sum += arguments["x"]
    return Result(str(SHARED["sum"]), reward=0.25)


@pytest.mark.parametrize(
    ("check", "methods"),
    [
        ("equal seeds", {"call_tool": lambda self, name, arguments: Result(str(random.random()))}),
        ("isolation", {"call_tool": add_to_shared, "state": lambda self: dict(SHARED)}),
        ("sessions survive", {"verify": lambda self, messages: 1 / 0}),
        ("gold path", {"verify": lambda self, messages: Result(reward=0.1)}),
        ("empty path", {"verify": lambda self, messages: Result(reward=1.0)}),
        ("rewards", {"call_tool": lambda self, n, a: Result("x"), "verify": lambda self, messages: Result()}),
        (
            "sessions start",
            {"list_tools": lambda self: [{"type": "function", "function": {"name": "f", "parameters": 7}}]},
        ),
    ],
)
def test_each_mistake_is_found(check, methods):
    found, report = statuses(faulty(**methods))
    assert found[check] == "failed"
    assert report.has_failed


def test_a_constant_reward_teaches_nothing():
    environment = faulty(
        call_tool=lambda self, name, arguments: Result("x"), verify=lambda self, messages: Result(reward=0.5)
    )
    assert statuses(environment)[0]["rewards"] == "failed"


def test_a_step_reward_that_points_away_from_success():
    # g earns, and every g spoils the task.
    def call_tool(self, name, arguments):
        self.spoiled = getattr(self, "spoiled", False) or name == "g"
        self.sum += name == "f"
        return Result("ok", reward=float(name == "g"))

    environment = faulty(
        list_tools=lambda self: [describe("f", x={"type": "integer"}), describe("g", x={"type": "integer"})],
        call_tool=call_tool,
        verify=lambda self, messages: Result(
            reward=0.0, parts={"success": float(self.sum >= 2 and not getattr(self, "spoiled", False))}
        ),
    )
    found, report = statuses(environment, number=20)
    assert found["step rewards"] == "warning"
    assert "g 0." in next(finding.text for finding in report.findings if finding.name == "step rewards")


def test_tasks_that_change_or_repeat_are_found():
    class Changing(Counter):
        def tasks(self, split, seed, number):
            return [{"id": f"{random.random()}", "start": 0}]

    class Repeated(Counter):
        def tasks(self, split, seed, number):
            return [{"id": "same", "start": 0}] * 2

    assert statuses(Changing())[0]["tasks"] == statuses(Repeated())[0]["tasks"] == "failed"


def test_auc_by_hand():
    successes, failures = [3.0, 2.0, 2.0, 1.0, 5.0], [1.0, 2.0, 0.0, 0.0, 0.0]
    rows = [(value, True) for value in successes] + [(value, False) for value in failures]
    # pairs won: 3 -> 5, 2 -> 4 + 1/2 (twice), 1 -> 3 + 1/2, 5 -> 5
    assert compute_auc(rows) == pytest.approx((5 + 4.5 + 4.5 + 3.5 + 5) / 25)
    assert compute_auc(rows[:8]) is None


def test_random_values_fit_simple_schemas():
    schema = {
        "type": "object",
        "properties": {
            "kind": {"type": "string", "enum": ["a", "b"]},
            "sizes": {"type": "array", "items": {"type": "integer", "minimum": 3}},
            "inner": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
        },
        "required": ["kind", "sizes", "inner"],
    }
    import jsonschema

    values = [random_value(random.Random(seed), schema) for seed in range(50)]
    assert all(jsonschema.Draft202012Validator(schema).is_valid(value) for value in values)
    assert {value["kind"] for value in values} == {"a", "b"}


def test_a_task_is_not_opened_more_often_than_needed():
    environment = Counter()
    check_environment(environment, number=1)
    # per split: gold alone, twice next to each other and once more, random, repeat, three times partial, and empty
    assert len(environment.sessions) == 2 * 10


def test_the_command():
    result = CliRunner().invoke(app, ["env", "check", "shop", "-n", "2", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout[result.stdout.index("{") :])
    assert {finding["name"]: finding["status"] for finding in report["findings"]}["gold path"] == "ok"
    assert report["policies"]["gold"]["n"] == 6
