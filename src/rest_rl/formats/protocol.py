"""The protocol of tool-call formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rest_rl.response import ParsedResponse, ToolCall


class ToolFormat(Protocol):
    """How a model writes its reasoning, tool calls and answer; docs/training.md shows how to write your own.

    You can pass an object wherever a format is accepted. Run files, commands and checkpoints refer to it as
    `package.module:OBJECT`, so for training it must be an attribute of a module.
    """

    @property
    def name(self) -> str:
        """Name of the format in run files."""
        ...

    @property
    def tags(self) -> tuple[str, ...]:
        """The literal tags. Decoding keeps them, even if they are special tokens of the tokenizer."""
        ...

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        """Parse a response; never raises. `spans=False` leaves out the spans: faster, and enough for scoring."""
        ...

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """Return a response that `parse` reads back; UserError if a text contains a tag of the format."""
        ...

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Return a system message that describes tools and format, for chat templates that do not render tools."""
        ...
