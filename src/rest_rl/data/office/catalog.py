"""The office's tools and the phrasings of requests for them, as `assets/office.json` lists them.

In a phrasing, `{path}` stands for an argument, and `[...]` for a part that is left out half of the time: an optional
argument is in the call exactly if the request states it. In `[a|b]`, `b` takes the place of `a`. A placeholder for a
boolean writes nothing.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

_CATALOG = json.loads(resources.files("rest_rl").joinpath("assets/office.json").read_text(encoding="utf-8"))
_OPTIONAL = re.compile(r"\[([^]|]*)\|?([^]]*)\]")
PLACEHOLDER = re.compile(r"\{([\w.]+)\}")
VALUES: Mapping[str, Any] = _CATALOG["values"]
RATES: Mapping[str, float] = _CATALOG["rates"]
"""Units of each currency for one US dollar."""
REFUSALS: list[str] = _CATALOG["refusals"]
JOINERS: list[str] = _CATALOG["joiners"]
CHAT: Mapping[str, list[list[str]]] = _CATALOG["chat"]


class OfficeTool(NamedTuple):
    """A tool: its schema, the kind of value of each argument, and phrasings.

    The key of a nested argument in `slots` is its path. `rivals` are tools that might serve the same request; they are
    not offered together.
    """

    area: str
    function: Mapping[str, Any]
    slots: Mapping[str, Any]
    requests: Sequence[str]
    unseen_requests: Sequence[str] = ()
    rivals: Sequence[str] = ()
    unseen: bool = False

    @property
    def name(self) -> str:
        return self.function["name"]

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the tool in OpenAI's form."""
        return {"type": "function", "function": dict(self.function)}

    def is_rival(self, other: OfficeTool) -> bool:
        """Return whether the two tools might serve the same request."""
        return other.name in self.rivals or self.name in other.rivals


class Chain(NamedTuple):
    """Two tools, where arguments of the second come from the result of the first: `take` maps arguments to paths in it.

    In the phrasings, the paths of the arguments begin with `1.` or `2.`.
    """

    tools: list[str]
    take: Mapping[str, str]
    requests: Sequence[str]
    unseen_requests: Sequence[str] = ()


TOOLS = {tool.name: tool for tool in (OfficeTool(**entry) for entry in _CATALOG["tools"])}
"""All tools by name."""
CHAINS = [Chain(**entry) for entry in _CATALOG["chains"]]


def choose_options(rng: random.Random, phrasing: str) -> str:
    """Return the phrasing with each optional part kept or left out at random."""
    return _OPTIONAL.sub(lambda match: match[1 + (rng.random() < 0.5)], phrasing)


def build_arguments(tool: OfficeTool, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call from the values of some of the tool's paths, in the order of the schema."""
    arguments: dict[str, Any] = {}
    for path in tool.slots:
        if path in values:
            *parents, key = path.split(".")
            table = arguments
            for parent in parents:
                table = table.setdefault(parent, {})
            table[key] = values[path]
    return arguments
