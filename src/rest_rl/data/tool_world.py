"""A small world of executable tools with seeded requests, gold calls and results, for training on a laptop.

A tool is a template (verb, noun, slots) with a random name and random argument names, drawn anew for every dialogue.
Therefore a model cannot memorize names and must read them in the prompt (name masking as in Hammer, arXiv 2410.04587).

Kinds:
    `single`: one call. `parallel`: two calls in one turn. `dependent`: two turns; the second call uses a value from the
    result of the first. `none`: no tool fits, and the model should answer with text.
Decisions (where the model decides what to call):
    `reasoning`: the reasoning spells out the tools, keys and values that the calls repeat. `call`: the reasoning is
    random filler. Names then come from the template, because a small model needs reasoning to find random names.
Splits:
    `train`: for training. `unseen_tools`: templates and tool names that `train` never uses. `unseen_values`: argument
    values that `train` never uses. Each held-out split differs from `train` only in this respect.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

from rest_rl.data.samples import Dialogue, ToolSample, iterate_samples, to_message_call
from rest_rl.errors import UserError
from rest_rl.response import ToolCall

Split = Literal["train", "unseen_tools", "unseen_values"]
SPLITS: tuple[Split, ...] = get_args(Split)
Decision = Literal["reasoning", "call"]
KINDS = ("single", "parallel", "dependent", "none")
REFUSAL = "no tool fits"
NO_TOOL = "none"

VERBS = ("check", "book", "find", "order", "cancel", "rate", "send", "track", "open", "share")
YIELDS = {
    "weather": "date", "hotel": "city", "flight": "city", "train": "date", "taxi": "person", "dinner": "dish",
    "recipe": "dish", "concert": "music", "album": "music", "ticket": "code", "parcel": "code", "invoice": "code",
    "paint": "color", "shirt": "color", "furniture": "item", "catalog": "item", "meeting": "date", "contact": "person",
    "doctor": "person", "lesson": "music", "museum": "city", "garden": "color", "laptop": "item", "menu": "dish",
}  # fmt: skip
"""For each noun, the slot whose values the tool returns."""
SLOTS = {
    "city": ("lima", "oslo", "rome", "cairo", "tokyo", "paris", "delhi", "quito"),
    "person": ("anna", "boris", "carla", "david", "elena", "felix", "greta", "hugo"),
    "date": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "today"),
    "item": ("lamp", "chair", "mirror", "clock", "carpet", "sofa", "shelf", "desk"),
    "code": ("alpha", "beta", "gamma", "delta", "sigma", "omega", "theta", "kappa"),
    "color": ("red", "blue", "green", "black", "white", "pink", "brown", "grey"),
    "dish": ("soup", "pasta", "salad", "curry", "pizza", "bread", "rice", "stew"),
    "music": ("jazz", "rock", "folk", "blues", "opera", "techno", "swing", "soul"),
}
NUMBERS = range(10, 60)
FILLER = (
    "well", "so", "maybe", "then", "let", "me", "think", "hmm", "okay", "right", "again", "first", "next", "after",
    "this", "that", "here", "there", "one", "two", "some", "more", "most", "other", "same", "good", "fine", "sure",
    "wait", "look", "see", "try", "use", "need", "want", "could", "would", "should", "might", "just", "only", "also",
    "still", "yet", "now", "back", "over", "under", "about", "into", "from", "with", "what", "which", "how", "why",
    "when", "where", "who", "could", "be", "is", "it", "we", "you", "they", "all", "any",
)  # fmt: skip
"""Words of filler reasoning."""
FILLER_LENGTHS = range(24, 41)
"""Possible numbers of words of filler reasoning."""
OPENING_TAGS = ("please", "kindly", "now", "hello")
NAME_PARTS = tuple(c + v for c in "kstnmrvbdg" for v in "aeio")
KEY_PARTS = tuple(c + v for c in "pzfljhwc" for v in "aeio")
_NOUNS = tuple(YIELDS)
# Every fifth combination is held out.
_FIFTH = 5
# The kinds of nine dialogues, which give ten samples. Each cycle is shuffled, so the share of each kind is exact.
CYCLE = ("single",) * 4 + ("parallel",) * 2 + ("none",) * 2 + ("dependent",)


class WorldTool(NamedTuple):
    """A tool template (verb, noun, slots) and its names; the argument `keys[i]` takes a value of `slots[i]`."""

    verb: str
    noun: str
    slots: tuple[str, ...]
    name: str
    keys: tuple[str, ...]

    @property
    def description(self) -> str:
        """What the tool does, in the words with which a user's request begins."""
        return f"{self.verb} {self.noun}"

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the tool in OpenAI's form."""
        properties = {k: {"type": "string", "description": s} for k, s in zip(self.keys, self.slots, strict=True)}
        parameters = {"type": "object", "properties": properties, "required": list(self.keys)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def is_held_out_template(verb: str, noun: str) -> bool:
    """Return whether tools with this verb and noun occur only in `unseen_tools`; `train` uses them in other pairs."""
    # A Latin-square rule: the sum modulo 5 holds out one fifth of the pairs, spread evenly over verbs and nouns. The
    # same idea splits names and values below.
    return (VERBS.index(verb) + 2 * _NOUNS.index(noun)) % _FIFTH == 0


def is_held_out_name(name: str) -> bool:
    """Return whether the two-part tool name belongs to `unseen_tools`; `train` uses both parts in other names."""
    first, second = name.split("_")
    return (NAME_PARTS.index(first) + 3 * NAME_PARTS.index(second)) % _FIFTH == 0


def is_held_out_value(value: str) -> bool:
    """Return whether the value belongs to `unseen_values`; `train` uses its word and number in other values."""
    word, number = value.rsplit("-", 1)
    words = next(words for words in SLOTS.values() if word in words)
    return (words.index(word) + int(number)) % _FIFTH == 0


def tool_world(
    seed: int,
    n: int,
    split: Split = "train",
    *,
    num_tools: int = 3,
    kinds: Sequence[str] | None = None,
    decision: Decision = "reasoning",
) -> list[ToolSample]:
    """Return the first `n` samples of the endless sequence that the seed and the split determine.

    Args:
        seed: The seed of the sequence.
        n: The number of samples.
        split: The split.
        num_tools: The number of tools in each prompt, at least 2.
        kinds: Keep only dialogues of these kinds; None keeps all. Of all samples, 40 % are `single`, and `parallel`,
            `dependent` (both turns together) and `none` are 20 % each.
        decision: Where the model decides what to call.
    """
    drawn = dialogues(seed, split, num_tools=num_tools, kinds=kinds, decision=decision)
    return list(islice(iterate_samples(drawn), max(n, 0)))


def dialogues(
    seed: int,
    split: Split = "train",
    *,
    num_tools: int = 3,
    kinds: Sequence[str] | None = None,
    decision: Decision = "reasoning",
) -> Iterator[Dialogue]:
    """Yield the endless sequence of dialogues of a seed and split; the arguments are the same as in `tool_world`."""
    for what, given, known in (("split", split, SPLITS), ("decision", decision, get_args(Decision))):
        if given not in known:
            raise UserError(f"{what} is {given!r}", f"one of {', '.join(known)}")
    if not set(kinds or KINDS) <= set(KINDS):
        raise UserError(f"kinds is {kinds!r}", f"some of {', '.join(KINDS)}")
    if not 2 <= num_tools <= len(_NOUNS) - 2:
        raise UserError(f"num_tools is {num_tools}", f"2 to {len(_NOUNS) - 2}")
    rng, index = random.Random(f"{split} {seed}"), 0
    while True:
        for kind in rng.sample(CYCLE, len(CYCLE)):
            if kind in (kinds or KINDS):
                dialogue = _dialogue(rng, f"{split}-{seed}-{index}", kind, split, num_tools, decision)
                yield dialogue if decision == "reasoning" else _with_filler(rng, dialogue)
                index += 1


def _with_filler(rng: random.Random, dialogue: Dialogue) -> Dialogue:
    messages = [dict(message) for message in dialogue.messages]
    for message in messages:
        if message["role"] == "assistant":
            words = [rng.choice(FILLER) for _ in range(rng.choice(FILLER_LENGTHS))]
            message["reasoning_content"] = " ".join(words)
    return replace(dialogue, messages=tuple(messages))


def _dialogue(
    rng: random.Random, identity: str, kind: str, split: Split, num_tools: int, decision: Decision
) -> Dialogue:
    tools = _draw_tools(rng, kind, split, num_tools + (kind == "none"))
    if decision == "call":
        tools = [tool._replace(name=f"{tool.verb}_{tool.noun}", keys=tool.slots) for tool in tools]
    asked = tools[:2] if kind in ("parallel", "dependent") else tools[:1]
    values = [[draw_value(rng, slot, split) for slot in tool.slots] for tool in asked]
    # For `none`, the request fits a tool that is drawn like the others but not offered.
    offered = tools[1:] if kind == "none" else tools
    schemas = [tool.schema() for tool in rng.sample(offered, len(offered))]
    calls = [ToolCall(t.name, dict(zip(t.keys, v, strict=True))) for t, v in zip(asked, values, strict=True)]
    wishes = [_wish(rng, tool, value) for tool, value in zip(asked, values, strict=True)]
    if kind == "none":
        thought = f"{asked[0].description}: {NO_TOOL}"
        turns = [{"role": "assistant", "reasoning_content": thought, "content": REFUSAL}]
    elif kind == "dependent":
        result = execute(calls[0], schemas)
        slot = asked[1].slots.index(YIELDS[asked[0].noun])
        filled = {**calls[1].arguments, asked[1].keys[slot]: json.loads(result)["result"]}
        wishes = [wishes[0], _wish(rng, asked[1], values[1], reference=slot)]
        second = ToolCall(calls[1].name, filled)
        turns = [_turn(calls[:1], schemas), {"role": "tool", "content": result}, _turn([second], schemas)]
    else:
        turns = [_turn(calls, schemas)]
    joint = " then " if kind == "dependent" else " and "
    user = {"role": "user", "content": f"{rng.choice(OPENING_TAGS)} {joint.join(wishes)}"}
    return Dialogue(identity, (user, *turns), tuple(schemas), kind)


def _draw_tools(rng: random.Random, kind: str, split: Split, count: int) -> list[WorldTool]:
    # Nouns, names and keys are pairwise different. For `dependent`, the result of the first tool fits a slot of the
    # second.
    nouns = rng.sample(_NOUNS, count)
    limit = 1 if kind == "parallel" else 2
    tools: list[WorldTool] = []
    keys = rng.sample(KEY_PARTS, 2 * count)
    names: list[str] = []
    for index, noun in enumerate(nouns):
        verb = rng.choice([v for v in VERBS if is_held_out_template(v, noun) == (split == "unseen_tools")])
        slots = rng.sample(tuple(SLOTS), 2 if limit == 2 and rng.random() < 0.4 else 1)
        if kind == "dependent" and index == 1 and YIELDS[nouns[0]] not in slots:
            slots[-1] = YIELDS[nouns[0]]
        names.append(draw_name(rng, split, names))
        tools.append(WorldTool(verb, noun, tuple(slots), names[-1], tuple(keys[2 * index :][: len(slots)])))
    return tools


def draw_name(rng: random.Random, split: Split, taken: Sequence[str] = ()) -> str:
    """Draw a tool name of the split that is not in `taken`."""
    while True:
        name = f"{rng.choice(NAME_PARTS)}_{rng.choice(NAME_PARTS)}"
        if name not in taken and is_held_out_name(name) == (split == "unseen_tools"):
            return name


def draw_value(rng: random.Random, slot: str, split: Split) -> str:
    """Draw a value for the slot from the values that the split may use."""
    while True:
        value = f"{rng.choice(SLOTS[slot])}-{rng.choice(NUMBERS)}"
        if is_held_out_value(value) == (split == "unseen_values"):
            return value


def _wish(rng: random.Random, tool: WorldTool, values: Sequence[str], reference: int | None = None) -> str:
    # The slots come in random order. The slot `reference` refers to an earlier result and is called "it".
    parts = [f'{slot} "{value}"' for slot, value in zip(tool.slots, values, strict=True)]
    if reference is not None:
        parts[reference] = f"{tool.slots[reference]} it"
    return " ".join([tool.description, *rng.sample(parts, len(parts))])


def _turn(calls: Sequence[ToolCall], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tool_calls = [to_message_call(call) for call in calls]
    return {"role": "assistant", "reasoning_content": explain(calls, tools), "content": "", "tool_calls": tool_calls}


def explain(calls: Sequence[ToolCall], tools: Sequence[Mapping[str, Any]]) -> str:
    """Return a demonstration's reasoning: for each call, the tool's description and name, slots, keys and values.

    Names and keys that no tool has are written as given, so that defective calls have reasoning too.
    """
    by_name = {tool["function"]["name"]: tool["function"] for tool in tools}
    slots = {k: p["description"] for f in by_name.values() for k, p in f["parameters"]["properties"].items()}
    parts = []
    for call in calls:
        head = f'{by_name[call.name]["description"] if call.name in by_name else NO_TOOL}: "{call.name}"'
        body = [f'{slots.get(key, NO_TOOL)}: "{key}" "{value}"' for key, value in call.arguments.items()]
        parts.append(" ".join([head, *body]))
    return " and ".join(parts)


def execute(call: ToolCall, tools: Sequence[Mapping[str, Any]]) -> str:
    """Execute a call and return its result as JSON text, such as `{"result": "oslo-17"}`.

    The result is a function of the template and the values, not of the random names. It is a held-out value if and only
    if one of the arguments is.

    Raises:
        ValueError: The tool is unknown, an argument is missing or unknown, or a value is not text.
    """
    function = next((tool["function"] for tool in tools if tool["function"]["name"] == call.name), None)
    if function is None:
        offered = ", ".join(tool["function"]["name"] for tool in tools)
        raise ValueError(f"tool {call.name!r} is unknown, expected one of {offered}")
    properties = function["parameters"]["properties"]
    if set(call.arguments) != set(properties) or not all(isinstance(v, str) for v in call.arguments.values()):
        raise ValueError(f"the arguments are {dict(call.arguments)!r}, expected texts for {', '.join(properties)}")
    values = {properties[key]["description"]: value for key, value in call.arguments.items()}
    text = json.dumps([function["description"], values], sort_keys=True)
    slot = YIELDS[function["description"].split()[1]]
    split: Split = "unseen_values" if any(map(_is_held_out_text, values.values())) else "train"
    # A hash seeds the draw: equal calls have equal results in every process (`hash()` would be salted per process).
    result = draw_value(random.Random(hashlib.sha256(text.encode()).hexdigest()), slot, split)
    return json.dumps({"result": result})


def _is_held_out_text(value: str) -> bool:
    try:
        return is_held_out_value(value)
    except (ValueError, StopIteration):  # not a value of this world
        return False
