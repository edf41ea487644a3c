from __future__ import annotations

import json
import threading
import time

import pytest

import rest_rl
from rest_rl.data.layout import PromptLayout
from rest_rl.envs.guard import Guard, Limits
from rest_rl.envs.rollout import derive_seed
from rest_rl.envs.session import Result
from rest_rl.envs.shop import Shop
from rest_rl.errors import UserError
from rest_rl.evaluate.benchmarks.environment import EnvironmentTasks, compute_pass_hat
from rest_rl.evaluate.conversation import Model, Reply
from rest_rl.evaluate.models.local import LocalModel
from rest_rl.evaluate.plan import Plan
from rest_rl.evaluate.request import EvalRequest
from rest_rl.evaluate.run import context_notes, preview
from rest_rl.formats import get_format
from rest_rl.statistics import wilson_interval
from tests.live_environment import TEMPLATE, Counter
from tests.tiny_policy import tiny_model, tiny_tokenizer


class Scripted(Model):
    """Says one text per turn and keeps the requests."""

    batch_size = 4

    def __init__(self, texts):
        self.texts, self.requests = texts, []

    def respond(self, requests):
        self.requests += requests
        return [Reply(self.texts[request.step]) for request in requests]


def call(x):
    return f'<think> a </think>\n<tool_call>\n{{"name": "f", "parameters": {{"x": {x}}}}}\n</tool_call>'


ANSWER = "<think> a </think>\n<response> ok </response>"


def evaluate(texts, tmp_path, **settings):
    benchmark = EnvironmentTasks(Counter(), seed=0, prompts=3, **settings)
    model = Scripted(texts)
    result = rest_rl.evaluate(benchmark, model, format="toolrl", out=str(tmp_path / "eval"))
    return result, model


def test_a_rollout_by_hand(tmp_path):
    result, model = evaluate([call(1), call(2), ANSWER], tmp_path)
    row = result.rows[0]
    assert (row["id"], row["correct"], row["reward"], row["stop"], row["turns"]) == (
        "test/test-0#0",
        True,
        1.0,
        "answered",
        3,
    )
    assert [call["arguments"]["x"] for call in row["calls"]] == [1, 2]
    assert row["parts"] == {"success": 1.0}
    assert result.summary["rollouts"] == {
        "reward": 1.0,
        "turns": 3.0,
        "call_count": 2.0,
        "ends": {"answered": 3},
        "errors": {},
    }
    roles = [message["role"] for message in model.requests[-1].sample.messages]
    assert roles == ["user", "assistant", "tool", "assistant", "tool"]
    assert result.scores()["overall"].correct == 3


def test_failures_errors_and_the_turn_limit(tmp_path):
    result, _ = evaluate([call(0)] * 2, tmp_path, limits=Limits(turns=2))
    assert [row["stop"] for row in result.rows] == ["turn limit"] * 3
    assert result.scores()["overall"].correct == 0
    result, _ = evaluate(['<tool_call>\n{"name": "g", "parameters": {}}\n</tool_call>', ANSWER], tmp_path / "2")
    assert result.summary["rollouts"]["errors"] == {"unknown tool": 3}


