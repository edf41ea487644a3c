"""Tool-world demonstrations, correct or with exactly one defect, for the warm start of the embedded model."""

from __future__ import annotations

import random
from typing import Literal, get_args

from rest_rl.data.samples import ToolSample
from rest_rl.data.tool_world import FILLER, NO_TOOL, REFUSAL, SLOTS, draw_value, explain
from rest_rl.formats import get_format
from rest_rl.response import ToolCall

Defect = Literal["wrong_tool", "wrong_value", "wrong_key", "dropped_argument", "missing_call", "broken_tag"]
DEFECTS: tuple[Defect, ...] = get_args(Defect)


def render_demonstration(sample: ToolSample, tool_format: str = "toolrl") -> str:
    """Return the correct response text of a sample."""
    return get_format(tool_format).render(sample.thought, sample.gold.calls, sample.gold.answer)


def render_corrupted_demonstration(
    sample: ToolSample, rng: random.Random, defect: Defect | None = None, tool_format: str = "toolrl"
) -> str:
    """Return a response text with exactly one defect, drawn at random unless given; it is never fully correct.

    `missing_call` omits one of two calls, refuses where a call is right, and calls a tool where none fits. A sample
    without calls has no arguments to corrupt: every defect except `broken_tag` then adds a needless call.
    """
    # Corrupt the calls, not the text, and render them again: a wrong call stays well-formed and costs only accuracy.
    # The thought is rewritten to explain the defective calls, because a thought that announces the correct ones would
    # teach the model to ignore its reasoning. Filler names no call and stays.
    defect = defect or rng.choice(DEFECTS)
    calls = list(sample.gold.calls)
    if defect == "broken_tag":
        return _break_markup(render_demonstration(sample, tool_format), rng)
    if not calls:
        calls = [_draw_needless_call(sample, rng)]
    elif defect == "missing_call":
        calls.pop(rng.randrange(len(calls)))
    else:
        at = rng.randrange(len(calls))
        calls[at] = _corrupt_call(calls[at], sample, rng, defect)
    render = get_format(tool_format).render
    if _is_filler(sample.thought):
        return render(sample.thought, calls, None if calls else REFUSAL)
    if calls:
        return render(explain(calls, sample.tools), calls, None)
    return render(f"{(sample.thought or '').split(':')[0]}: {NO_TOOL}", (), REFUSAL)


def _is_filler(thought: str | None) -> bool:
    return bool(thought) and set(thought.split()) <= set(FILLER)


def _draw_needless_call(sample: ToolSample, rng: random.Random) -> ToolCall:
    tool = rng.choice(sample.tools)["function"]
    values = {k: draw_value(rng, p["description"], "train") for k, p in tool["parameters"]["properties"].items()}
    return ToolCall(tool["name"], values)


def _corrupt_call(call: ToolCall, sample: ToolSample, rng: random.Random, defect: str) -> ToolCall:
    arguments = dict(call.arguments)
    key = rng.choice(list(arguments))
    if defect == "wrong_tool":
        others = [t["function"]["name"] for t in sample.tools if t["function"]["name"] != call.name]
        return ToolCall(rng.choice(others), arguments)
    if defect == "wrong_value":
        # Draw another value of the same slot, so that the argument stays plausible.
        slot = next(slot for slot, words in SLOTS.items() if arguments[key].split("-")[0] in words)
        return ToolCall(call.name, {**arguments, key: _draw_other_value(rng, slot, arguments[key])})
    if defect == "wrong_key":
        keys = [k for tool in sample.tools for k in tool["function"]["parameters"]["properties"] if k not in arguments]
        swapped = rng.choice(keys or [slot for slot in SLOTS if slot not in arguments])
        return ToolCall(call.name, {swapped if k == key else k: v for k, v in arguments.items()})
    return ToolCall(call.name, {k: v for k, v in arguments.items() if k != key})


def _draw_other_value(rng: random.Random, slot: str, value: str) -> str:
    while (other := draw_value(rng, slot, "train")) == value:
        pass
    return other


def _break_markup(text: str, rng: random.Random) -> str:
    # Drop one tag, or the last bracket.
    # A bracket also occurs inside a call; the newline and the next tag identify the last one.
    parts = [part for part in ("</think>", "<tool_call>", "</tool_call>", "</response>", "}\n</") if part in text]
    part = rng.choice(parts)
    return text.replace(part, "\n</" if part.startswith("}") else "", 1)
