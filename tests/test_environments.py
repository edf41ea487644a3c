"""Environments of every kind that `load_environment` accepts, each with a small one written here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psutil
import pytest
from typing_extensions import TypedDict

from rest_rl.config import RunConfig
from rest_rl.data.layout import PromptLayout
from rest_rl.envs.adapters import describe_function, make_verdict
from rest_rl.envs.guard import Limits
from rest_rl.envs.load import load_environment
from rest_rl.envs.mcp import McpServer
from rest_rl.envs.rollout import Generated, Rollouts
from rest_rl.envs.session import Message, Result, Task
from rest_rl.errors import UserError
from rest_rl.objects import load_object
from rest_rl.response import ToolCall
from tests.live_environment import TEMPLATE
from tests.tiny_policy import tiny_tokenizer

SERVER = Path(__file__).with_name("mcp_counter.py")
needs_mcp = pytest.mark.skipif(importlib.util.find_spec("mcp") is None, reason="needs the package mcp")


class Size(Enum):
    SMALL = "S"
    LARGE = "L"


class Address(TypedDict):
    street: str
    number: int


def order(item: str, size: Size, unit: Literal["kg", "lb"] = "kg") -> dict[str, str]:
    """Order an item.

    Args:
        item: What to order.
        size: How much of it.
        unit: The unit.
    """
    return {"item": item, "size": str(size), "unit": unit}


def deliver(address: Address, note: str | None = None) -> str:
    """Deliver the order.

    Args:
        address: Where to.
    """
    return f"to {address['street']} {address['number']}" + (note or "")


async def wait_for(minutes: int) -> int:
    return minutes + 1


def one_point(messages: Sequence[Message], task: Task) -> float:
    return 1.0


class Safe:
    """A class in TRL's form: open a safe by adding its seed to a number."""

    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus, self.code, self.opened, self.done, self.closed = bonus, 0, False, False, 0

    def reset(self, seed: int, start: int = 0, **row: Any) -> str:
        self.code = seed + start
        return f" The code is {seed} + {start}."

    def enter(self, code: int) -> str:
        """Enter the code.

        Args:
            code: The code.
        """
        self.opened = self.done = code == self.code
        return "open" if self.opened else "closed"

    async def look(self) -> dict[str, bool]:
        """Look at the safe."""
        return {"opened": self.opened}

    def get_reward(self) -> float:
        return float(self.opened) + self.bonus

    def state(self) -> dict[str, Any]:
        return {"opened": self.opened}

    def close(self) -> None:
        self.closed += 1

    def _secret(self) -> int:
        return self.code


TASKS = [{"prompt": f"task {n}", "start": n} for n in range(10)]


def names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


# Functions


def test_functions_with_a_reward_and_tasks() -> None:
    environment = load_environment([order, deliver, wait_for], reward=one_point, tasks=TASKS)
    task = environment.tasks("train", 0, 1)[0]
    session = environment.open(task, 0)
    assert session.initial_messages() == [{"role": "user", "content": "task 0"}]
    assert names(session.list_tools()) == ["order", "deliver", "wait_for"]
    assert session.call_tool("order", {"item": "tea", "size": "S"}).text == '{"item": "tea", "size": "S", "unit": "kg"}'
    assert session.call_tool("deliver", {"address": {"street": "Elm", "number": 4}}).text == "to Elm 4"
    assert session.call_tool("wait_for", {"minutes": 2}).text == "3"
    assert session.verify([]).reward == 1.0
    with pytest.raises(ValueError, match="nothing"):
        session.call_tool("nothing", {})
    session.close()


def test_one_function_is_a_tool_and_may_return_a_result() -> None:
    def end(word: str) -> Result:
        return Result(word, reward=0.5, done=True, error="odd")

    session = load_environment(end, reward=lambda messages, task: None, tasks=TASKS).open(TASKS[0], 0)
    assert session.call_tool("end", {"word": "x"}) == Result("x", 0.5, True, "odd")
    assert session.verify([]).reward is None


