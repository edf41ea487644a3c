"""Generated tasks on the eight simulated APIs (backends) of BFCL, executed by bfcl-eval in a confined process.

States, requests and calls are drawn from `assets/bfcl_tasks.toml`. Nothing comes from the samples of BFCL, which the
benchmark measures. A task asks for two to four calls, in order, and mentions every value that they need.

Splits:
    `train`: for training. `unseen_tools`: every task needs a tool that `train` neither needs nor offers.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count, islice
from string import Formatter
from threading import Lock
from typing import Any, NamedTuple

from rest_rl.config import parse_toml, read_asset
from rest_rl.data.shop import CITIES, COLORS, FIRST_NAMES, ITEMS, LAST_NAMES
from rest_rl.envs.bfcl_sandbox.entries import to_tools
from rest_rl.envs.bfcl_sandbox.package import find_package
from rest_rl.envs.bfcl_sandbox.sandbox import Sandbox, SandboxError
from rest_rl.envs.session import Message, Result, Task
from rest_rl.errors import UserError

SPLITS = ("train", "unseen_tools")
STEP_SHARE = 0.3
"""Sum of the step rewards of a rollout that makes every call that its task needs."""
SECONDS = 2
"""The limit of CPU time for all calls of a rollout."""
_WORDS = {"color": COLORS, "item": ITEMS, "city": CITIES, "first": FIRST_NAMES, "last": LAST_NAMES}
_TABLE = parse_toml(read_asset("bfcl_tasks.toml"), "bfcl_tasks.toml")
HELD_OUT = frozenset(_TABLE.pop("held_out"))
"""The tools that only `unseen_tools` has."""
_COMMON = _TABLE.pop("pools")
Pools = dict[str, Sequence[Any]]
"""The values that requests can mention in a state, by kind."""


class Action(NamedTuple):
    """A method of a backend, and a phrase that asks for a call of it; `changes` says whether it changes the state."""

    backend: str
    method: str
    phrase: str
    changes: bool


ACTIONS = [
    Action(backend, method, phrase, kind == "changes")
    for backend, table in _TABLE.items()
    for kind in ("reads", "changes")
    for method, phrases in table.get(kind, {}).items()
    for phrase in phrases
]
"""What tasks can ask for."""
Step = tuple[Action, str, dict[str, Any]]
"""An action, its phrase with values, and the call."""


class BFCL:
    """Tasks on one or two of BFCL's backends.

    The rewards of a rollout sum to at most 1. The calls that a task needs share `STEP_SHARE` equally, each paid once: a
    call that changes something when it is made, a call that reads when its result is seen. `verify` adds the rest if
    the final state is the one after the gold calls, and all results that the task asks for were seen.
    """

    name = "bfcl-tasks"
    splits = SPLITS
    step_rewards = True

    def __init__(self) -> None:
        self._lock = Lock()

    def tasks(self, split: str, seed: int, number: int) -> list[Task]:
        """Draw tasks. Raises UserError for an unknown split, or if bfcl-eval is not installed."""
        if split not in SPLITS:
            raise UserError(f"split is {split!r}", f"one of {', '.join(SPLITS)}")
        return list(islice(self._draw_tasks(split, seed), max(number, 0)))

    def open(self, task: Task, seed: int) -> BfclSession:
        """Start a session. The task contains the whole state, so the seed changes nothing."""
        return BfclSession(self, task)

    def replay(self, task: Task, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Execute calls on new backends in the task's first state, see `Sandbox.replay`. Thread-safe."""
        with self._lock:
            return self._sandbox.replay(task["backends"], task["config"], calls)

    @cached_property
    def _sandbox(self) -> Sandbox:
        return Sandbox(find_package("v4"), seconds=SECONDS)

    @cached_property
    def tools(self) -> dict[str, dict[str, Any]]:
        """The JSON schemas of all tools."""
        with self._lock:
            docs = [doc for backend in self._sandbox.documents().values() for doc in backend]
            types = self._sandbox.constants()["types"]
        return {tool["function"]["name"]: tool for tool in to_tools(docs, types)}

    def _draw_tasks(self, split: str, seed: int) -> Iterator[Task]:
        rng = random.Random(f"bfcl {split} {seed}")
        drawn = (self._draw_task(rng, split) for _ in count())
        for index, task in enumerate(task for task in drawn if task):
            yield {"id": f"bfcl-{split}-{seed}-{index}", **task}

    # Draws more calls than the task needs and keeps the first ones that work as intended. The calls in between may have
    # changed something, so the kept ones must work again without them. None if that fails.
    def _draw_task(self, rng: random.Random, split: str) -> Task | None:
        backends = rng.sample(list(_TABLE), rng.choice((1, 1, 2)))
        states = {name: draw_state(rng, name) for name in backends}
        task = {"backends": backends, "config": {name: config for name, (config, _) in states.items()}}
        choice = [action for action in ACTIONS if action.backend in backends]
        choice = [action for action in choice if split != "train" or action.method not in HELD_OUT]
        number = rng.choice((2, 3, 4))
        chosen = [rng.choice(choice) for _ in range(3 * number)]
        steps = [(action, *fill_phrase(rng, action, states[action.backend][1])) for action in chosen]
        steps = self._keep_working(task, steps)[0][:number]
        used, gold = {action.method for action, _, _ in steps}, [call for _, _, call in steps]
        if len(set(map(json.dumps, gold))) < number or (split != "train" and used.isdisjoint(HELD_OUT)):
            return None
        kept, state = self._keep_working(task, steps)
        reads = any(not action.changes for action, _, _ in steps)
        if len(kept) < number or not (reads or state != self.replay(task, [])["state"]):
            return None  # calls that cancel each other out leave nothing to do
        others = sorted({action.method for action in choice} - used)
        tools = sorted(used) + rng.sample(others, min(rng.randint(2, 5), len(others)))
        request = join_phrases(rng, [text for _, text, _ in steps])
        return {**task, "request": request, "tools": rng.sample(tools, len(tools)), "gold": gold}

    def _keep_working(self, task: Task, steps: Sequence[Step]) -> tuple[list[Step], Any]:
        outcome = self.replay(task, [call for _, _, call in steps])
        pairs = zip(steps, outcome["results"], strict=True)
        kept = [step for step, (_, failed, changed) in pairs if not failed and changed == step[0].changes]
        return kept, outcome["state"]


