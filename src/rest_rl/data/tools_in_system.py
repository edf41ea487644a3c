"""System texts that describe the tools in `<tools>` tags and demand Hermes' calls.

Whatever lays a sample out describes its tools itself, in its own format: with such a text the prompt would hold the
tools twice and ask any model for the calls of another one.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from rest_rl.data.json_text import read_literals

_OPENING = re.compile(
    r"(?:\A|(?<=\n))[ \t]*(?:# Tools[ \t]*\n|You are a function[- ]calling (?:AI |LLM |language )?model\b)"
)
_ENDS = ("</tools>", "</tool_call>")


class ToolText(NamedTuple):
    """The tools that a system text lists, and what else it says (None for a text of unknown build)."""

    rest: str | None
    tools: list[Any] | None


def tool_text(system: str) -> ToolText | None:
    """How a system text describes tools; None for one that does not.

    The known texts open as Hermes' or Qwen's do and end with the last `</tools>` or `</tool_call>`.
    """
    listed, opening = _listed(system), _OPENING.search(system)
    if opening is None or "</tools>" not in system[opening.start() :]:
        return ToolText(None, listed) if listed else None
    end = max(system.rfind(tag) + len(tag) for tag in _ENDS if tag in system)
    rest = "\n\n".join(filter(None, (system[: opening.start()].strip(), system[end:].lstrip(" \t\r\n.").rstrip())))
    return ToolText(rest, listed)


def _listed(system: str) -> list[Any] | None:
    """The objects between `<tools>` and `</tools>`, from the first such pair that holds any."""
    for piece in system.split("<tools>")[1:]:
        inner, closed, _ = piece.partition("</tools>")
        values = read_literals(inner) if closed else None
        values = values[0] if values and len(values) == 1 and isinstance(values[0], list) else values
        if values and all(isinstance(value, dict) for value in values):
            return values
    return None