def test_a_model_that_renders_its_prompts_continues_its_own_text(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    layout = PromptLayout(tokenizer, "toolrl")
    _, model = evaluate([call(1), ANSWER], tmp_path, layout=layout)
    first, second = model.requests[0].text, model.requests[-1].text
    assert second == f"{first}{call(1)}<|im_end|>tool:1<|im_end|>assistant:"  # with its thought


def test_pass_hat_by_hand():
    # task a: 2 of 3, task b: 3 of 3
    rows = [
        {"id": f"{task}#{n}", "correct": right}
        for task, own in (("a", (1, 0, 1)), ("b", (1, 1, 1)))
        for n, right in enumerate(own)
    ]
    found = compute_pass_hat(rows, 3)
    assert [found[f"k={k}"]["value"] for k in (1, 2, 3)] == pytest.approx([5 / 6, (1 / 3 + 1) / 2, 1 / 2])
    # mean 1/2 of 0 and 1: standard deviation sqrt(1/2), error 1/2
    assert (found["k=3"]["low"], found["k=3"]["high"]) == (0.0, 1.0)
    assert found["k=1"]["high"] - found["k=1"]["low"] == pytest.approx(1 - (5 / 6 - 1.96 / 6))


def test_the_interval_counts_attempts_at_one_task_as_dependent(tmp_path):
    class Lucky(Counter):
        """The first of the three tasks cannot be solved."""

        def open(self, task, seed):
            session = super().open(task, seed)
            if task["id"] == "test-0":
                session.verify = lambda messages: Result(parts={"success": 0.0})
            return session

    benchmark = EnvironmentTasks(Lucky(), seed=0, prompts=3, attempts=4)
    model = Scripted([call(1), call(2), ANSWER])
    result = rest_rl.evaluate(benchmark, model, format="toolrl", out=str(tmp_path / "eval"))
    found = result.scores()["overall"]
    assert (found.correct, found.n) == (8, 12)
    assert (found.low, found.high) == pytest.approx(wilson_interval(2, 3))  # all attempts at a task agree


def test_the_oracle_solves_the_shop_and_resumes(tmp_path):
    benchmark = EnvironmentTasks(Shop(), seed=1, prompts=4, attempts=2)
    result = rest_rl.evaluate(benchmark, oracle=True, format="toolrl", out=str(tmp_path / "oracle"))
    assert result.scores()["overall"].correct == len(benchmark.groups) == 16
    assert result.summary["pass_hat"]["k=2"]["value"] == 1.0
    lines = (tmp_path / "oracle" / "samples.jsonl").read_text().splitlines()
    (tmp_path / "oracle" / "samples.jsonl").write_text("\n".join(lines[:5]) + "\n")
    again = rest_rl.evaluate(benchmark, oracle=True, format="toolrl", out=str(tmp_path / "oracle"), resume=True)
    assert [json.dumps(row) for row in again.rows] == [json.dumps(row) for row in result.rows]


def test_only_some_tasks_are_opened_to_measure_their_prompts():
    environment = Counter()
    benchmark = EnvironmentTasks(environment, seed=0, prompts=20, attempts=2)
    plan, usages = Plan("training", "toolrl", ""), []

    def measure(request):
        usages.append(request.sample.id)
        return 5, 10

    assert len(context_notes(benchmark, measure, plan, list(benchmark.groups))) == 1
    # every third of 40, since every second would be more than 16: the attempts of each task are 2n and 2n + 1
    assert usages == [f"test/test-{n // 2}#{n % 2}" for n in range(0, 40, 3)]
    assert len(environment.sessions) == 14
    usages.clear()
    context_notes(benchmark, measure, plan, list(benchmark.groups)[:16])
    assert len(usages) == 16


def test_a_task_that_does_not_start_fails_and_the_others_go_on(tmp_path):
    class Broken(Counter):
        def open(self, task, seed):
            if task["id"] == "test-0":
                raise ConnectionError("no server")
            return super().open(task, seed)

    benchmark = EnvironmentTasks(Broken(), seed=0, prompts=3)
    model = Scripted([call(1), call(2), ANSWER])
    result = rest_rl.evaluate(benchmark, model, format="toolrl", out=str(tmp_path / "eval"))
    assert [row["stop"] for row in result.rows] == ["failed", "answered", "answered"]
    assert result.scores()["overall"].correct == 2
    with pytest.raises(UserError, match="test-0"):
        preview(EvalRequest(benchmark, model, format="toolrl"))


def test_attempts_share_the_seed_and_differ_in_their_samples():
    seeds = []

    class Seeded(Counter):
        def open(self, task, seed):
            seeds.append((task["id"], seed))
            return super().open(task, seed)

    benchmark = EnvironmentTasks(Seeded(), seed=0, prompts=2, attempts=3)
    requests = []
    for identity in benchmark.groups:
        conversation = benchmark.start(identity, get_format("toolrl"))
        requests.append(conversation.request())
        conversation.close()
    assert seeds == [(f"test-{n}", derive_seed(0, f"test-{n}")) for n in (0, 0, 0, 1, 1, 1)]
    # One request per batch: equal prompts, but not equal samples.
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    layout = PromptLayout(tokenizer, "toolrl")
    model = LocalModel(tiny_model(tokenizer), layout, batch_size=1, max_new_tokens=20, temperature=1.0)
    texts = [model.respond([request])[0].text for request in requests]
    assert len(set(texts)) > 1
    assert texts == [model.respond([request])[0].text for request in requests]


def test_a_session_that_starts_too_late_is_closed():
    release, opened = threading.Event(), []

    class Slow(Counter):
        def open(self, task, seed):
            release.wait(20)
            opened.append(super().open(task, seed))
            return opened[-1]

    guard = Guard(Slow(), {"id": "a", "start": 0}, 0, Limits(timeout=0.05))
    guard.wait_for_start()
    assert "no answer" in guard.failure
    guard.close()
    release.set()
    for _ in range(500):
        if opened and opened[0].closed:
            break
        time.sleep(0.01)
    assert opened[0].closed