class BfclSession:
    """The backends of one task in one rollout.

    Every call is executed after all earlier ones of the rollout, on new backends, so that no process holds a session.
    """

    def __init__(self, environment: BFCL, task: Task) -> None:
        self._environment, self._task = environment, task
        gold = environment.replay(task, task["gold"])
        self._gold_state, self._state = gold["state"], environment.replay(task, [])["state"]
        outcomes = zip(task["gold"], gold["results"], strict=True)
        self._needed = [_describe_call(call, text, changed) for call, (text, _, changed) in outcomes]
        self._left = list(self._needed)
        self._calls: list[dict[str, Any]] = []
        self._seen: set[str] = set()

    def initial_messages(self) -> list[Message]:
        return [{"role": "user", "content": self._task["request"]}]

    def list_tools(self) -> list[dict[str, Any]]:
        return [self._environment.tools[name] for name in self._task["tools"]]

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Execute a call. One that exceeds the limits ends the rollout."""
        self._calls.append({"name": name, "arguments": dict(arguments)})
        try:
            outcome = self._environment.replay(self._task, self._calls)
        except SandboxError as error:
            return Result(f"Error during execution: {error}", 0.0, done=True, error="limit")
        self._state = outcome["state"]
        text, failed, changed = outcome["results"][-1]
        call = _describe_call(self._calls[-1], text, changed)
        self._seen.add(f"{call} {text}")
        if failed or call not in self._left:
            return Result(text, 0.0, error="failed call" if failed else "")
        self._left.remove(call)
        return Result(text, STEP_SHARE / len(self._needed))

    def verify(self, messages: Sequence[Message]) -> Result:
        has_read = not any(call.startswith("read") for call in self._left)
        success = float(has_read and self._state == self._gold_state)
        progress = 1 - len(self._left) / len(self._needed)
        return Result(reward=(1 - STEP_SHARE) * success, parts={"success": success, "progress": progress})

    def close(self) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return self._state

    def state_hash(self) -> str:
        """Return a hash of the state and of the distinct calls and results so far."""
        text = json.dumps([self._state, sorted(self._seen)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def gold_calls(self) -> list[dict[str, Any]]:
        return [dict(call) for call in self._task["gold"]]


# What counts as the same call: for one that changes something its arguments, for one that reads its result.
def _describe_call(call: Mapping[str, Any], text: str, changed: bool) -> str:
    what = call["arguments"] if changed else text
    return f"{'change' if changed else 'read'} {json.dumps([call['name'], what], sort_keys=True)}"


def fill_phrase(rng: random.Random, action: Action, pools: Pools) -> tuple[str, dict[str, Any]]:
    """Draw the values of an action's phrase; return its text and the call."""
    text, arguments = "", dict[str, Any]()
    for literal, field, kind, _ in Formatter().parse(action.phrase):
        text += literal
        if field and kind:
            others = [value for value in pools.get(kind, ()) if value not in arguments.values()]
            value = json.loads(kind[1:]) if kind[0] in "=~" else rng.choice(others)
            *parents, key = field.split(".")
            target = arguments
            for parent in parents:
                target = target.setdefault(parent, {})
            target[key] = value
            text += "" if kind[0] == "~" else _show(value)
    return text, {"name": action.method, "arguments": arguments}


