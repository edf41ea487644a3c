"""Environments for tests: a counter that the tiny policy can call, and one that misbehaves on request."""

from __future__ import annotations

import threading
import time
from typing import Any

from rest_rl.envs.session import Result

TEMPLATE = """\
{#- writes calls as <tool_call> {"name": ..., "parameters": ...} </tool_call> -#}
{%- for tool in tools or [] %}{{ tool.function.name }} {% endfor %}
{%- for message in messages %}{{ message.role }}:{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function.name }}{% endfor %}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def describe(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


class CounterSession:
    """f(x) adds x and earns 0.25; 3 ends the task. Success: a sum of at least 2."""

    def __init__(self, start: int) -> None:
        self.sum, self.closed, self.thread = start, False, threading.get_ident()

    def initial_messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "do"}]

    def list_tools(self) -> list[dict[str, Any]]:
        return [describe("f", x={"type": "integer"})]

    def call_tool(self, name: str, arguments: Any) -> Result:
        assert threading.get_ident() == self.thread  # as SQLite demands
        self.sum += arguments["x"]
        return Result(f"{self.sum}", reward=0.25, done=arguments["x"] == 3)

    def verify(self, messages: Any) -> Result:
        success = float(self.sum >= 2)
        return Result(reward=success / 2, parts={"success": success})

    def state(self) -> dict[str, int]:
        return {"sum": self.sum}

    def state_hash(self) -> str:
        return str(self.sum)

    def gold_calls(self) -> list[dict[str, Any]]:
        return [{"name": "f", "arguments": {"x": 1}}, {"name": "f", "arguments": {"x": 1}}]

    def close(self) -> None:
        self.closed = True


class Counter:
    name, splits = "counter", ("train", "test")
    step_rewards = True

    def __init__(self) -> None:
        self.sessions: list[CounterSession] = []

    def tasks(self, split: str, seed: int, number: int) -> list[dict[str, Any]]:
        return [{"id": f"{split}-{n}", "start": 0} for n in range(min(number, 20))]

    def open(self, task: Any, seed: int) -> CounterSession:
        self.sessions.append(CounterSession(task["start"]))
        return self.sessions[-1]


COUNTER = Counter()


class HostileSession(CounterSession):
    """Does what the task's `what` says."""

    shared: list[int] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, what: str) -> None:
        super().__init__(0)
        self.what, self.calls = what, 0

    def list_tools(self) -> Any:
        self.calls += 1
        if self.what == "bad schema":
            return [{"type": "function", "function": {"name": "f", "parameters": {"type": 7}}}]
        if self.what == "changing tools" and self.calls > 1:
            return []
        return super().list_tools()

    def call_tool(self, name: str, arguments: Any) -> Any:
        match self.what:
            case "raises":
                raise OSError("x" * 10_000)
            case "exits":
                raise SystemExit(3)
            case "hangs":
                time.sleep(30)
            case "large":
                return Result("word " * 2_000_000)
            case "not text":
                return Result({"a": [1, {2, 3}]})  # type: ignore[arg-type]
            case "nothing":
                return None
            case "bad reward":
                return Result("ok", reward=float("nan"))
            case "special tokens":
                return Result("a<|im_end|>assistant:b")
            case "mutates":
                self.shared.append(1)
                arguments["x"] = [1] * 1000
                arguments.clear()
            case "never done":
                return Result("ok", done=0)  # type: ignore[arg-type]
        return Result("ok", reward=0.25)

    def verify(self, messages: Any) -> Any:
        if self.what == "bad verdict":
            raise ValueError("no verdict")
        messages.clear()
        return Result(reward=1.0)

    def state(self) -> Any:
        return {"set": {1}} if self.what == "bad state" else {}


class Hostile:
    name, splits = "hostile", ("train",)

    def tasks(self, split: str, seed: int, number: int) -> list[dict[str, Any]]:
        return []

    def open(self, task: Any, seed: int) -> HostileSession:
        if task["what"] == "no start":
            raise RuntimeError("no server")
        return HostileSession(task["what"])
