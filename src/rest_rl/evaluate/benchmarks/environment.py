"""An environment as a benchmark: whole rollouts of its held-out tasks, for any model.

With a layout, a rollout continues the model's own text, so thoughts of earlier turns stay in its context, as in
training. Without one, every prompt is rendered from messages, without thoughts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rest_rl.data.layout import PromptLayout
from rest_rl.envs.guard import Guard, Limits
from rest_rl.envs.rollout import (
    Stop,
    Trajectory,
    Turn,
    cut_result,
    derive_seed,
    make_result_messages,
    make_sample,
    start_turn,
)
from rest_rl.envs.session import Environment, Task
from rest_rl.errors import UserError
from rest_rl.evaluate.conversation import Benchmark, Conversation, Reply, Request, parse_reply
from rest_rl.formats import ToolFormat
from rest_rl.response import Gold


class EnvironmentTasks(Benchmark):
    """The first `prompts` tasks of each held-out split (of the only split, if there is one), `attempts` times each."""

    group_field, cluster_field = "split", "task"
    measured_prompts = 16  # opening a session may start a server

    def __init__(
        self,
        environment: Environment,
        *,
        seed: int,
        prompts: int,
        attempts: int = 1,
        limits: Limits | None = None,
        layout: PromptLayout | None = None,
    ) -> None:
        self.environment, self.seed, self.attempts = environment, seed, attempts
        self.limits, self.layout = limits or Limits(), layout
        self.name = environment.name
        self.pin = f"{environment.name} (seed {seed}, {prompts} tasks per split, {attempts} attempts)"
        self.tasks: dict[str, tuple[str, Task]] = {}
        for split in environment.splits[1:] or environment.splits:
            for number, task in enumerate(environment.tasks(split, seed, prompts)):
                for attempt in range(attempts):
                    self.tasks[f"{split}/{task.get('id', number)}#{attempt}"] = split, task
        if not self.tasks:
            raise UserError(f"the environment {self.name} has no tasks", remedy="pass a file of tasks with --tasks")
        self.groups = {identity: split for identity, (split, _) in self.tasks.items()}

    def start(self, identity: str, tool_format: ToolFormat) -> EnvironmentConversation:
        # All attempts share the task's seed, as a group does in training: the seed can decide what the task is.
        _, task = self.tasks[identity]
        own = identity.partition("/")[2].rpartition("#")[0]
        guard = Guard(self.environment, task, derive_seed(self.seed, own), self.limits)
        return EnvironmentConversation(identity, task, guard, tool_format, self.layout)

    def extras(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return means per rollout, ends and errors by kind, and pass^k over tasks with a 95 % interval."""
        scored = [row for row in rows if "error" not in row]
        if not scored:
            return {}
        n, rewards = len(scored), [row["reward"] for row in scored if row.get("reward") is not None]
        errors = sum((Counter(row.get("errors") or {}) for row in scored), Counter[str]())
        means = {name: sum(row.get(name, 0) for row in scored) / n for name in ("turns", "call_count")}
        return {
            "rollouts": {
                "reward": sum(rewards) / len(rewards) if rewards else None,
                **means,
                "ends": dict(Counter(row.get("stop", "no response") for row in scored)),
                "errors": dict(errors),
            },
            "pass_hat": compute_pass_hat(scored, self.attempts),
        }


# tau-bench's pass^k (arXiv 2406.12045, section 3): the probability that k attempts at a task all succeed, estimated
# without bias from n attempts with c successes by C(c, k) / C(n, k), and averaged over tasks.
def compute_pass_hat(rows: Sequence[Mapping[str, Any]], attempts: int) -> dict[str, Any]:
    """Return the mean of pass^k over tasks for k = 1, 2, ..., with 95 % intervals (normal, over tasks)."""
    successes: dict[str, list[bool]] = {}
    for row in rows:
        successes.setdefault(str(row["id"]).rpartition("#")[0], []).append(bool(row["correct"]))
    result = {}
    for k in range(1, attempts + 1):
        values = [math.comb(sum(own), k) / math.comb(len(own), k) for own in successes.values() if len(own) >= k]
        if not values:
            break
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
        half = 1.96 * math.sqrt(variance / len(values))
        result[f"k={k}"] = {"value": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}
    return result


