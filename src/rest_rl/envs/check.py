"""Check an environment before training in it: sessions that start, repeat and stay apart, and rewards that tell.

No model is needed: scripted policies take the place of one. `gold` makes the gold calls, `empty` answers at once,
`random` makes random calls, `repeat` makes the first gold call over and over, `partial` makes a random part of the gold
calls with random calls in between.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rest_rl.data.samples import to_message_call
from rest_rl.envs.guard import Guard, Limits
from rest_rl.envs.rollout import add_rewards, cut_result, derive_seed, make_result_messages
from rest_rl.envs.session import Environment, Message, Result, Task
from rest_rl.response import ToolCall
from rest_rl.statistics import compute_auc

CALLS = 6
"""Calls of the policies `random` and `repeat`."""
PARTIAL_ROLLOUTS = 3
"""Rollouts of the policy `partial` per task."""
MISLEADING_AUC = 0.4
"""A step reward that predicts success worse than this points the wrong way; 0.5 is chance."""

Status = Literal["ok", "warning", "failed", "not checked"]


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    status: Status
    text: str


class Rollout(NamedTuple):
    """What a scripted policy did and got. `failure` says why the session failed, if it did."""

    calls: list[ToolCall]
    results: list[Result]
    reward: float | None
    success: bool
    failure: str
    seconds: float
    messages: list[Message]

    @property
    def texts(self) -> list[str]:
        """The results as the model would see them."""
        return [result.text for result in self.results]


@dataclass(frozen=True)
class EnvironmentReport:
    """The findings of `check_environment`, and the mean reward, its spread and the success rate of each policy."""

    findings: tuple[Finding, ...]
    policies: Mapping[str, Mapping[str, float]]

    @property
    def has_failed(self) -> bool:
        """Whether a check failed."""
        return any(finding.status == "failed" for finding in self.findings)


def check_environment(
    environment: Environment,
    *,
    number: int = 20,
    seed: int = 0,
    limits: Limits | None = None,
    on_task: Callable[[int], Any] = lambda done: None,
) -> EnvironmentReport:
    """Try an environment on the first tasks of each split; a mistake in it becomes a finding, not an exception.

    `on_task` is called with the number of finished tasks.
    """
    limits = limits or Limits()
    tasks, findings = _draw_tasks(environment, number, seed)
    found = _Measurements()
    for done, task in enumerate(tasks, 1):
        _try_task(environment, task, derive_seed(seed, task.get("id", done - 1)), limits, found)
        on_task(done)
        if len(found.failures) == done >= 3:  # nothing starts: more tasks would only wait for more time limits
            break
    findings += found.judge()
    policies = {name: _describe_policy(rollouts) for name, rollouts in found.rollouts.items() if rollouts}
    return EnvironmentReport(tuple(findings), policies)


def _draw_tasks(environment: Environment, number: int, seed: int) -> tuple[list[Task], list[Finding]]:
    tasks: list[Task] = []
    counts, problems = [], []
    for split in environment.splits:
        own, again = (environment.tasks(split, seed, number) for _ in range(2))
        counts.append(f"{split} {len(own)}{'+' if len(own) == number else ''}")
        if list(own) != list(again):
            problems.append(f"the tasks of {split} change from call to call")
        tasks += own
    identities = [task.get("id") for task in tasks]
    if len(set(map(str, identities))) < len(identities):
        problems.append("several tasks have the same id")
    if not tasks:
        problems.append("there are no tasks")
    return tasks, [Finding("tasks", "failed" if problems else "ok", "; ".join(problems) or ", ".join(counts))]


class _Measurements:
    def __init__(self) -> None:
        names = ("gold", "empty", "random", "repeat", "partial")
        self.rollouts: dict[str, list[Rollout]] = {name: [] for name in names}
        self.failures: list[str] = []
        self.starts: list[float] = []
        self.schemas: list[str] = []
        self.changed: list[str] = []
        self.shared: list[str] = []
        self.after_end: list[str] = []
        self.ended = 0
        self.has_gold = False

    def judge(self) -> list[Finding]:
        if self.failures:
            text = f"{len(self.failures)} sessions: {self.failures[0]}"
            return [Finding("sessions start", "failed", text)]
        every = [rollout for rollouts in self.rollouts.values() for rollout in rollouts]
        per_call = [rollout.seconds / len(rollout.calls) for rollout in every if rollout.calls]
        speed = f"{1000 * statistics.median(self.starts):.2g} ms"
        calls = f"{1000 * statistics.median(per_call):.2g} ms" if per_call else "no calls"
        broken = [rollout.failure for rollout in every if rollout.failure]
        return [
            Finding("sessions start", "ok", f"{speed} each, {calls} a call"),
            _list_problems("schemas", self.schemas, "valid, every tool described", "warning"),
            _list_problems("equal seeds", self.changed, "equal tasks and seeds give equal sessions"),
            _list_problems("isolation", self.shared, "sessions do not see each other"),
            _list_problems("sessions survive", broken, "no call or score failed"),
            self._judge_end(),
            *self._judge_rewards(),
            *self._judge_step_rewards(every),
        ]

    def _judge_end(self) -> Finding:
        if not self.ended:
            return Finding("end", "not checked", "no gold path ended with done = True; rollouts end with an answer")
        return _list_problems("end", self.after_end, "calls after the end change no reward", "warning")

    def _judge_rewards(self) -> list[Finding]:
        gold, empty = self.rollouts["gold"], self.rollouts["empty"]
        if self.has_gold:
            lost = [rollout for rollout in gold if not rollout.success]
            text = f"{len(gold) - len(lost)} of {len(gold)} gold paths succeed"
            findings = [Finding("gold path", "failed" if lost else "ok", text)]
        else:
            findings = [Finding("gold path", "not checked", "the sessions have no gold_calls()")]
        solved = sum(rollout.success for rollout in empty)
        status: Status = "failed" if empty and solved == len(empty) else "warning" if solved else "ok"
        findings.append(Finding("empty path", status, f"succeeds at {solved} of {len(empty)} tasks"))
        rewards = [r.reward for rollouts in self.rollouts.values() for r in rollouts if r.reward is not None]
        unscored = sum(r.reward is None for rollouts in self.rollouts.values() for r in rollouts)
        if not rewards:
            findings.append(Finding("rewards", "failed", "no rollout was scored: every reward is None"))
        elif min(rewards) == max(rewards) and not self.has_gold:
            text = f"every rollout gets {rewards[0]:g}, but nothing calls the right tools: add gold_calls()"
            findings.append(Finding("rewards", "warning", text))
        elif min(rewards) == max(rewards):
            findings.append(Finding("rewards", "failed", f"every rollout gets {rewards[0]:g}: nothing can be learned"))
        else:
            text = f"{min(rewards):g} to {max(rewards):g}" + (f", {unscored} rollouts unscored" if unscored else "")
            findings.append(Finding("rewards", "ok", text))
        return findings

    def _judge_step_rewards(self, every: Sequence[Rollout]) -> list[Finding]:
        # A tool that a rollout does not call earns 0 there.
        names = {call.name for rollout in every for call in rollout.calls}
        earned = [_sum_by_tool(rollout) for rollout in every]
        is_rewarded = any(result.reward is not None for rollout in every for result in rollout.results)
        if not is_rewarded:
            return [Finding("step rewards", "not checked", "no call is rewarded")]
        successes = [rollout.success for rollout in every]
        values = {"all calls": [sum(sums.values()) for sums in earned]}
        values |= {name: [sums.get(name, 0.0) for sums in earned] for name in sorted(names)}
        found = {
            name: auc
            for name, own in values.items()
            if (auc := compute_auc(list(zip(own, successes, strict=True)))) is not None
        }
        wrong = [f"{name} {auc:.2f}" for name, auc in found.items() if auc < MISLEADING_AUC]
        if wrong:
            text = f"point away from success (AUC, chance is 0.5): {', '.join(wrong)}"
            return [Finding("step rewards", "warning", text)]
        if "all calls" not in found:
            return [Finding("step rewards", "not checked", "too few rollouts to tell")]
        return [Finding("step rewards", "ok", f"their sum predicts success with an AUC of {found['all calls']:.2f}")]


def _sum_by_tool(rollout: Rollout) -> dict[str, float]:
    sums: dict[str, float] = {}
    for call, result in zip(rollout.calls, rollout.results, strict=False):
        sums[call.name] = sums.get(call.name, 0.0) + (result.reward or 0.0)
    return sums


def _list_problems(name: str, problems: Sequence[str], fine: str, status: Status = "failed") -> Finding:
    if not problems:
        return Finding(name, "ok", fine)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Finding(name, status, problems[0] + more)


def _try_task(environment: Environment, task: Task, seed: int, limits: Limits, found: _Measurements) -> None:
    identity, rng = task.get("id"), random.Random(seed)

    def start() -> Guard:
        return Guard(environment, task, seed, limits)

    begin = time.perf_counter()
    with closing(start()) as guard:
        guard.wait_for_start()
        found.starts.append(time.perf_counter() - begin)
        if guard.failure:
            found.failures.append(f"task {identity!r}: {guard.failure}")
            return
        gold = guard.gold_calls or []
        tools = [tool["function"] for tool in guard.tools]
        found.schemas += [f"{tool['name']} has no description" for tool in tools if not tool.get("description")]
        if not tools:
            found.schemas.append(f"task {identity!r} has no tools")
        found.has_gold = found.has_gold or bool(gold)
        tries = [random_call(rng, tools) for _ in range(CALLS)] if tools else []
        probe = gold or tries
        first = make_calls(guard, probe)
        found.rollouts["gold" if gold else "random"].append(first)
    _compare_sessions(start, probe, first, identity, found)
    if gold:
        _try_after_end(start, gold, first, identity, found)
        found.rollouts["random"].append(run_calls(start(), tries))
        found.rollouts["repeat"].append(run_calls(start(), [gold[0]] * CALLS))
        for _ in range(PARTIAL_ROLLOUTS):
            calls = [call for call in gold if rng.random() < 0.7]
            for _ in range(rng.randrange(3)):
                calls.insert(rng.randint(0, len(calls)), random_call(rng, tools))
            found.rollouts["partial"].append(run_calls(start(), calls))
    found.rollouts["empty"].append(run_calls(start(), []))


def _compare_sessions(
    start: Callable[[], Guard], calls: Sequence[ToolCall], first: Rollout, identity: Any, found: _Measurements
) -> None:
    # One session acts while another one waits: whatever the second one sees of it, it would see in training too.
    acting, waiting = start(), start()
    with closing(acting), closing(waiting):
        for guard in (acting, waiting):
            guard.wait_for_start()
        if (acting.messages, acting.tools, acting.first_state) != (
            waiting.messages,
            waiting.tools,
            waiting.first_state,
        ):
            found.changed.append(f"task {identity!r}: two sessions start differently")
        for call in calls:
            acting.start_calls([call])()
        if waiting.read("state") != waiting.first_state:
            found.shared.append(f"task {identity!r}: calls in one session change the state of another")
        second = run_calls(waiting, calls)
    if second.texts != first.texts or second.reward != first.reward:
        found.shared.append(f"task {identity!r}: a session that started next to another one gives other results")
    alone = run_calls(start(), calls)
    if alone.texts != first.texts or alone.reward != first.reward:
        found.changed.append(f"task {identity!r}: the same calls have other results or another reward")


def _try_after_end(
    start: Callable[[], Guard], gold: Sequence[ToolCall], first: Rollout, identity: Any, found: _Measurements
) -> None:
    if not any(result.done for result in first.results):
        return
    found.ended += 1
    guard = start()
    for call in gold:
        guard.wait_for_start()
        guard.start_calls([call])()
    guard.done = False  # let one more call through
    after = run_calls(guard, [gold[0]], earlier=first.results)
    if after.reward is not None and first.reward is not None and after.reward > first.reward:
        found.after_end.append(f"task {identity!r}: a call after the end earns {after.reward - first.reward:+g}")


def run_calls(guard: Guard, calls: Sequence[ToolCall], earlier: Sequence[Result] = ()) -> Rollout:
    """Make calls as `make_calls` does, and close the session."""
    with closing(guard):
        return make_calls(guard, calls, earlier)


def make_calls(
    guard: Guard, calls: Sequence[ToolCall], earlier: Sequence[Result] = (), answer: str | None = None
) -> Rollout:
    """Make calls one by one, answer (by default as gold does after calls), and score the rollout."""
    guard.wait_for_start()
    messages: list[Message] = list(guard.messages)
    results: list[Result] = []
    begin = time.perf_counter()
    for call in calls:
        if guard.failure or guard.done:
            break
        results += guard.start_calls([call])()
        messages.append({"role": "assistant", "content": "", "tool_calls": [to_message_call(call, id="call_0")]})
        text = cut_result(results[-1].text, guard.limits.result_tokens, None)
        messages += make_result_messages([call.name], [text])
    seconds = time.perf_counter() - begin
    messages.append({"role": "assistant", "content": answer or (guard.gold_answer if calls else "done")})
    verdict = guard.verify(messages)
    reward = add_rewards([*(each.reward for each in (*earlier, *results)), verdict.reward if verdict else None])
    parts = verdict.parts if verdict else {}
    success = not guard.failure and parts.get("success", reward or 0.0) >= 1 - 1e-9
    return Rollout(list(calls[: len(results)]), results, reward, success, guard.failure, seconds, messages)


def random_call(rng: random.Random, tools: Sequence[Mapping[str, Any]]) -> ToolCall:
    """Return a random call that fits the schema of a random tool, as far as its types go."""
    tool = rng.choice(tools)
    value = random_value(rng, tool.get("parameters") or {"type": "object"})
    return ToolCall(tool["name"], value if isinstance(value, dict) else {})


def random_value(rng: random.Random, schema: Any, depth: int = 0) -> Any:
    """Return a random value for a JSON schema; it follows `enum`, `type`, `items`, `properties` and `minimum` only."""
    if not isinstance(schema, Mapping) or depth > 5:
        return "x"
    if schema.get("enum"):
        return rng.choice(list(schema["enum"]))
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return random_value(rng, rng.choice(list(options)), depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = rng.choice(kind) if isinstance(kind, list) else kind
    if kind == "object":
        required = schema.get("required") or ()
        chosen = {
            name: own
            for name, own in (schema.get("properties") or {}).items()
            if name in required or rng.random() < 0.5
        }
        return {name: random_value(rng, own, depth + 1) for name, own in chosen.items()}
    if kind == "array":
        return [random_value(rng, schema.get("items") or {}, depth + 1) for _ in range(rng.randint(1, 2))]
    low = schema.get("minimum", 0)
    values = {"integer": int(low) + rng.randrange(10), "number": low + rng.random(), "boolean": rng.random() < 0.5}
    return values.get(kind, None if kind == "null" else rng.choice(("a", "b", "1", "paris", "2026-01-01")))


def _describe_policy(rollouts: Sequence[Rollout]) -> dict[str, float]:
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return {
        "n": len(rollouts),
        "reward": statistics.mean(rewards) if rewards else float("nan"),
        "spread": statistics.pstdev(rewards) if rewards else float("nan"),
        "success": sum(rollout.success for rollout in rollouts) / len(rollouts),
    }
