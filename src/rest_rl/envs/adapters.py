"""Sessions for environments of other kinds: plain functions, classes as TRL expects them, and OpenEnv's sessions.

All of them are recognized by their attributes, so none of these packages has to be installed.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, cast

from rest_rl.envs.background import finish
from rest_rl.envs.session import OPTIONAL_METHODS, Message, Result, Task
from rest_rl.errors import UserError

NOT_TOOLS = frozenset({"reset", "get_reward", "close", *OPTIONAL_METHODS})
"""Public methods of a class in TRL's form that the model cannot call."""


def describe_function(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function as a tool, from its type hints and its docstring in Google style.

    Uses `transformers.utils.get_json_schema`, as TRL does, where the docstring describes every argument; otherwise
    pydantic, which also converts nested classes such as a TypedDict.

    Raises:
        UserError: The type hints cannot be converted to a JSON schema.
    """
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    try:
        return get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException):
        return {"type": "function", "function": _describe_by_hints(function)}
    except Exception as error:  # hints that cannot be evaluated can raise anything
        raise _bad_tool(function, error) from error


def _describe_by_hints(function: Callable[..., Any]) -> dict[str, Any]:
    from pydantic import TypeAdapter
    from transformers.utils.chat_template_utils import parse_google_format_docstring

    text, arguments, _ = parse_google_format_docstring((inspect.getdoc(function) or "").strip())
    try:
        schema = _without_titles(TypeAdapter(cast(Any, function)).json_schema())
    except Exception as error:
        raise _bad_tool(function, error) from error
    schema["properties"].pop("self", None)  # the function is a method, looked up on its class
    schema["required"] = [name for name in schema.get("required", []) if name != "self"]
    for name, description in (arguments or {}).items():
        if name in schema["properties"]:
            schema["properties"][name]["description"] = description
    return {"name": function.__name__, "description": text or "", "parameters": schema}


def _bad_tool(function: Callable[..., Any], error: Exception) -> UserError:
    name = getattr(function, "__qualname__", repr(function))
    problem = f"the tool {name} cannot be described as a JSON schema ({type(error).__name__}: {error})"
    return UserError(problem, "type hints that JSON has, such as str, list[int] or Literal", "change its type hints")


# pydantic adds titles, which only repeat names. A property that is named "title" has a schema, not a text.
def _without_titles(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _without_titles(item) for key, item in schema.items() if key != "title" or not isinstance(item, str)}


@functools.lru_cache(maxsize=64)
def describe_methods(owner: type) -> tuple[dict[str, Any], ...]:
    """Return the public methods of a class in TRL's form as tools, in the order of their names."""
    members = inspect.getmembers(owner, predicate=inspect.isfunction)
    return tuple(
        describe_function(method) for name, method in members if not name.startswith("_") and name not in NOT_TOOLS
    )


def call_with_known(function: Callable[..., Any], available: Mapping[str, Any]) -> Any:
    """Call a function with those of the available arguments that it accepts, and finish it if it is asynchronous."""
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        available = {name: value for name, value in available.items() if name in parameters}
    return finish(function(**available))


def make_text(value: Any) -> str:
    """Return what the model sees of a tool's result: a text as it is, anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return vars(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def make_verdict(value: Any) -> Result:
    """Return a reward (a number, None, {"reward": ..., "parts": {...}} or a Result) as a Result."""
    if isinstance(value, Result):
        return value
    parts: Mapping[str, float] = {}
    if isinstance(value, Mapping):
        if "reward" not in value:
            raise ValueError(f"the reward is {value!r:.100}, expected a number, None, or an object with 'reward'")
        value, parts = value["reward"], value.get("parts") or {}
    return Result(reward=None if value is None else float(value), parts=parts)


def sum_rewards(rewards: Mapping[str, Any]) -> Result:
    """Return the sum of named rewards, of which those that are None do not count; None if all are."""
    verdicts = {name: make_verdict(value) for name, value in rewards.items()}
    known = {name: verdict.reward for name, verdict in verdicts.items() if verdict.reward is not None}
    parts = {name: part for verdict in verdicts.values() for name, part in verdict.parts.items()}
    return Result(reward=sum(known.values()) if known else None, parts=parts | (known if len(rewards) > 1 else {}))


def prompt_messages(task: Task) -> list[Message]:
    """Return a task's `prompt`, given as text or as messages; an empty user message if it has none, as in TRL."""
    prompt = task.get("prompt") or ""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def append_observation(messages: Sequence[Message], observation: Any) -> list[Message]:
    """Return the messages with what a reset returned (None, text or content parts) at the end of the last one.

    Raises:
        ValueError: The last message is empty: the task has no prompt, and the reset returned none.
    """
    *before, last = messages
    texts = [last.get("content"), observation]
    content = "".join(join_content(text) if isinstance(text, list) else text or "" for text in texts)
    if not content.strip():
        raise ValueError("there is no prompt: the task has no field 'prompt', and the reset returned no text")
    return [*before, {**last, "content": content}]


def join_content(parts: Sequence[Any], gap: str = "") -> str:
    """Return the text of content parts (objects or mappings with a `type`); other kinds are described in words."""
    return gap.join(map(_describe_part, parts))


def _describe_part(part: Any) -> str:
    kind = read_field(part, "type")
    if kind == "text":
        return read_field(part, "text")
    inner = read_field(part, "resource") or part
    if isinstance(text := read_field(inner, "text"), str):
        return text
    described = [read_field(inner, "uri"), read_field(inner, "mime_type", "mimeType")]
    data = read_field(inner, "data", "blob")
    size = f"{len(data)} characters of data" if isinstance(data, str) else None
    return f"[{', '.join(str(word) for word in (kind, *described, size) if word)}; only text can be shown]"


def read_field(holder: Any, *names: str) -> Any:
    """Return the first of the named fields that an object or a mapping has; None if it has none."""
    values = (holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def make_tool(tool: Any) -> dict[str, Any]:
    """Return a tool of MCP or OpenEnv (object or mapping) in OpenAI's form; its schema stays as it is."""
    if isinstance(tool, Mapping) and "function" in tool:
        return dict(tool)
    schema = read_field(tool, "input_schema", "inputSchema", "parameters") or {"type": "object", "properties": {}}
    text = read_field(tool, "description") or ""
    function = {"name": read_field(tool, "name"), "description": text, "parameters": dict(schema)}
    return {"type": "function", "function": function}


class FunctionSession:
    """A session whose tools are functions, or methods of an `owner`, which may also have `done` and `close`."""

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        messages: list[Message],
        tools: Sequence[dict[str, Any]],
        score: Callable[[Sequence[Message]], Result] = lambda messages: Result(),
        owner: Any = None,
    ) -> None:
        self._functions, self._messages, self._tools = functions, messages, tools
        self._score, self._owner = score, owner

    def initial_messages(self) -> list[Message]:
        return self._messages

    def list_tools(self) -> list[dict[str, Any]]:
        return list(self._tools)

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Result:
        if name not in self._functions:
            raise ValueError(f"there is no tool {name!r}")
        value = finish(self._functions[name](**arguments))
        result = value if isinstance(value, Result) else Result(make_text(value))
        done = getattr(self._owner, "done", False)
        return replace(result, done=result.done or bool(done and not callable(done)))

    def verify(self, messages: Sequence[Message]) -> Result:
        return self._score(messages)

    def close(self) -> None:
        if hasattr(self._owner, "close"):
            finish(self._owner.close())

    def __getattr__(self, name: str) -> Any:
        if name in OPTIONAL_METHODS:
            method = getattr(self._owner, name)
            return lambda: finish(method())
        raise AttributeError(name)


def open_class(
    factory: Callable[[], Any], rewards: Mapping[str, Callable[..., Any]], task: Task, seed: int
) -> FunctionSession:
    """Start a session of a class in TRL's form: `reset(**row)`, public methods as tools, `get_reward`.

    `reset` gets the fields of the task that it accepts, and `seed` unless the task has a field of that name.
    `rewards` are reward functions in TRL's form; their values are added to that of `get_reward`.
    """
    owner = factory()
    observation = call_with_known(owner.reset, {"seed": seed, **task})
    messages = append_observation(prompt_messages(task), observation)

    def score(transcript: Sequence[Message]) -> Result:
        values = {type(owner).__name__: finish(owner.get_reward())} if hasattr(owner, "get_reward") else {}
        for name, function in rewards.items():
            values[name] = _call_reward_function(function, owner, transcript, len(messages), task)
        return sum_rewards(values)

    tools = describe_methods(type(owner))
    methods = {tool["function"]["name"]: getattr(owner, tool["function"]["name"]) for tool in tools}
    return FunctionSession(methods, messages, tools, score, owner)


# TRL calls reward functions with lists over a batch, here of one rollout.
def _call_reward_function(
    function: Callable[..., Any], owner: Any, messages: Sequence[Message], start: int, task: Task
) -> Any:
    columns = {name: [value] for name, value in task.items() if name not in ("prompt", "completion", "completion_ids")}
    batch = {"prompts": [list(messages[:start])], "completions": [list(messages[start:])], "environments": [owner]}
    logs = {"log_extra": lambda *_: None, "log_metric": lambda *_: None, "trainer_state": None}
    return call_with_known(function, {**columns, **batch, **logs})[0]


class OpenEnvSession:
    """A ResourceSession of OpenEnv. Its rules: a reward of None is unscored; the last reward is the rollout's.

    A reward of the call that ends the task is therefore not a step's reward, but that of `verify`.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._last: float | None = None

    def initial_messages(self) -> list[Message]:
        messages = finish(self._session.initial_messages())
        return [message if isinstance(message, dict) else _plain(message) for message in messages]

    def list_tools(self) -> list[dict[str, Any]]:
        return [make_tool(tool) for tool in finish(self._session.list_tools())]

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Result:
        result = finish(self._session.call_tool(name, dict(arguments)))
        data, error, done = result.data, result.error, bool(result.done)
        reward = read_field(result.metadata or {}, "reward")
        if reward is None and isinstance(data, Mapping):
            reward = data.get("reward")
        self._last = float(reward) if reward is not None else self._last
        text = make_text({"error": str(error)} if error else data)
        return Result(text, None if done or reward is None else float(reward), done, "tool error" if error else "")

    def verify(self, messages: Sequence[Message]) -> Result:
        result = finish(self._session.verify([dict(message) for message in messages]))
        reward = self._last if result.env_reward is None else float(result.env_reward)
        numbers = {name: value for name, value in (result.metrics or {}).items() if isinstance(value, int | float)}
        return Result(reward=reward, parts={name: float(value) for name, value in numbers.items()})

    def close(self) -> None:
        finish(self._session.close())


def open_factory(factory: Any, task: Task, seed: int) -> OpenEnvSession:
    """Start a session of an OpenEnv factory."""
    available = {"task": dict(task), "seed": seed, "episode_id": f"{task.get('id', '')}-{seed}"}
    return OpenEnvSession(call_with_known(factory.create, available))
