"""Rollouts: a policy and an environment take turns, token for token as in the loss.

The prompt of a later turn is the prompt, the sampled tokens and the tokens of results so far: nothing that the policy
sampled is rendered again, so thoughts of earlier turns stay in its context. In `ids`, the tokens after the prompt,
`mask` is 1 for sampled tokens and 0 for results and for what the chat template adds around them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import ToolSample, to_message_call
from rest_rl.envs.guard import Guard, Limits
from rest_rl.envs.session import Environment, Message, Result, Task
from rest_rl.regions import decode_ids
from rest_rl.response import Gold, ParsedResponse, ToolCall

Stop = Literal["answered", "done", "turn limit", "truncated", "context", "failed"]
"""Why a rollout ended: the policy answered without a call, the session ended it, a limit, or the session failed."""


class Generated(NamedTuple):
    """The responses to a batch of prompts, as ids, and their log-probabilities if the sampler has them."""

    ids: list[list[int]]
    logprobs: list[list[float]] | None = None


Generate = Callable[[Sequence[list[int]], bool], Generated]
"""(prompts as ids, whether they are the first prompts, which groups share) -> responses of limited length."""


@dataclass
class Turn:
    """One response of the policy, `ids[start:end]`, with its calls and their results."""

    start: int
    end: int
    text: str
    calls: tuple[ToolCall, ...] = ()
    results: list[Result] = field(default_factory=list)
    state_hash: str | None = None
    """The state before this turn, if the session has `state_hash`."""

    @property
    def reward(self) -> float | None:
        """The sum of the calls' rewards; None if no call was scored."""
        return add_rewards(result.reward for result in self.results)


@dataclass
class Trajectory:
    """One rollout."""

    task: Task
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    stop: Stop = "failed"
    failure: str = ""
    """Why the session failed."""
    verdict: Result | None = None
    """The final reward and its parts."""
    events: Counter[str] = field(default_factory=Counter)
    """What went wrong, by kind."""
    gold_calls: list[ToolCall] | None = None
    """The calls that solve the task, if the session has `gold_calls`."""
    states: tuple[Any, Any] = (None, None)
    """The state at the start and at the end, if the session has `state`."""

    @property
    def rewards(self) -> list[float | None]:
        """The reward of each turn; the last one contains the final reward. A failed rollout has a final reward of 0."""
        rewards = [turn.reward for turn in self.turns] or [None]
        final = 0.0 if self.stop == "failed" else self.verdict and self.verdict.reward
        rewards[-1] = add_rewards([rewards[-1], final])
        return rewards

    @property
    def total(self) -> float | None:
        """The sum of all rewards; None if nothing was scored."""
        return add_rewards(self.rewards)

    @property
    def has_succeeded(self) -> bool:
        """Whether the part `success` of the final reward, or else the total, is at least 1."""
        parts = self.verdict.parts if self.verdict else {}
        return self.stop != "failed" and parts.get("success", self.total or 0.0) >= 1 - 1e-9


def add_rewards(rewards: Collection[float | None] | Iterator[float | None]) -> float | None:
    """Return the sum of the rewards that are not None; None if there is none."""
    known = [reward for reward in rewards if reward is not None]
    return sum(known) if known else None


def derive_seed(seed: int, identity: Any) -> int:
    """Return the seed of a task's sessions, the same for all rollouts of a group."""
    digest = hashlib.blake2b(f"{seed} {identity}".encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def make_sample(
    task: Task, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], gold: Gold | None = None
) -> ToolSample:
    """Return a task's prompt as a sample."""
    identity, kind = str(task.get("id", "")), str(task.get("kind", "task"))
    return ToolSample(identity, tuple(messages), tuple(map(dict, tools)), gold or Gold(), None, kind)


def start_turn(
    guard: Guard, parsed: ParsedResponse
) -> tuple[Message, Callable[[], tuple[list[str], list[Result]]] | None]:
    """Start the calls of a response.

    Returns:
        The response as a message, and a function that waits for the names of the called tools and their results; None
        if the response calls no tool.
    """
    message: Message = {"role": "assistant", "content": parsed.answer or ""}
    if parsed.thought:
        message["reasoning_content"] = parsed.thought
    if not parsed.attempted_call:
        return message, None
    message["tool_calls"] = [to_message_call(call, id=f"call_{n}") for n, call in enumerate(parsed.calls)]
    known = {tool["function"]["name"] for tool in guard.tools}
    finish = guard.start_calls(parsed.calls)

    def collect() -> tuple[list[str], list[Result]]:
        if not parsed.calls:
            guard.events["unreadable call"] += 1
            return ["unreadable"], [Result('{"error": "the call cannot be read"}', error="unreadable call")]
        return [call.name if call.name in known else "unknown" for call in parsed.calls], finish()

    return message, collect


def make_result_messages(names: Sequence[str], texts: Sequence[str]) -> list[Message]:
    """Return the messages with the results of the calls of one turn."""
    return [
        {"role": "tool", "tool_call_id": f"call_{n}", "name": name, "content": text}
        for n, (name, text) in enumerate(zip(names, texts, strict=True))
    ]


def cut_result(text: str, limit: int, layout: PromptLayout | None) -> str:
    """Return a tool's result with at most `limit` tokens (without a layout: four characters for one) and a note.

    Special tokens of the tokenizer are broken up, because a result must not end the turn.
    """
    head = text[: 16 * limit]
    if layout is None:
        kept = head[: 4 * limit]
        return kept if len(kept) == len(text) else f"{kept} [cut: {len(kept)} of {len(text)} characters]"
    for token in layout.special_tokens:
        head = head.replace(token, token[:1] + " " + token[1:])
    ids = layout.tokenizer(head, add_special_tokens=False)["input_ids"]
    if len(ids) <= limit and len(text) <= 16 * limit:
        return head
    kept = layout.tokenizer.decode(ids[:limit])
    return f"{kept} [cut: {len(kept)} of {len(text)} characters]"