def test_enums_and_nested_objects_survive() -> None:
    described = describe_function(order)["function"]
    assert described["description"] == "Order an item."
    properties = described["parameters"]["properties"]
    assert properties["size"] == {"type": "string", "enum": ["S", "L"], "description": "How much of it."}
    assert properties["unit"]["enum"] == ["kg", "lb"]
    assert described["parameters"]["required"] == ["item", "size"]
    # The docstring of the other one does not describe all arguments, and transformers refuses TypedDict.
    parameters = describe_function(deliver)["function"]["parameters"]
    assert parameters["properties"]["address"] == {"$ref": "#/$defs/Address", "description": "Where to."}
    assert parameters["$defs"]["Address"] == {
        "type": "object",
        "properties": {"street": {"type": "string"}, "number": {"type": "integer"}},
        "required": ["street", "number"],
    }
    assert parameters["required"] == ["address"]


def test_a_function_without_docstring_is_described_by_its_hints() -> None:
    described = describe_function(wait_for)["function"]
    assert described["parameters"]["properties"] == {"minutes": {"type": "integer"}}
    assert described["parameters"]["required"] == ["minutes"]


def test_a_function_that_json_cannot_describe_is_refused() -> None:
    def bad(place: socket.socket) -> str:
        return ""

    with pytest.raises(UserError, match="bad"):
        describe_function(bad)


# Classes in TRL's form


def test_a_class_in_trls_form() -> None:
    environment = load_environment(Safe, tasks=TASKS)
    session: Any = environment.open(TASKS[3], 40)
    assert session.initial_messages() == [{"role": "user", "content": "task 3 The code is 40 + 3."}]
    assert names(session.list_tools()) == ["enter", "look"]
    assert session.call_tool("enter", {"code": 1}) == Result("closed")
    assert session.verify([]).reward == 0.0
    assert session.call_tool("enter", {"code": 43}) == Result("open", done=True)
    assert session.call_tool("look", {}).text == '{"opened": true}'
    assert session.verify([]).reward == 1.0
    assert session.state() == {"opened": True}
    assert not hasattr(session, "state_hash")


def test_sessions_are_isolated_and_equal_seeds_start_equally() -> None:
    environment = load_environment(Safe, options={"bonus": 0.25}, tasks=TASKS)
    first, second = environment.open(TASKS[0], 7), environment.open(TASKS[0], 7)
    assert first.initial_messages() == second.initial_messages() != environment.open(TASKS[0], 8).initial_messages()
    first.call_tool("enter", {"code": 7})
    assert [first.verify([]).reward, second.verify([]).reward] == [1.25, 0.25]


def test_a_class_without_tasks_gets_numbered_ones() -> None:
    environment = load_environment(Safe)
    assert environment.splits == ("train", "test")
    assert environment.tasks("test", 0, 2) == [{"id": "test-0"}, {"id": "test-1"}]
    assert environment.open({"id": "test-0"}, 5).initial_messages()[0]["content"] == " The code is 5 + 0."


def test_a_reward_replaces_the_environments_own_but_keeps_its_parts() -> None:
    def half(messages: Sequence[Message], task: Task) -> dict[str, Any]:
        return {"reward": task["start"] / 2, "parts": {"length": float(len(messages))}}

    session: Any = load_environment(Safe, reward=half, tasks=TASKS).open(TASKS[3], 0)
    assert session.verify([{"role": "user", "content": ""}]) == Result(reward=1.5, parts={"length": 1.0})
    assert session.state() == {"opened": False}


def test_a_task_may_bring_its_gold_calls_and_answer() -> None:
    calls = [{"name": "enter", "arguments": {"code": 4}}]
    task = {"prompt": "x", "gold_calls": calls, "gold_answer": "It is open."}
    session: Any = load_environment(Safe, tasks=[task]).open(task, 4)
    assert session.gold_calls() == calls
    assert session.gold_answer() == "It is open."


# Specifications, OpenEnv and environments


