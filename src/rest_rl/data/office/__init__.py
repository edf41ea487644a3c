"""Dialogues with the executable tools of an office, in plain English, for pretrained models.

Kinds:
    `single`, `parallel` and `dependent` are those of the tool world. `none`: no tool fits, or the user only chats, and
    the model should answer with text.
Splits:
    `train`: for training. `unseen_tools`: tools that `train` never shows, with their own phrasings.
    `unseen_phrasings`: tools of `train`, requested in other words. `unseen_values`: names, cities, dates, numbers and
    texts that `train` never uses. Each held-out split differs from `train` only in this respect.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from faker import Faker

from rest_rl.data.office.catalog import (
    CHAINS,
    CHAT,
    JOINERS,
    PLACEHOLDER,
    REFUSALS,
    TOOLS,
    Chain,
    OfficeTool,
    build_arguments,
    choose_options,
)
from rest_rl.data.office.state import Office
from rest_rl.data.office.values import Value, draw_value
from rest_rl.data.samples import Dialogue, to_message_call
from rest_rl.data.tool_world import CYCLE, KINDS
from rest_rl.errors import UserError
from rest_rl.response import ToolCall

Split = Literal["train", "unseen_tools", "unseen_phrasings", "unseen_values"]
SPLITS: tuple[Split, ...] = get_args(Split)
PROMPT_SIZES = (2, 2, 3, 3, 4)
"""Numbers of tools in a prompt, each as probable as it is frequent here."""
_CHAT_SHARE = 0.25


class _Draws(NamedTuple):
    """What the values and phrasings of one dialogue are drawn from."""

    faker: Faker
    split: Split
    taken: set[str]

    def phrasing(self, source: OfficeTool | Chain) -> str:
        phrasings = source.unseen_requests if self.split == "unseen_phrasings" else source.requests
        return choose_options(self.faker.random, self.faker.random.choice(phrasings))

    # Returns the request and the values of the paths in it.
    def fill(self, phrasing: str, slots: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        values: dict[str, Value] = {}
        for path in PLACEHOLDER.findall(phrasing):
            if path not in values:
                values[path] = draw_value(self.faker, slots[path], self.split == "unseen_values", self.taken)
        text = PLACEHOLDER.sub(lambda match: values[match[1]].text, phrasing)
        return text, {path: value.gold for path, value in values.items()}


def dialogues(seed: int, split: Split = "train", *, kinds: Sequence[str] | None = None) -> Iterator[Dialogue]:
    """Yield the endless sequence of dialogues that a seed and a split determine.

    Args:
        seed: The seed of the sequence.
        split: The split.
        kinds: Keep only dialogues of these kinds; None keeps all. Their shares are those of the tool world.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}", f"one of {', '.join(SPLITS)}")
    if not set(kinds or KINDS) <= set(KINDS):
        raise UserError(f"kinds is {kinds!r}", f"some of {', '.join(KINDS)}")
    faker, index = Faker("en_US"), 0
    faker.seed_instance(f"{split} {seed}")
    while True:
        for kind in faker.random.sample(CYCLE, len(CYCLE)):
            if kind in (kinds or KINDS):
                yield _dialogue(_Draws(faker, split, set()), f"office-{split}-{seed}-{index}", kind)
                index += 1


def _dialogue(draws: _Draws, identity: str, kind: str) -> Dialogue:
    rng = draws.faker.random
    size = rng.choice(PROMPT_SIZES)
    if kind == "dependent":
        chain = rng.choice([chain for chain in CHAINS if TOOLS[chain.tools[0]].unseen == _is_unseen(draws)])
        offered = _draw_tools(draws, size, [TOOLS[name] for name in chain.tools])
        request, turns = _chain_turns(draws, chain)
    elif kind == "none":
        asked, *offered = _draw_tools(draws, size + 1)
        request, turns = _answer_turn(draws, asked)
    else:
        offered = _draw_tools(draws, size)
        request, turns = _call_turn(draws, offered[: 1 + (kind == "parallel")])
    schemas = tuple(tool.schema() for tool in rng.sample(offered, len(offered)))
    return Dialogue(identity, ({"role": "user", "content": request}, *turns), schemas, kind)


def _is_unseen(draws: _Draws) -> bool:
    return draws.split == "unseen_tools"


# Returns `size` tools of the split: those given, then others, of which none is a rival of another.
def _draw_tools(draws: _Draws, size: int, given: Sequence[OfficeTool] = ()) -> list[OfficeTool]:
    tools = list(given)
    candidates = [tool for tool in TOOLS.values() if tool.unseen == _is_unseen(draws) and tool not in tools]
    for tool in draws.faker.random.sample(candidates, len(candidates)):
        if len(tools) < size and not any(map(tool.is_rival, tools)):
            tools.append(tool)
    return tools


def _call_turn(draws: _Draws, tools: Sequence[OfficeTool]) -> tuple[str, list[dict[str, Any]]]:
    requests, calls = [], []
    for tool in tools:
        phrasing = draws.phrasing(tool)
        if requests:
            phrasing = f"{draws.faker.random.choice(JOINERS)} {_lower_first(phrasing)}"
        request, values = draws.fill(phrasing, tool.slots)
        requests.append(request)
        calls.append(ToolCall(tool.name, build_arguments(tool, values)))
    return " ".join(requests), [_assistant_turn(*calls)]


def _chain_turns(draws: _Draws, chain: Chain) -> tuple[str, list[dict[str, Any]]]:
    tools = [TOOLS[name] for name in chain.tools]
    slots = {f"{number}.{path}": slot for number, tool in enumerate(tools, 1) for path, slot in tool.slots.items()}
    request, values = draws.fill(draws.phrasing(chain), slots)
    own = [{path[2:]: value for path, value in values.items() if path[0] == number} for number in "12"]
    first = ToolCall(tools[0].name, build_arguments(tools[0], own[0]))
    result = Office().execute(first)
    taken = {path: _find(json.loads(result), place) for path, place in chain.take.items()}
    second = ToolCall(tools[1].name, build_arguments(tools[1], {**own[1], **taken}))
    return request, [_assistant_turn(first), {"role": "tool", "content": result}, _assistant_turn(second)]


# Returns the part of a result at a path such as `events.0.id`.
def _find(result: Any, path: str) -> Any:
    for key in path.split("."):
        result = result[int(key) if isinstance(result, list) else key]
    return result


def _answer_turn(draws: _Draws, asked: OfficeTool) -> tuple[str, list[dict[str, Any]]]:
    rng = draws.faker.random
    # Chat has no values, so it would not be unseen in `unseen_values`.
    if draws.split != "unseen_values" and rng.random() < _CHAT_SHARE:
        request, answer = rng.choice(CHAT["unseen_requests" if draws.split == "unseen_phrasings" else "requests"])
    else:
        answer = rng.choice(REFUSALS)
        request, _ = draws.fill(draws.phrasing(asked), asked.slots)
    return request, [{"role": "assistant", "content": answer}]


def _assistant_turn(*calls: ToolCall) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [to_message_call(call) for call in calls]}


def _lower_first(text: str) -> str:
    return text if text.startswith(("I ", "I'", "{", "[")) else text[0].lower() + text[1:]
