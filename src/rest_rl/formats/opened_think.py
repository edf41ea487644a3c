"""A format whose think block the prompt has already opened."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rest_rl.errors import UserError
from rest_rl.formats.protocol import ToolFormat
from rest_rl.response import ParsedResponse, Span, ToolCall

THINK_SUFFIX = "+think"

_POSITION = re.compile(r"(?<=at character )\d+")


@dataclass(frozen=True)
class OpenedThinkFormat:
    """`inner` for a prompt that ends with the opening think tag: the response starts inside the think block.

    Example: `<think>` stands in the prompt and the response is `I look.</think>Done`.
    """

    inner: ToolFormat

    def __post_init__(self) -> None:
        if not any(tag in OPENING_TAGS for tag in self.inner.tags):
            expected = f"{' or '.join(OPENING_TAGS)} among its tags"
            raise UserError(f"format {self.name!r} without think tags", expected, f"leave out {THINK_SUFFIX}")

    @property
    def name(self) -> str:
        """The name of the inner format with the suffix."""
        return self.inner.name + THINK_SUFFIX

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of the inner format."""
        return self.inner.tags

    @property
    def opening(self) -> str:
        """The tag that stands in the prompt: the first opening think tag of the inner format."""
        return next(tag for tag in self.inner.tags if tag in OPENING_TAGS)

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        """Read the response as if the opening tag stood before it; positions count from the response's own start."""
        shift = len(self.opening)
        parsed = self.inner.parse(self.opening + text, spans=spans)
        moved = (Span(max(0, span.start - shift), span.end - shift, span.region) for span in parsed.spans)
        problems = (
            _POSITION.sub(lambda at: str(max(0, int(at.group()) - shift)), problem) for problem in parsed.problems
        )
        return replace(parsed, spans=tuple(span for span in moved if span.start < span.end), problems=tuple(problems))

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """The inner format's text without its opening tag and the white space after it; the block is always closed."""
        return self.inner.render(thought or "", calls, answer).removeprefix(self.opening).lstrip()

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """The inner format's system message."""
        return self.inner.instructions(tools)


OPENING_TAGS = ("<think>", "[THINK]")
"""The tags that open a think block."""
