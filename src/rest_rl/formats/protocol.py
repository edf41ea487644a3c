"""What a tool-call format must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rest_rl.response import ParsedResponse, ToolCall


class ToolFormat(Protocol):
    """How a model writes its reasoning, its calls and its answer; docs/training.md shows one of your own.

    Pass the object wherever a format is accepted. A run file and a command take `package.module:OBJECT`, and so does
    what a checkpoint records: `ResTConfig` takes an object that a module holds under a name.
    """

    @property
    def name(self) -> str:
        """How configs call the format."""
        ...

    @property
    def tags(self) -> tuple[str, ...]:
        """The literal tags; they are kept when token ids are decoded, also where a tokenizer calls them special."""
        ...

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        """Read a response; never raises. Without `spans` they are left empty, which is quicker and enough to score."""
        ...

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """Write a response that `parse` reads back; ValueError when a text contains a tag of the format."""
        ...

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A system message that describes the tools and the format, for models whose template renders no tools."""
        ...