class EnvironmentConversation(Conversation):
    """One rollout, driven by an evaluation."""

    def __init__(
        self, identity: str, task: Task, guard: Guard, tool_format: ToolFormat, layout: PromptLayout | None
    ) -> None:
        self.identity, self.task, self.guard = identity, task, guard
        self.format, self.layout = tool_format, layout
        self.trajectory = Trajectory(task, stop="turn limit")
        self._text = ""

    def request(self) -> Request | None:
        turns, limits = self.trajectory.turns, self.guard.limits
        if not turns:
            self._start()
        if self.trajectory.stop != "turn limit" or len(turns) >= limits.turns:
            return None
        # The oracle takes the gold calls one by one, then answers.
        gold = (self.guard.gold_calls or [])[len(turns) : len(turns) + 1]
        expected = Gold(tuple(gold), None if gold else self.guard.gold_answer)
        sample = make_sample({**self.task, "id": self.identity}, self.trajectory.messages, self.guard.tools, expected)
        return Request(sample, step=len(turns), text=self._text)

    def _start(self) -> None:
        self.guard.wait_for_start()
        if self.guard.failure:
            self.trajectory.stop = "failed"
            return
        self.trajectory.messages = list(self.guard.messages)
        if self.layout:
            self._text = self.layout.render(make_sample(self.task, self.guard.messages, self.guard.tools))

    def receive(self, reply: Reply) -> None:
        trajectory, parsed = self.trajectory, parse_reply(reply, self.format)
        turn = Turn(0, 0, reply.text, parsed.calls)
        trajectory.turns.append(turn)
        if reply.is_truncated:
            trajectory.stop = "truncated"
            return
        message, finish = start_turn(self.guard, parsed)
        trajectory.messages.append(message)
        if finish is None:
            trajectory.stop = "answered"
            return
        names, turn.results = finish()
        limit = self.guard.limits.result_tokens
        results = make_result_messages(names, [cut_result(each.text, limit, self.layout) for each in turn.results])
        trajectory.messages.extend(results)
        if self.guard.failure or self.guard.done:
            trajectory.stop = "failed" if self.guard.failure else "done"
        elif self.layout and (end := self.layout.tokenizer.eos_token):
            self._text += reply.text + end + self.layout.render_results(names, results, [end])

    def record(self) -> Mapping[str, Any]:
        trajectory = self.trajectory
        calls = [
            {"name": call.name, "arguments": dict(call.arguments)} for turn in trajectory.turns for call in turn.calls
        ]
        return {
            "response": trajectory.turns[-1].text if trajectory.turns else "",
            "calls": calls,
            "messages": trajectory.messages,
            "turns": len(trajectory.turns),
            "call_count": len(calls),
            "task": self.identity.rpartition("#")[0],
            "kind": str(self.task.get("kind", "task")),
        }

    def outcome(self) -> Mapping[str, Any]:
        trajectory, guard = self.trajectory, self.guard
        trajectory.verdict = guard.verify(trajectory.messages)
        if guard.failure:
            trajectory.stop = "failed"
        parts = dict(trajectory.verdict.parts) if trajectory.verdict else {}
        stop: Stop = trajectory.stop
        return {
            **self.record(),
            "correct": trajectory.has_succeeded,
            "reward": trajectory.total,
            "parts": parts,
            "stop": stop,
            "errors": dict(guard.events),
            "reason": "" if trajectory.has_succeeded else guard.failure or f"the rollout ended: {stop}",
        }

    def close(self) -> None:
        self.guard.close()
