"""Demonstrations from an environment's own gold calls, for supervised training before reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rest_rl.data.samples import Dialogue, decompose
from rest_rl.data.write import check_output, sample_writer
from rest_rl.envs.check import make_calls
from rest_rl.envs.guard import Guard, Limits
from rest_rl.envs.load import load_environment
from rest_rl.envs.rollout import derive_seed
from rest_rl.envs.session import Environment
from rest_rl.errors import UserError

REFUSED = {"unknown tool", "bad arguments", "too many calls"}
"""Errors of calls that never reached the tool."""
MOST_LOST = 3
"""So many sessions may fail before one works."""


class Demonstration(NamedTuple):
    """A task solved with its gold calls. If they do not solve it, `dialogue` is None and `failure` says why."""

    dialogue: Dialogue | None
    failure: str = ""
    is_lost: bool = False
    """Whether the session failed."""


class Written(NamedTuple):
    """How many samples were written, from how many tasks, and why the other tasks were left out."""

    samples: int
    tasks: int
    failures: tuple[str, ...]


def write_demonstrations(
    env: Any,
    out: str | Path,
    *,
    number: int = 400,
    split: str = "",
    seed: int = 0,
    limits: Limits | None = None,
    on_task: Callable[[int], Any] = lambda done: None,
) -> Written:
    """Solve tasks with their gold calls, and write every turn as a sample for `sft`, to a .jsonl or .parquet file.

    Each turn makes one call. After the last one comes the gold answer, unless the call ended the task. Tasks whose gold
    calls are refused, raise or do not succeed are left out.

    Args:
        env: An environment, or what `load_environment` accepts.
        out: The file.
        number: How many tasks.
        split: The split of the tasks; by default the first, which is for training.
        seed: The seed of the tasks and sessions.
        limits: The limits of the sessions; longer results are cut.
        on_task: Called with the number of finished tasks.

    Raises:
        UserError: There is no such split, two tasks have the same id, no task was solved, or the file cannot be
            written. An existing file then stays as it is.
    """
    out, failures, samples, solved = Path(out), list[str](), 0, 0
    check_output(out, [])
    found = demonstrate(load_environment(env), number, split, seed, limits)
    first = next(found, None)  # errors of the environment are not errors of the file
    with sample_writer(out) as write:
        for dialogue, failure, is_lost in chain([first] if first else [], found):
            if dialogue is None:
                failures.append(failure)
            else:
                solved += 1
                for sample in decompose(dialogue):
                    write(sample)
                    samples += 1
            on_task(solved + len(failures))
            if is_lost and not solved and len(failures) >= MOST_LOST:
                break
        if not solved:
            reason = failures[0] if failures else "there are no tasks"
            raise UserError(f"no task was solved ({reason})", "gold calls that succeed", "run rest-rl env check")
    return Written(samples, solved, tuple(failures))


def demonstrate(
    environment: Environment, number: int, split: str = "", seed: int = 0, limits: Limits | None = None
) -> Iterator[Demonstration]:
    """Solve tasks with their gold calls; the arguments are those of `write_demonstrations`."""
    split = split or environment.splits[0]
    if split not in environment.splits:
        raise UserError(f"the split is {split!r}", f"one of {', '.join(environment.splits)}")
    tasks = environment.tasks(split, seed, number)
    identities = [task.get("id", n) for n, task in enumerate(tasks)]
    if len(set(map(str, identities))) < len(tasks):
        raise UserError("several tasks have the same id", "one id per task", "run rest-rl env check")
    for identity, task in zip(identities, tasks, strict=True):
        with closing(Guard(environment, task, derive_seed(seed, identity), limits or Limits())) as guard:
            found = _demonstrate(guard, str(identity), str(task.get("kind", "task")))
        yield found


def _demonstrate(guard: Guard, identity: str, kind: str) -> Demonstration:
    guard.wait_for_start()
    if guard.gold_calls is None:
        why = guard.failure or "no gold calls; add gold_calls() to the sessions, or the field gold_calls to the tasks"
        return Demonstration(None, f"task {identity!r}: {why}", bool(guard.failure))
    rollout = make_calls(guard, guard.gold_calls, answer=guard.gold_answer)
    refused = next((result.text for result in rollout.results if result.error in REFUSED), "")
    if not rollout.success or refused or guard.events["exception"]:
        last = rollout.results[-1].text if rollout.results else ""
        why = rollout.failure or refused or f"reward {rollout.reward}, last result {last or 'none'}"
        return Demonstration(None, f"task {identity!r}: {why:.300}", bool(rollout.failure))
    # Only what follows the prompt is a demonstration.
    prompt = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in guard.messages]
    messages = (*prompt, *rollout.messages[len(prompt) : len(rollout.messages) - guard.done])
    dialogue = Dialogue(identity, messages, tuple(guard.tools), kind)
    try:
        decompose(dialogue)
    except UserError as error:
        return Demonstration(None, f"task {identity!r}: {error}")
    return Demonstration(dialogue)