def _show(value: Any) -> str:
    return ", ".join(map(_show, value)) if isinstance(value, list) else json.dumps(value)


def join_phrases(rng: random.Random, phrases: Sequence[str]) -> str:
    """Return a request that asks for several things in this order."""
    listed = " ".join(f"{n}. {text}." for n, text in enumerate(phrases, 1))
    after = f"First {phrases[0]}. " + " ".join(f"After that, {text}." for text in phrases[1:])
    return rng.choice((f"Do this, in this order: {listed}", after, f"Please {', then '.join(phrases)}."))


def draw_state(rng: random.Random, backend: str) -> tuple[dict[str, Any], Pools]:
    """Draw the first state of a backend, in the form that its `_load_scenario` expects, and the values in it."""
    pools, table = Pools(), _TABLE[backend]
    for name, kind in {**_COMMON, **table["pools"]}.items():
        pools[name] = _draw_pool(rng, kind, pools)
    return {**_fill(rng, table.get("state", {}), pools), "random_seed": rng.randrange(10**6)}, pools


def _draw_pool(rng: random.Random, kind: Any, pools: Pools) -> Sequence[Any]:
    if isinstance(kind, list):
        return kind
    if "of" in kind:
        return [rng.sample(pools[kind["of"]], size) for size in kind["sizes"]]
    columns = [rng.sample(words, kind["number"]) for words in _WORDS.values()]
    texts = [kind["pattern"].format(**dict(zip(_WORDS, row, strict=True))) for row in zip(*columns, strict=True)]
    texts = [re.sub("#", lambda _: str(rng.randint(1, 9)), text) for text in texts]
    return list(map(json.loads, texts)) if kind.get("json") else texts


def _fill(rng: random.Random, template: Any, pools: Pools) -> Any:
    if isinstance(template, dict):
        return {_fill(rng, key, pools): _fill(rng, value, pools) for key, value in template.items()}
    if isinstance(template, list):
        return [_fill(rng, item, pools) for item in template]
    if not isinstance(template, str) or not template.startswith("{"):
        return template
    name, _, index = template[1:-1].partition(".")
    return pools[name][int(index)] if index else rng.choice(pools[name])
