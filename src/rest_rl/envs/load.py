"""Loads an environment of any supported kind, with its tasks and its reward."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rest_rl.envs.adapters import (
    NOT_TOOLS,
    FunctionSession,
    append_observation,
    describe_function,
    describe_methods,
    make_verdict,
    open_class,
    open_factory,
    prompt_messages,
)
from rest_rl.envs.background import finish
from rest_rl.envs.mcp import McpServer
from rest_rl.envs.session import Environment, Message, Result, Task, ToolSession
from rest_rl.errors import UserError
from rest_rl.jsonl import parse_row, read_lines
from rest_rl.objects import check_signature, display_name, load_object

ENVIRONMENTS = {
    "shop": "rest_rl.envs.shop:Shop",
    "bfcl-tasks": "rest_rl.envs.bfcl:BFCL",
    "tau2-telecom": "rest_rl.envs.tau2:Telecom",
}
"""The worlds that ship, by name."""
_ACCEPTED = (
    f"one of {', '.join(ENVIRONMENTS)}; 'mcp:COMMAND' or 'mcp:https://...'; or module:OBJECT or path/to/file.py:OBJECT "
    "that names an environment (`tasks`, `open`), a class in TRL's form (`reset`), a function or a list of functions, "
    "an OpenEnv factory (`create`), or an object with `environment_factory`, `train_dataset` and `reward_funcs`"
)
_HOLD_OUT = 5
_GOLD = ("gold_calls", "gold_answer")
_OWN_FIELDS = ("id", "split", "prompt", *_GOLD)
Reward = Callable[[Sequence[Message], Task], Any]
"""Scores a rollout: a number, None for unscored, {"reward": ..., "parts": {...}} or a Result."""


def load_environment(
    source: Any,
    *,
    reward: str | Reward | None = None,
    tasks: str | Path | Iterable[Task] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Environment:
    """Load an environment; docs/environments.md describes the kinds.

    Args:
        source: The name of a world that ships, `module:OBJECT`, `path/to/file.py:OBJECT`, `mcp:COMMAND` or
            `mcp:https://...`; in Python also the object itself.
        reward: A function of the messages and the task, or its address. Replaces the environment's own reward.
        tasks: A JSONL or JSON file of tasks, or the tasks. Replaces the environment's own tasks.
        options: Arguments for the class, or the options of an MCP server.

    Raises:
        UserError: The source is none of these, or its tools, tasks or reward cannot be used.
    """
    found = _load_source(source, dict(options or {}))
    score: Any = load_object(reward, "reward") if isinstance(reward, str) else reward
    if score is not None:
        check_signature(score, "the reward", "messages", "task")
    elif not found.has_reward:
        expected = "get_reward of a class, verify_tool of an MCP server, or reward_funcs"
        remedy = "set reward to a function of (messages, task)"
        raise UserError(f"the environment {found.name!r} has no reward", expected, remedy)
    if found.environment and score is None and tasks is None:
        return found.environment
    table = _read_tasks(tasks) if tasks is not None else _NumberedTasks() if found.tasks is None else found.tasks
    first = next(iter(table.tasks(table.splits[0], 0, 1)), {})
    if missing := sorted(found.fields - {"seed"} - set(first)):
        problem = f"the first task of {found.name!r} has no field {missing[0]!r}"
        raise UserError(problem, remedy="add it, or set tasks to a JSONL file whose rows have it")
    return _Adapted(found, table, score)


@dataclass
class _Found:
    name: str
    open: Callable[[Task, int], ToolSession]
    tasks: Any = None
    """An object with `splits` and `tasks`; None if the environment has none."""
    has_reward: bool = True
    fields: frozenset[str] = frozenset()
    """Fields that every task must have."""
    environment: Environment | None = None
    step_rewards: bool = False


class _Adapted:
    def __init__(self, found: _Found, tasks: Any, reward: Reward | None) -> None:
        self.name, self.splits, self.tasks = found.name, tasks.splits, tasks.tasks
        self.step_rewards, self._opener, self._reward = found.step_rewards, found.open, reward

    def open(self, task: Task, seed: int) -> ToolSession:
        session: Any = self._opener(task, seed)
        if self._reward or any(key in task for key in _GOLD):
            session = _TaskSession(session, task, self._reward)
        return session


# Adds the user's reward, and the gold calls and answer of the task's row, to a session.
class _TaskSession:
    def __init__(self, session: Any, task: Task, reward: Reward | None) -> None:
        self._session, self._task, self._reward = session, task, reward
        for key in _GOLD:
            if key in task:
                setattr(self, key, partial(task.get, key))

    # The session scores the rollout too: its parts are kept, and it may find that its server has died.
    def verify(self, messages: Sequence[Message]) -> Result:
        own = self._session.verify(messages)
        if self._reward is None:
            return own
        verdict = make_verdict(finish(self._reward(messages, self._task)))
        return replace(verdict, parts={**own.parts, **verdict.parts})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class _TaskTable:
    def __init__(self, rows: Iterable[Any], where: str) -> None:
        tasks = [_check_row(row, number, where) for number, row in enumerate(rows)]
        if repeated := [name for name, count in Counter(str(task["id"]) for task in tasks).items() if count > 1]:
            raise UserError(f"{where} has more than one task with the id {repeated[0]!r}", remedy="change one of them")
        self._tasks = _split(tasks)
        if not self._tasks.get("train"):
            raise UserError(f"{where} has no task of the split 'train'", remedy="add some")
        self.splits = tuple(sorted(self._tasks, key="train".__ne__))

    def tasks(self, split: str, seed: int, number: int) -> list[Task]:
        return self._tasks[split][:number]


class _NumberedTasks:
    splits: tuple[str, ...] = ("train", "test")

    def tasks(self, split: str, seed: int, number: int) -> list[Task]:
        return [{"id": f"{split}-{n}"} for n in range(number)]


def _split(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    groups: dict[str, list[Task]] = {}
    has_splits = any("split" in task for task in tasks)
    for number, task in enumerate(tasks, 1):
        is_held_out = not has_splits and len(tasks) >= 2 * _HOLD_OUT and number % _HOLD_OUT == 0
        groups.setdefault(str(task.get("split", "test" if is_held_out else "train")), []).append(task)
    return groups


def _check_row(row: Any, number: int, where: str) -> Task:
    if not isinstance(row, Mapping):
        raise UserError(f"row {number} of {where} is of type {type(row).__name__}", "an object", "correct it")
    prompt = row.get("prompt")
    is_chat = isinstance(prompt, list) and all(isinstance(each, Mapping) and "role" in each for each in prompt)
    if not (prompt is None or isinstance(prompt, str) or (prompt and is_chat)):
        raise UserError(f"the prompt of row {number} of {where} is {prompt!r:.80}", "text or messages", "correct it")
    # Data sets fill missing fields with None.
    kept = {key: value for key, value in row.items() if value is not None or key not in _OWN_FIELDS}
    return {"id": str(number), **kept}


def _read_tasks(tasks: str | Path | Iterable[Task]) -> _TaskTable:
    if not isinstance(tasks, str | Path):
        return _TaskTable(tasks, "tasks")
    lines = list(read_lines(str(tasks)))
    if Path(tasks).suffix != ".json":
        return _TaskTable((parse_row(line) for _, line in lines), str(tasks))
    try:
        rows = json.loads(b"".join(line for _, line in lines))
    except ValueError as error:
        raise UserError(f"{tasks} is not JSON ({error})", "a list of objects", "correct it") from error
    return _TaskTable(rows if isinstance(rows, list) else [rows], str(tasks))


def _load_source(source: Any, options: dict[str, Any]) -> _Found:
    if not isinstance(source, str):
        target, name = source, display_name(source)
    elif source.startswith("mcp:"):
        return _load_server(source, options)
    elif source not in ENVIRONMENTS and ":" not in source:
        raise UserError(f"there is no environment {source!r}", _ACCEPTED, "correct it")
    else:
        target, name = load_object(ENVIRONMENTS.get(source, source), "environment"), source.rpartition(":")[2]
    found = _recognize(target, name, options)
    found.step_rewards = getattr(target, "step_rewards", False) is True
    return found


def _load_server(source: str, options: dict[str, Any]) -> _Found:
    server = McpServer(source.removeprefix("mcp:"), options)
    server.check()
    fields = frozenset[str]() if options.get("reset_tool") else frozenset({"prompt"})
    return _Found(source, server.open, None, bool(options.get("verify_tool")), fields)


def _recognize(found: Any, name: str, options: dict[str, Any]) -> _Found:
    if _has(found, "tasks", "open") and not _has(found, "reset"):
        environment = _create(found, name, options)
        return _Found(environment.name, environment.open, environment, environment=environment)
    if _has(found, "environment_factory"):
        return _load_spec(_create(found, name, options), name)
    if isinstance(found, type) and _has(found, "reset"):
        return _load_class(found, name, options)
    if _has(found, "create") and not _has(found, "reset"):
        factory = _create(found, name, options)
        return _Found(name, partial(open_factory, factory), _dataset_tasks(factory, name))
    functions = list(found) if isinstance(found, list | tuple) else [found]
    if functions and all(map(inspect.isroutine, functions)):
        return _load_functions(_create(functions, name, options), name)
    problem = f"{name!r} is of type {type(found).__name__}"
    if _has(found, "reset"):
        problem += ", an instance, but every rollout needs one of its own: name the class"
    raise UserError(problem, _ACCEPTED, "name one of these")


# Properties are not evaluated: that of a specification may load a data set.
def _has(found: Any, *names: str) -> bool:
    return all(inspect.getattr_static(found, name, None) is not None for name in names)


def _create(found: Any, name: str, options: dict[str, Any]) -> Any:
    if not isinstance(found, type):
        if options:
            raise UserError(f"{name!r} takes no options, but {min(options)} is set", "a class", "remove it")
        return found
    try:
        return found(**options)
    except Exception as error:  # a user's class can raise anything
        problem = f"cannot create {name!r} with the options {options} ({type(error).__name__}: {error})"
        raise UserError(problem, remedy="change the options, or correct the class") from error


def _load_functions(functions: list[Callable[..., Any]], name: str) -> _Found:
    by_name = {function.__name__: function for function in functions}
    if len(by_name) < len(functions):
        raise UserError(f"two of the functions of {name!r} have the same name", remedy="rename one")
    tools = [describe_function(function) for function in functions]

    def open_session(task: Task, seed: int) -> ToolSession:
        return FunctionSession(by_name, append_observation(prompt_messages(task), None), tools)

    return _Found(name, open_session, has_reward=False, fields=frozenset({"prompt"}))


def _load_class(owner: type, name: str, options: dict[str, Any]) -> _Found:
    try:
        inspect.signature(owner).bind(**options)
    except TypeError as error:
        raise UserError(f"{name!r} does not accept the options {options} ({error})", remedy="change them") from error
    if not describe_methods(owner):
        problem = f"the class {name!r} has no tools"
        raise UserError(problem, f"public methods besides {', '.join(sorted(NOT_TOOLS))}", "add some")
    parameters = list(inspect.signature(owner.reset).parameters.values())[1:]
    named = [each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    fields = frozenset(each.name for each in named if each.default is each.empty)
    opener = partial(open_class, partial(owner, **options), {})
    return _Found(name, opener, _dataset_tasks(owner, name), _has(owner, "get_reward"), fields)


def _load_spec(spec: Any, name: str) -> _Found:
    factory, functions = spec.environment_factory, getattr(spec, "reward_funcs", None) or []
    functions = [functions] if callable(functions) else list(functions)
    if bad := [each for each in functions if not callable(each)]:
        raise UserError(f"reward_funcs of {name!r} contains {bad[0]!r:.80}", "functions", "replace it by a function")
    rewards = {f"{display_name(each)}_{n}" if n else display_name(each): each for n, each in enumerate(functions)}

    def open_session(task: Task, seed: int) -> ToolSession:
        if not isinstance(factory, Mapping):
            return open_class(factory, rewards, task, seed)
        row = {key: value for key, value in task.items() if key != "environment"}
        return open_class(factory[task["environment"]], rewards, row, seed)

    has_reward = bool(rewards) or not isinstance(factory, type) or _has(factory, "get_reward")
    fields = frozenset({"environment"} if isinstance(factory, Mapping) else ())
    return _Found(name, open_session, _dataset_tasks(spec, name), has_reward, fields)


def _dataset_tasks(found: Any, name: str) -> _TaskTable | None:
    dataset = getattr(found, "train_dataset", None)
    dataset = dataset() if callable(dataset) else dataset
    return None if dataset is None else _TaskTable(dataset, f"the train_dataset of {name!r}")
