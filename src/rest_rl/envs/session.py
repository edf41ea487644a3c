"""The protocol between an environment and a rollout: one session per rollout, made from a task and a seed.

The methods of a session are those of OpenEnv's in-process `ResourceSession`, with step rewards and an end added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, Any]
"""A chat message in OpenAI's form: role, content, and tool_calls or name."""
Task = Mapping[str, Any]
"""A task row, a JSON object: an `id`, and whatever the environment needs to set the task up."""


@dataclass(frozen=True)
class Result:
    """What a session returns for a call or for the whole rollout."""

    text: str = ""
    """What the model sees."""
    reward: float | None = None
    """None if this step was not scored, which is not a reward of 0."""
    done: bool = False
    """Whether the task is over; the rollout then ends, and no further call runs."""
    error: str = ""
    """What kind of error the call was, in a word or two, for the counts; empty if it worked."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named parts of the reward, for the metrics."""


class ToolSession(Protocol):
    """The state of one task in one rollout."""

    def initial_messages(self) -> list[Message]:
        """Return the prompt: usually one user message, and a system message before it if the task has rules."""
        ...

    def list_tools(self) -> list[dict[str, Any]]:
        """Return the tools as JSON schemas in OpenAI's form, {"type": "function", "function": {...}}."""
        ...

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Execute one call. The arguments match the tool's schema. An exception counts as an error of the tool."""
        ...

    def verify(self, messages: Sequence[Message]) -> Result:
        """Score the rollout from its messages and the state: `reward`, and its `parts`. The text is ignored."""
        ...

    def close(self) -> None:
        """Release what the session holds. Called once, also if the rollout failed."""
        ...


# What a session may have besides the protocol; rollouts and checks look for these by name. An attribute `parallel` that
# is True lets the calls of one turn run at the same time, in threads of their own.
OPTIONAL_METHODS = {
    "state": "() -> the state as JSON, for reports that show what a rollout changed",
    "state_hash": "() -> a text that is equal for equal states, for credit = 'anchor'",
    "gold_answer": "() -> the answer after the gold calls, for checks, demonstrations and the oracle",
    "gold_calls": "() -> the calls that solve the task, a list of {'name', 'arguments'}, for checks, "
    "demonstrations and credit = 'matched'",
}


# What an environment may have besides the protocol: `step_rewards` is True if its sessions reward single calls, which
# makes `return_to_go` the default credit.
class Environment(Protocol):
    """Makes sessions. A user's environment of any supported kind is adapted to this (`load_environment`)."""

    name: str
    """A short name for messages and reports."""
    splits: tuple[str, ...]
    """The splits of its tasks: the first is for training, the others are held out. At least one."""

    def tasks(self, split: str, seed: int, number: int) -> list[Task]:
        """Return the first `number` tasks of a split, or fewer if it has fewer; equal arguments give equal tasks."""
        ...

    def open(self, task: Task, seed: int) -> ToolSession:
        """Start a session. Sessions with equal tasks and seeds start in equal states, and share no state."""
        ...
