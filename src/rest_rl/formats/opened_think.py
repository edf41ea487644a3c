"""Formats for prompts that end with an opening think tag."""

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
    """The format `inner` for responses that start inside the think block, because the prompt already opened it.

    Example: the prompt ends with `<think>`, and the response is `I look.</think>Done`.
    """

    inner: ToolFormat

    def __post_init__(self) -> None:
        if not any(tag in OPENING_TAGS for tag in self.inner.tags):
            expected = f"{' or '.join(OPENING_TAGS)} among its tags"
            raise UserError(f"format {self.name!r} has no think tags", expected, f"remove {THINK_SUFFIX}")

    @property
    def name(self) -> str:
        return self.inner.name + THINK_SUFFIX

    @property
    def tags(self) -> tuple[str, ...]:
        return self.inner.tags

    @property
    def opening(self) -> str:
        """The tag at the end of the prompt: the first opening think tag in the tags of `inner`."""
        return next(tag for tag in self.inner.tags if tag in OPENING_TAGS)

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        # We prepend the tag and shift all positions back by its length: those of the spans (the tag's own span
        # disappears) and those in the messages of `problems`, which are already text.
        shift = len(self.opening)
        parsed = self.inner.parse(self.opening + text, spans=spans)
        moved = (Span(max(0, span.start - shift), span.end - shift, span.region) for span in parsed.spans)
        problems = (
            _POSITION.sub(lambda at: str(max(0, int(at.group()) - shift)), problem) for problem in parsed.problems
        )
        return replace(parsed, spans=tuple(span for span in moved if span.start < span.end), problems=tuple(problems))

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """Return the inner format's text without the opening tag and the white space after it."""
        return self.inner.render(thought or "", calls, answer).removeprefix(self.opening).lstrip()

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return self.inner.instructions(tools)


# Tags that open a think block.
OPENING_TAGS = ("<think>", "[THINK]")
