"""Mutate correct predictions for the samples of BFCL, slightly or heavily; see `bfcl_official.py`.

The official executor evaluates these predictions, so no mutation may name a function that does harm.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from rest_rl.response import Gold

Call = dict[str, Any]
Sample = dict[str, Any]
PLACEHOLDERS = {"integer": 1, "number": 1.5, "float": 1.5, "boolean": True, "array": [], "object": {}, "dict": {}}


def format_call(call: Call) -> str:
    return json.dumps({"name": call["name"], "parameters": call["arguments"]}, ensure_ascii=False)


def wrap_calls(lines: Sequence[str]) -> str:
    return "\n".join(["<think> a thought </think>", "<tool_call>", *lines, "</tool_call>"])


# Return a value close to the given one: another type, case, punctuation or length.
def mutate_value(value: Any, rng: random.Random) -> Any:
    wrapped = [[value], {"v": value}, None, str(value), "", [], True]
    if isinstance(value, bool):
        near = [not value, int(value), str(value), str(value).lower()]
    elif isinstance(value, int):
        near = [float(value), str(value), value + 1, -value, value + 0.5, 10**5]
    elif isinstance(value, float):
        near = [int(value), str(value), value + 1e-9, round(value), -value, 1e300, float("nan"), float("inf")]
    elif isinstance(value, str):
        marks = value.replace(" ", rng.choice("-_,./^* "))
        near = [value.upper(), value.lower(), f" {value}. ", marks, value.replace("'", '"'), value[1:], f"{value} x"]
        near += [f"'{value}'", value.replace('"', "'"), value + "\u2019", "sort (" + value, value + "\n"]
        near += [int(value)] if value.isdecimal() and value.isascii() else []
    elif isinstance(value, list):
        near = [value[1:], value[::-1], [*value, *value[:1]], [value], tuple(value), [*value, "x"]]
        near += [mutate_item(value, rng)] * 4 if value else []
    elif isinstance(value, dict):
        near = [{**value, "extra": 1}, list(value), {str(key).upper(): item for key, item in value.items()}]
        near += [mutate_item(value, rng), dict(list(value.items())[1:])] * 2 if value else []
    else:
        near = ["x", 0]
    return rng.choice(near if rng.random() < 0.8 else wrapped)


# Return a copy of a list or object with one value changed.
def mutate_item(value: Any, rng: random.Random) -> Any:
    other = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(other)) if isinstance(other, dict) else rng.randrange(len(other))
    other[key] = mutate_value(other[key], rng)
    return other


def mutate_arguments(call: Call, tools: dict[str, Any], rng: random.Random) -> tuple[str, Call]:
    """Return the kind of change and the call with changed arguments."""
    arguments = dict(call["arguments"])
    unused = sorted(set(tools.get(call["name"], {})) - set(arguments))
    kind = rng.choice(["value", "value", "value", "missing argument", "extra argument", "unknown argument", "order"])
    if kind in ("value", "missing argument") and arguments:
        key = rng.choice(list(arguments))
        value = mutate_value(arguments.pop(key), rng)
        arguments = {**arguments, key: value} if kind == "value" else arguments
    elif kind == "extra argument" and unused:
        key = rng.choice(unused)
        arguments[key] = PLACEHOLDERS.get(tools[call["name"]][key].get("type"), "text")
    elif kind == "order":
        arguments = dict(rng.sample(list(arguments.items()), len(arguments)))
    else:
        kind, key = "unknown argument", rng.choice(["extra", "self", "kwargs", "not a name", "class", "", "Äpfel"])
        arguments[key] = rng.choice([1, "text", None])
    return kind, {"name": call["name"], "arguments": arguments}


def mutate_name(call: Call, tools: dict[str, Any], rng: random.Random) -> Call:
    # None of these names does anything when the official executor evaluates it.
    name = call["name"]
    names = [name.upper(), name.replace(".", "_"), name + "x", "no_such_tool", "dict", "None", "", "self.x", "kill"]
    return {"name": rng.choice([*names, *list(tools)[:3]]), "arguments": call["arguments"]}


def plausible_call(tools: dict[str, Any], rng: random.Random) -> Call:
    name = rng.choice([*tools] or ["no_such_tool"])
    chosen = [key for key in tools.get(name, {}) if rng.random() < 0.7]
    return {"name": name, "arguments": {key: PLACEHOLDERS.get(tools[name][key].get("type"), "text") for key in chosen}}


# Return the kind of change and the calls with one change.
def mutate_calls(calls: list[Call], tools: dict[str, Any], rng: random.Random) -> tuple[str, list[Call]]:
    kind = rng.choice(["arguments"] * 5 + ["name", "missing call", "extra call", "copy", "order"])
    at = rng.randrange(len(calls)) if calls else 0
    if not calls or kind == "extra call":
        return "extra call", [*calls, plausible_call(tools, rng)]
    if kind == "order":
        return kind, rng.sample(calls, len(calls))
    if kind == "copy":
        return kind, [*calls, calls[at]]
    if kind == "missing call":
        return kind, calls[:at] + calls[at + 1 :]
    if kind == "name":
        return kind, [*calls[:at], mutate_name(calls[at], tools, rng), *calls[at + 1 :]]
    kind, changed = mutate_arguments(calls[at], tools, rng)
    return kind, [*calls[:at], changed, *calls[at + 1 :]]


JUNK = ("{broken", "null", "5", "[]", "{}", '"text"', "prose", '{"name": "x"}', '{"parameters": {}}', "[" * 500)


# Write the calls as text, sometimes in an odd form; return the kind of oddity (empty for none) and the text.
def write_response(calls: list[Call], rng: random.Random) -> tuple[str, str]:
    lines = [format_call(call) for call in calls]
    if rng.random() < 0.7:
        return "", wrap_calls(lines) if calls else "<think> a thought </think>\n<response> no </response>"
    first = calls[0] if calls else {"name": "x", "arguments": {}}
    choices: dict[str, Callable[[], str]] = {
        "no call": lambda: rng.choice(["", "no call", "<think> a </think>\n<response> b </response>", wrap_calls([])]),
        "broken lines": lambda: wrap_calls(rng.sample([*lines, *rng.choices(JUNK, k=2)], len(lines) + 2)),
        "broken call": lambda: wrap_calls([*lines[1:], format_call(first)[: -rng.randrange(1, 6)]]),
        "nested": lambda: wrap_calls([json.dumps([json.loads(format_call(first))])]),
        "one list": lambda: wrap_calls(["[" + ", ".join(lines) + "]"]),
        "other key": lambda: wrap_calls([json.dumps(first)]),
        "arguments as text": lambda: wrap_calls([json.dumps({**first, "parameters": json.dumps(first["arguments"])})]),
        "extra key": lambda: wrap_calls(
            [json.dumps({"id": 1, "parameters": first["arguments"], "name": first["name"]})]
        ),
        "two blocks": lambda: wrap_calls(lines) + "\n" + wrap_calls(lines[:1]),
        "no end": lambda: wrap_calls(lines).removesuffix("</tool_call>"),
        "no thought": lambda: wrap_calls(lines).partition("\n")[2],
        "answer too": lambda: wrap_calls(lines) + "\n<response> done </response>",
    }
    kind = rng.choice(list(choices))
    return kind, choices[kind]()


# Return the correct calls, with values drawn from the alternatives that the answers allow.
def choose_alternatives(entry: Sample, gold: list[Call], rng: random.Random) -> list[Call]:
    if "java" in entry["category"] or not entry.get("ground_truth"):
        return gold
    calls = []
    for answer, call in zip(entry["ground_truth"], gold, strict=True):
        [choices] = answer.values()
        arguments = {}
        for name, values in choices.items():
            value = rng.choice(values) if values else None
            is_plain = not isinstance(value, (dict, list))  # the values of an object have their own alternatives
            if value != "" and values:
                arguments[name] = value if is_plain else call["arguments"].get(name, value)
            elif name in call["arguments"] and rng.random() < 0.8:
                arguments[name] = call["arguments"][name]
        calls.append({"name": call["name"], "arguments": arguments})
    return calls


def mutate_single_turn(entry: Sample, gold: Gold, rng: random.Random) -> Sample:
    """Return a mutated prediction for a single-turn sample."""
    right = [{"name": call.name, "arguments": dict(call.arguments)} for call in gold.calls]
    tools = {doc["name"]: doc["parameters"]["properties"] for doc in entry["function"]}
    calls, kinds = choose_alternatives(entry, right, rng), []
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2])):
        kind, calls = mutate_calls(calls, tools, rng)
        kinds.append(kind)
    kind, text = write_response(calls, rng)
    kinds += [kind] if kind else []
    return {"id": entry["id"], "category": entry["category"], "response": text, "kinds": kinds or ["right"]}


# Make the first call of a held-out function in the first turn, where its documentation is still missing.
def call_held_out_early(turns: list[list[list[Call]]], held_out: set[str], rng: random.Random) -> str:
    calls = [(turn, step, call) for turn in turns for step in turn for call in step if call["name"] in held_out]
    turn, step, call = calls[0]
    if rng.random() < 0.5:
        step.remove(call)
        turn[:] = [step for step in turn if step]
    turns[0].append([call])
    return "held-out function in the first turn"


# Change a conversation (turns of steps of calls) in one place; return the kind of change.
def mutate_turns(turns: list[list[list[Call]]], tools: dict[str, Any], rng: random.Random) -> str:
    kind = rng.choice(["call", "call", "call", "call", "empty turn", "other turn", "extra step", "forever", "early"])
    turn = rng.choice(turns)
    everything = [call for other in turns for step in other for call in step]
    if kind == "call" and turn:
        at = rng.randrange(len(turn))
        kind, turn[at] = mutate_calls(turn[at], tools, rng)
    elif kind == "empty turn":
        turn.clear()
    elif kind == "other turn" and turn:
        rng.choice(turns).insert(0, turn.pop(rng.randrange(len(turn))))
    elif kind == "forever":
        harmless = [
            {"name": name, "arguments": {}} for name in tools if name in ("pwd", "get_zipcode", "view_watchlist")
        ]
        call = rng.choice(harmless or everything or [plausible_call(tools, rng)])
        number = rng.choice([18, 19, 20, 21, 25])  # on both sides of BFCL's limit of 20 steps per turn
        turn += [[call] for _ in range(number - len(turn))]
        return f"{number} steps in the {'last' if turn is turns[-1] else 'a'} turn"
    elif kind == "early" and len(turn) > 1:
        turn.insert(rng.randrange(1, len(turn)), [])
    else:
        kind = "extra step"
        call = rng.choice(everything) if everything and rng.random() < 0.6 else plausible_call(tools, rng)
        turn.insert(rng.randrange(len(turn) + 1), [call])
    return kind


def mutate_multi_turn(entry: Sample, gold: list[list[Call]], rng: random.Random) -> Sample:
    """Return a mutated recording of a conversation."""
    one_step = rng.random() < 0.5
    turns = [([calls] if calls else []) if one_step else [[call] for call in calls] for calls in copy.deepcopy(gold)]
    later = [doc for docs in entry.get("missed_function", {}).values() for doc in docs]
    held_out = {doc["name"] for doc in later}
    tools = {doc["name"]: doc["parameters"]["properties"] for doc in [*entry["function"], *later]}
    kinds = []
    if rng.random() < 0.2 and any(call["name"] in held_out for turn in gold for call in turn):
        kinds.append(call_held_out_early(turns, held_out, rng))
    kinds += [mutate_turns(turns, tools, rng) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]
    response = []
    for turn in turns:
        response.append([])
        for step in turn:
            kind, text = (
                write_response(step, rng)
                if rng.random() < 0.15
                else ("", wrap_calls([format_call(call) for call in step]))
            )
            response[-1].append(text if step else "prose")
            kinds += [kind] if kind else []
    return {"id": entry["id"], "category": entry["category"], "response": response, "kinds": kinds or ["right"]}