class Rollouts:
    """Runs tasks of an environment with one policy's tokenizer, prompt layout and stop tokens."""

    def __init__(
        self,
        environment: Environment,
        layout: PromptLayout,
        limits: Limits,
        ends: Collection[int],
        response_tokens: int,
    ) -> None:
        self.environment, self.layout, self.limits = environment, layout, limits
        self.ends, self.response_tokens = frozenset(ends), response_tokens
        self._end_texts = [text for text in map(layout.tokenizer.decode, sorted(self.ends)) if text]

    def run(
        self,
        tasks: Sequence[tuple[Task, int]],
        generate: Generate,
        on_turn: Callable[[int, int], Any] = lambda turn, active: None,
    ) -> list[Trajectory]:
        """Run tasks, given with their seeds, side by side; return their trajectories in the same order.

        `on_turn` is called with the number of each turn and of the rollouts that take it.
        """
        guards = [Guard(self.environment, task, seed, self.limits) for task, seed in tasks]
        trajectories = [Trajectory(task) for task, _ in tasks]
        try:
            active = [i for i, guard in enumerate(guards) if self._start(guard, trajectories[i])]
            for number in range(self.limits.turns):
                active = [i for i in active if self._fits(trajectories[i])]
                if not active:
                    break
                on_turn(number, len(active))
                prompts = [trajectories[i].prompt_ids + trajectories[i].ids for i in active]
                responses = generate(prompts, number == 0 and len(active) == len(tasks))
                waiting = []
                for at, i in enumerate(active):
                    self._add_response(trajectories[i], responses, at)
                    waiting.append((i, self._call_tools(guards[i], trajectories[i])))
                active = [i for i, finish in waiting if finish is not None and finish()]
            for guard, trajectory in zip(guards, trajectories, strict=True):
                self._finish(guard, trajectory)
        finally:
            for guard in guards:
                guard.close()
        return trajectories

    def _start(self, guard: Guard, trajectory: Trajectory) -> bool:
        guard.wait_for_start()
        if guard.failure:
            return False
        trajectory.messages, trajectory.gold_calls = list(guard.messages), guard.gold_calls
        text = self.layout.render(make_sample(trajectory.task, guard.messages, guard.tools))
        trajectory.prompt_ids = self._encode(text)
        trajectory.stop = "turn limit"
        return True

    def _fits(self, trajectory: Trajectory) -> bool:
        used = len(trajectory.prompt_ids) + len(trajectory.ids)
        if self.layout.context is None or used + self.response_tokens <= self.layout.context:
            return True
        trajectory.stop = "context"
        return False

    def _add_response(self, trajectory: Trajectory, responses: Generated, at: int) -> None:
        ids, start = responses.ids[at], len(trajectory.ids)
        text = decode_ids(ids, self.layout.tokenizer, self.layout.format.tags)
        trajectory.turns.append(Turn(start, start + len(ids), text))
        self._extend(trajectory, ids, 1, responses.logprobs[at] if responses.logprobs else None)

    # Starts the calls of the last turn, so that all rollouts execute theirs at the same time. Returns None if the
    # rollout is over, else a function that appends the results and says whether it goes on.
    def _call_tools(self, guard: Guard, trajectory: Trajectory) -> Callable[[], bool] | None:
        turn = trajectory.turns[-1]
        if self.ends and trajectory.ids[-1:] and trajectory.ids[-1] not in self.ends:
            trajectory.stop = "truncated"
            trajectory.messages.append({"role": "assistant", "content": turn.text})
            return None
        parsed = self.layout.format.parse(turn.text, spans=False)
        turn.calls, turn.state_hash = parsed.calls, guard.read("state_hash")
        message, finish = start_turn(guard, parsed)
        trajectory.messages.append(message)
        if finish is None:
            trajectory.stop = "answered"
            return None

        def collect() -> bool:
            names, turn.results = finish()
            texts = [self._cut(result.text) for result in turn.results]
            messages = make_result_messages(names, texts)
            trajectory.messages.extend(messages)
            suffix = self.layout.render_results(names, messages, self._end_texts)
            self._extend(trajectory, self._encode(suffix), 0, None)
            if guard.failure or guard.done:
                trajectory.stop = "failed" if guard.failure else "done"
            return trajectory.stop == "turn limit"

        return collect

    def _extend(self, trajectory: Trajectory, ids: Sequence[int], mask: int, logprobs: list[float] | None) -> None:
        trajectory.ids.extend(ids)
        trajectory.mask.extend([mask] * len(ids))
        trajectory.logprobs.extend(logprobs or [0.0] * len(ids))

    def _cut(self, text: str) -> str:
        return cut_result(text, self.limits.result_tokens, self.layout)

    def _finish(self, guard: Guard, trajectory: Trajectory) -> None:
        if trajectory.turns and trajectory.mask and trajectory.mask[-1] == 0:
            # Results after the last response are not part of any later prompt.
            del trajectory.ids[trajectory.turns[-1].end :]
            del trajectory.mask[len(trajectory.ids) :], trajectory.logprobs[len(trajectory.ids) :]
        trajectory.verdict = guard.verify(trajectory.messages)
        trajectory.states = (guard.first_state, guard.read("state"))
        trajectory.failure, trajectory.events = guard.failure, guard.events
        if guard.failure:
            trajectory.stop = "failed"
        trajectory.events[f"stop: {trajectory.stop}"] += 1

    def _encode(self, text: str) -> list[int]:
        return list(self.layout.tokenizer(text, add_special_tokens=False)["input_ids"])