def length_reward(completions: list[list[Message]], start: list[int], **_: Any) -> list[float]:
    return [len(completion) + begin / 10 for completion, begin in zip(completions, start, strict=True)]


def unscored(environments: list[Any], log_metric: Any, **_: Any) -> list[float | None]:
    log_metric("metric", 1.0)
    return [None]


def test_a_specification_with_a_data_set_and_reward_functions() -> None:
    spec = SimpleNamespace(train_dataset=TASKS, environment_factory=Safe, reward_funcs=[length_reward, unscored])
    environment = load_environment(spec)
    assert [len(environment.tasks(split, 0, 99)) for split in environment.splits] == [8, 2]
    session = environment.open(TASKS[2], 1)
    session.call_tool("enter", {"code": 3})
    messages = [*session.initial_messages(), {"role": "assistant", "content": "done"}]
    # get_reward is 1; one message after the prompt, and start / 10 = 0.2; the other function does not score
    assert session.verify(messages).reward == pytest.approx(1 + 1 + 0.2)
    assert session.verify(messages).parts == pytest.approx({"Safe": 1.0, "length_reward": 1.2})


def test_a_specification_may_choose_the_environment_by_row() -> None:
    class Door(Safe):
        def reset(self, seed: int, start: int) -> str:  # type: ignore[override]
            return "a door"

    rows = [{"environment": name, "start": 1} for name in ("safe", "door")]
    spec = SimpleNamespace(train_dataset=rows, environment_factory={"safe": Safe, "door": Door}, reward_funcs=None)
    environment = load_environment(spec)
    opened = [environment.open(task, 2).initial_messages()[0]["content"] for task in environment.tasks("train", 0, 2)]
    assert opened == [" The code is 2 + 1.", "a door"]


@dataclass
class OpenEnvSession:
    seed: int
    calls: list[str] = field(default_factory=list)
    closed: bool = False

    def initial_messages(self) -> list[Any]:
        return [{"role": "user", "content": f"seed {self.seed}"}]

    def list_tools(self) -> list[Any]:
        schema = {"type": "object", "properties": {"to": {"enum": [1, 2]}}}
        return [SimpleNamespace(name="go", description="Go.", input_schema=schema)]

    def call_tool(self, name: str, arguments: dict[str, Any]) -> Any:
        self.calls.append(name)
        rewards = {1: None, 2: 0.5, 3: 2.0}
        step = rewards[len(self.calls)]
        error = "no way" if arguments["to"] == 9 else None
        done = len(self.calls) == 3
        return SimpleNamespace(data={"at": arguments["to"]}, done=done, metadata={"reward": step}, error=error)

    def verify(self, transcript: list[Any], final_state: Any = None) -> Any:
        return SimpleNamespace(env_reward=None, metrics={"steps": len(self.calls), "name": "x"}, artifacts={})

    def close(self) -> None:
        self.closed = True


class OpenEnvFactory:
    def create(self, task: Any, seed: int | None = None, episode_id: str | None = None) -> OpenEnvSession:
        return OpenEnvSession(seed or 0)


def test_an_openenv_factory() -> None:
    session = load_environment(OpenEnvFactory).open({"id": "a"}, 3)
    assert session.initial_messages() == [{"role": "user", "content": "seed 3"}]
    assert session.list_tools()[0]["function"]["parameters"]["properties"] == {"to": {"enum": [1, 2]}}
    assert session.verify([]).reward is None
    assert session.call_tool("go", {"to": 1}) == Result('{"at": 1}')
    assert session.call_tool("go", {"to": 9}) == Result('{"error": "no way"}', 0.5, False, "tool error")
    # The reward of the last call is the rollout's, and must not count twice.
    assert session.call_tool("go", {"to": 2}) == Result('{"at": 2}', None, True)
    assert session.verify([]) == Result(reward=2.0, parts={"steps": 3.0})


class World:
    name, splits = "world", ("train", "hard")
    step_rewards = True

    def tasks(self, split: str, seed: int, number: int) -> list[Task]:
        return [{"id": f"{split}{n}"} for n in range(min(number, 3))]

    def open(self, task: Task, seed: int) -> Any:
        return OpenEnvSession(seed)


