"""The shop of `rest_rl.data.shop` as an environment: outcome, step rewards, gold calls and states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from rest_rl.data import shop
from rest_rl.envs.session import Message, Result, Task

STEP_SHARE = 0.3
"""Sum of the step rewards of a rollout that makes every call that its task needs."""


class Shop:
    """Tasks about the accounts, orders and invoices of a shop (`rest_rl.data.shop` lists goals and splits).

    The rewards of a rollout sum to at most 1. The gold calls that succeed share `STEP_SHARE` equally, each paid once,
    when it first succeeds. `verify` adds the rest if the final state equals the state after the gold calls and the
    rollout ends with an answer, so that a policy learns to stop.
    """

    name = "shop"
    splits: tuple[str, ...] = shop.SPLITS
    step_rewards = True

    def tasks(self, split: str, seed: int, number: int) -> list[Task]:
        return list(islice(shop.tasks(seed, split), max(number, 0)))

    def open(self, task: Task, seed: int) -> ShopSession:
        """Start a session. The task contains the whole state, so the seed changes nothing."""
        return ShopSession(task)


class ShopSession:
    """The shop of one task in one rollout."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._state = shop.copy_state(task["state"])
        self._gold_state = shop.copy_state(task["state"])
        self._needed: list[str] = []
        for call in task["gold"]:
            if not shop.call_shop(self._gold_state, call["name"], call["arguments"])[1]:
                self._needed.append(_write_call(call["name"], call["arguments"]))
        self._left = list(self._needed)
        self._seen: set[str] = set()

    def initial_messages(self) -> list[Message]:
        return [{"role": "user", "content": self._task["request"]}]

    def list_tools(self) -> list[dict[str, Any]]:
        return [shop.describe_tool(name) for name in self._task["tools"]]

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Result:
        text, error = shop.call_shop(self._state, name if name in self._task["tools"] else "", arguments)
        reward = 0.0
        if error not in (shop.UNKNOWN_TOOL, shop.WRONG_ARGUMENTS):
            call = _write_call(name, arguments)
            self._seen.add(f"{call} {error}")
            if not error and call in self._left:
                self._left.remove(call)
                reward = STEP_SHARE / len(self._needed)
        return Result(text, reward, error=error)

    def verify(self, messages: Sequence[Message]) -> Result:
        last = messages[-1] if messages else {}
        has_answered = last.get("role") == "assistant" and not last.get("tool_calls")
        success = float(has_answered and self._state == self._gold_state)
        progress = 1 - len(self._left) / len(self._needed)
        return Result(reward=(1 - STEP_SHARE) * success, parts={"success": success, "progress": progress})

    def close(self) -> None:
        pass

    def state(self) -> shop.State:
        return shop.copy_state(self._state)

    def state_hash(self) -> str:
        """Return a hash of the state and of the distinct calls so far, which decide what the policy knows."""
        text = json.dumps([self._state, sorted(self._seen)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def gold_calls(self) -> list[dict[str, Any]]:
        return [{"name": call["name"], "arguments": dict(call["arguments"])} for call in self._task["gold"]]


def _write_call(name: str, arguments: Mapping[str, Any]) -> str:
    return json.dumps([name, arguments], sort_keys=True)
