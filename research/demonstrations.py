"""Tool-world demonstrations for the warm start of the embedded model: correct ones, and ones with exactly one call."""

from __future__ import annotations

import random
import re

from rest_rl.data.samples import ToolSample
from rest_rl.data.tool_world import FILLER, explain
from rest_rl.formats import get_format
from rest_rl.response import ToolCall


def render_demonstration(sample: ToolSample, tool_format: str = "toolrl") -> str:
    """Return the correct response text of a sample."""
    return get_format(tool_format).render(sample.thought, sample.gold.calls, sample.gold.answer)


def render_single_call(sample: ToolSample, rng: random.Random, tool_format: str = "toolrl") -> str:
    """Return a response with exactly one call, whatever the request needs.

    It is correct if one call is. Of several calls it makes only the first. If no tool fits, it calls one of the offered
    tools, drawn at random, with the values of the request.
    """
    if len(sample.gold.calls) == 1:
        return render_demonstration(sample, tool_format)
    call = sample.gold.calls[0] if sample.gold.calls else _draw_needless_call(sample, rng)
    # The thought is that of the call it makes: one that announces other calls would teach the model to ignore it.
    thought = sample.thought if _is_filler(sample.thought) else explain([call], sample.tools)
    return get_format(tool_format).render(thought, [call], None)


def _is_filler(thought: str | None) -> bool:
    return bool(thought) and set(thought.split()) <= set(FILLER)


def _draw_needless_call(sample: ToolSample, rng: random.Random) -> ToolCall:
    tool = rng.choice(sample.tools)["function"]
    values = re.findall(r'"([^"]+)"', sample.messages[-1]["content"])
    keys = list(tool["parameters"]["properties"])
    return ToolCall(tool["name"], {key: values[at % len(values)] for at, key in enumerate(keys)})