def test_an_environment_is_used_as_it_is() -> None:
    world = World()
    assert load_environment(world) is world
    assert isinstance(load_environment(World), World)
    environment = load_environment(world, reward=one_point)
    assert environment.splits == ("train", "hard")
    assert environment.tasks("hard", 0, 9)[2] == {"id": "hard2"}
    assert environment.name == "world"
    assert getattr(environment, "step_rewards", False)
    assert not getattr(load_environment(Safe), "step_rewards", False)


def test_a_tool_may_be_called_close_or_done() -> None:
    calls = []

    def close(door: str) -> str:
        calls.append(door)
        return "closed"

    def done() -> str:
        return "not yet"

    session = load_environment([close, done], reward=one_point, tasks=TASKS).open(TASKS[0], 0)
    assert session.call_tool("close", {"door": "a"}) == Result("closed")
    assert session.call_tool("done", {}) == Result("not yet")
    session.close()
    assert calls == ["a"]


# Tasks and addresses


def test_tasks_from_files(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "split": "train" if n < 2 else "test"} for n in range(5)]
    lines, array = tmp_path / "tasks.jsonl", tmp_path / "tasks.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    array.write_text(json.dumps(rows, indent=1))
    for path in (str(lines), array):
        environment = load_environment([order], reward=one_point, tasks=path)
        assert environment.splits == ("train", "test")
        assert [task["id"] for task in environment.tasks("test", 0, 2)] == ["2", "3"]


def test_fields_that_a_data_set_fills_with_none_are_missing() -> None:
    rows = [{"id": None, "split": None, "prompt": "x", "answer": None}] * 2
    environment = load_environment([order], reward=one_point, tasks=rows)
    assert environment.tasks("train", 0, 9) == [{"id": str(n), "prompt": "x", "answer": None} for n in range(2)]


def test_every_fifth_of_at_least_ten_tasks_is_held_out() -> None:
    few = load_environment([order], reward=one_point, tasks=TASKS[:9])
    assert few.splits == ("train",)
    many = load_environment([order], reward=one_point, tasks=TASKS)
    assert many.splits == ("train", "test")
    assert [task["start"] for task in many.tasks("test", 0, 9)] == [4, 9]
    assert [task["start"] for task in many.tasks("train", 5, 9)] == [0, 1, 2, 3, 5, 6, 7, 8]


def test_a_prompt_of_messages_keeps_its_system_message() -> None:
    prompt = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "Open it."}]
    session = load_environment(Safe, tasks=[{"prompt": prompt}]).open({"prompt": prompt}, 2)
    assert session.initial_messages() == [prompt[0], {"role": "user", "content": "Open it. The code is 2 + 0."}]
    assert prompt[1]["content"] == "Open it."


def test_a_file_is_loaded_with_its_siblings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "sibling_of_tools.py").write_text("FACTOR = 3\n")
    # The name of a module of the standard library, which must keep its own.
    (folder / "calendar.py").write_text(
        textwrap.dedent("""
        from sibling_of_tools import FACTOR
        def triple(number: int) -> int:
            return FACTOR * number
        TOOLS = [triple]
        def score(messages, task):
            return task["n"]
        """)
    )
    monkeypatch.chdir(tmp_path)
    environment = load_environment(
        "project/calendar.py:TOOLS", reward="project/calendar.py:score", tasks=[{"prompt": "x", "n": 2}]
    )
    session = environment.open({"prompt": "x", "n": 2}, 0)
    assert session.call_tool("triple", {"number": 2}).text == "6"
    assert session.verify([]).reward == 2.0
    assert load_object(f"{folder}/calendar.py:TOOLS", "tools") is load_object("project/calendar.py:TOOLS", "tools")
    assert load_object("calendar:monthrange", "function")(2024, 2) == (3, 29)
    assert environment.name == "TOOLS"


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("nowhere", {}),
        ("tests.test_environments:TASKS", {}),
        ("tests.test_environments:missing", {}),
        ("tests/missing.py:TOOLS", {}),
        (7, {}),
        ([], {}),
        (Safe(), {}),
        (Safe, {"options": {"malus": 1}}),
        (World(), {"options": {"size": 1}}),
        ([order], {"options": {"size": 1}, "reward": one_point, "tasks": TASKS}),
        ([order], {"tasks": TASKS}),  # no reward
        ([order], {"reward": one_point}),  # no tasks
        ([order], {"reward": one_point, "tasks": [{"question": "x"}]}),
        ([order], {"reward": one_point, "tasks": []}),
        ([order], {"reward": one_point, "tasks": ["x"]}),
        ([order], {"reward": one_point, "tasks": [{"prompt": 3}]}),
        ([order], {"reward": one_point, "tasks": [{"id": 1, "prompt": ""}, {"id": "1", "prompt": ""}]}),
        ([order], {"reward": one_point, "tasks": [{"prompt": "x", "split": "test"}]}),
        ([order], {"reward": one_point, "tasks": "missing.jsonl"}),
        ([order], {"reward": lambda: 1.0, "tasks": TASKS}),
        ([order, order], {"reward": one_point, "tasks": TASKS}),
        (SimpleNamespace(train_dataset=TASKS, environment_factory=Safe, reward_funcs="reward-model"), {}),
    ],
)
def test_mistakes_are_user_errors(source: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        load_environment(source, **changes)


def test_a_class_whose_reset_needs_a_missing_field_is_refused() -> None:
    class Needy(Safe):
        def reset(self, seed: int, level: int) -> str:  # type: ignore[override]
            return ""

    with pytest.raises(UserError, match="level"):
        load_environment(Needy)
    assert load_environment(Needy, tasks=[{"prompt": "x", "level": 1}]).splits == ("train",)


def test_a_task_without_any_prompt_raises() -> None:
    class Silent(Safe):
        def reset(self) -> None:  # type: ignore[override]
            return None

    with pytest.raises(ValueError, match="prompt"):
        load_environment(Silent).open({"id": "train-0"}, 0)


def test_none_is_never_zero() -> None:
    assert make_verdict(None).reward is None
    assert make_verdict({"reward": None, "parts": {"a": 1.0}}) == Result(parts={"a": 1.0})
    assert make_verdict(False).reward == 0.0
    with pytest.raises(ValueError, match="reward"):
        make_verdict({"score": 1.0})


# MCP servers


def server_environment() -> Any:
    options = {"verify_tool": "judge", "reset_tool": "start"}
    return load_environment(f"mcp:{sys.executable} {SERVER}", options=options, tasks=[{"goal": 5}, {"goal": 6}])


OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def _remember_other_children() -> None:
    """Processes that earlier tests of this worker left running do not count."""
    OTHERS.update(process.pid for process in psutil.Process().children(recursive=True))


def children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if process.pid not in OTHERS]


@needs_mcp
def test_a_server_over_stdio() -> None:
    environment = server_environment()
    task = environment.tasks("train", 0, 1)[0]
    session = environment.open(task, 3)
    try:
        assert session.initial_messages() == [{"role": "user", "content": "Count from 3 to 5."}]
        tools = {tool["function"]["name"]: tool["function"] for tool in session.list_tools()}
        assert sorted(tools) == ["add", "fail", "hang", "process_id", "read_task"]
        assert tools["add"]["parameters"]["properties"]["unit"]["enum"] == ["one", "ten"]
        assert session.call_tool("add", {"amount": 2}).text == "the counter is 5"
        assert json.loads(session.call_tool("read_task", {}).text) == task
        assert session.call_tool("fail", {}).error
        with pytest.raises(ValueError, match="judge"):
            session.call_tool("judge", {"goal": 5, "messages": []})
        assert session.verify([{}, {}]) == Result(reward=1.0, parts={"success": 1.0, "messages": 2.0})
    finally:
        session.close()
    session.close()
    assert children() == []


@needs_mcp
def test_eight_servers_in_parallel_of_which_one_is_killed() -> None:
    options = {"reset_tool": "start"}
    source = f"mcp:{sys.executable} {SERVER}"
    environment = load_environment(source, options=options, reward=one_point, tasks=[{"goal": 20}])
    outcomes: dict[int, Any] = {}
    all_started = threading.Barrier(8)

    def roll_out(number: int) -> None:
        session = environment.open({"id": str(number), "goal": 20}, number)
        try:
            all_started.wait(60)
            if number == 3:
                os.kill(int(session.call_tool("process_id", {}).text), signal.SIGKILL)
            results = [session.call_tool("add", {"amount": 1}).text for _ in range(5)]
            outcomes[number] = results[-1], session.verify([]).reward
        except ConnectionError as error:
            with pytest.raises(ConnectionError):
                session.verify([])
            outcomes[number] = error
        finally:
            session.close()

    threads = [threading.Thread(target=roll_out, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert isinstance(outcomes.pop(3), ConnectionError)
    assert outcomes == {number: (f"the counter is {number + 5}", 1.0) for number in range(8) if number != 3}
    assert children() == []


@needs_mcp
def test_rollouts_survive_a_killed_server_and_one_that_hangs() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    layout = PromptLayout(tokenizer, "toolrl")
    tools = ["process_id", "hang", *["add"] * 6]
    turn = 0

    def respond(prompts: Any, is_first: bool) -> Generated:
        nonlocal turn
        if turn == 1:  # the first rollout's server has said who it is
            os.kill(int(json.loads(first.turns[0].results[0].text)), signal.SIGKILL)
        active = [n for n in range(8) if turn == 0 or n != 1]
        texts = [
            layout.format.render(None, [ToolCall(tools[n], {"amount": 3} if n > 1 else {})], None)
            if turn < 2
            else layout.format.render(None, (), "ok")
            for n in (active if turn < 2 else active[1:])
        ]
        turn += 1
        assert len(texts) == len(prompts)
        return Generated(
            [[*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for t in texts]
        )

    class Watched(Rollouts):
        def _start(self, guard: Any, trajectory: Any) -> bool:
            nonlocal first
            first = trajectory if trajectory.task["id"] == "t0" else first
            return super()._start(guard, trajectory)

    first: Any = None
    tasks = [{"id": f"t{n}", "prompt": "count", "goal": 6} for n in range(8)]
    rollouts = Watched(server_environment(), layout, Limits(timeout=15), [tokenizer.eos_token_id], 96)
    found = rollouts.run([(task, 0) for task in tasks], respond)
    assert [each.stop for each in found] == ["failed", "failed", *["answered"] * 6]
    assert [each.total for each in found] == [0.0, 0.0, *[1.0] * 6]
    assert "no answer within 15 s" in found[1].failure
    assert found[0].failure
    deadline = time.monotonic() + 20
    while children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children() == []


@needs_mcp
def test_closing_ends_a_call_that_hangs() -> None:
    session = server_environment().open({"id": "a", "goal": 1}, 0)
    failed = threading.Event()

    def call() -> None:
        with pytest.raises(ConnectionError):
            session.call_tool("hang", {})
        failed.set()

    thread = threading.Thread(target=call)
    thread.start()
    session.close()
    thread.join(60)
    assert failed.is_set()
    assert children() == []


@needs_mcp
def test_no_server_outlives_the_interpreter() -> None:
    code = f"""
        from rest_rl.envs.load import load_environment
        environment = load_environment("mcp:{sys.executable} {SERVER}", options={{"verify_tool": "judge"}},
                                       tasks=[{{"prompt": "count", "goal": 1}}])
        print(environment.open({{"prompt": "count", "goal": 1}}, 0).call_tool("process_id", {{}}).text)
        raise ValueError("the session is still open")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert "the session is still open" in done.stderr
    assert not psutil.pid_exists(int(done.stdout))


@contextmanager
def run_http_server(**variables: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, env = [sys.executable, str(SERVER), str(port)], {**os.environ, **variables}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            server.kill()


HIDDEN = {"verify_tool": "judge", "reset_tool": "start"}


@needs_mcp
def test_a_server_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with run_http_server() as address:
        environment = load_environment(f"mcp:{address}", options=HIDDEN, tasks=[{"goal": 5}])
        session = environment.open({"id": "0", "goal": 5}, 3)
        assert session.call_tool("add", {"amount": 2}).text == "the counter is 5"
        assert session.verify([]).reward == 1.0
        session.close()


@needs_mcp
def test_a_server_over_http_that_wants_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OUR_TOKEN", "se$cret\n")  # files of variables often end with a line break
    options = {**HIDDEN, "headers": {"Authorization": "Bearer ${OUR_TOKEN}"}}
    with run_http_server(COUNTER_TOKEN="se$cret") as address:
        source, tasks = f"mcp:{address}", [{"goal": 5}]
        session = load_environment(source, options=options, tasks=tasks).open({"id": "0", "goal": 5}, 3)
        assert session.call_tool("add", {"amount": 2}).text == "the counter is 5"
        assert session.verify([]).reward == 1.0
        session.close()
        for wrong in ({}, {"headers": {"Authorization": "Bearer $$OUR_TOKEN"}}):
            with pytest.raises(UserError, match="reach"):
                load_environment(source, options={**HIDDEN, **wrong}, tasks=tasks)
    config = RunConfig.from_tables({"env": {"path": source, "options": options}, "model": {"path": "x"}})
    assert "secret" not in config.to_toml().replace("$", "")
    assert RunConfig.from_toml(config.to_toml()).env.options == options


@needs_mcp
@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer $NO_SUCH_VARIABLE"},
        {"Authorization": "Bearer $"},
        {"Authorization": "a$BROKEN_TOKEN"},
        {"Authorization": 5},
        {"Authorization": " "},
        "Authorization: x",
    ],
)
def test_mistakes_in_headers_are_user_errors(headers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN_TOKEN", "one\nsecret")
    with pytest.raises(UserError) as found:  # before anything is sent
        McpServer("http://127.0.0.1:1/mcp", {"headers": headers})
    assert "secret" not in str(found.value)
    with pytest.raises(UserError):
        McpServer(sys.executable, {"headers": {"Authorization": "x"}})


@needs_mcp
@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("mcp:", {}),
        ("mcp:no-such-command server.py", {}),
        (f"mcp:{sys.executable} -c pass", {}),
        (f"mcp:{sys.executable} {SERVER}", {"speed": 1}),
        (f"mcp:{sys.executable} {SERVER}", {"verify_tool": "missing"}),
        (f"mcp:{sys.executable} {SERVER}", {}),  # no reward
        (f"mcp:{sys.executable} {SERVER}", {"verify_tool": "judge"}),  # no prompt
    ],
)
def test_mistakes_with_servers_are_user_errors(source: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        load_environment(source, options=options)
    assert children() == []


# The page


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "environments.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL)
    for name, code in blocks:
        (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "Count to 3.", "goal": 3, "answer": "3"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    calls = re.findall(r"^    (load_environment\(.*\))$", page, re.MULTILINE)
    assert (len(blocks), len(calls)) == (7, 6)
    has_mcp = importlib.util.find_spec("mcp") is not None
    for call in calls:
        if "mcp:" in call and not has_mcp:
            continue
        environment = eval(call)
        session = environment.open(environment.tasks("train", 0, 1)[0], 0)
        tool = session.list_tools()[0]["function"]
        assert session.initial_messages()[-1]["content"]
        made_up = {"string": "hours", "integer": 0, "number": 3.0}
        properties = tool["parameters"]["properties"]
        result = session.call_tool(tool["name"], {name: made_up[kind["type"]] for name, kind in properties.items()})
        assert result.text
        assert not result.error
        verdict = session.verify([*session.initial_messages(), {"role": "assistant", "content": "3"}])
        assert verdict.reward is not None or verdict.parts or result.reward is not None
        session.close()
    assert children() == []
