"""The tool-call format of ToolRL."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rest_rl.formats.json_calls import dump_call, read_call, split_call_lines
from rest_rl.formats.reading import Block, ResponseBuilder, clean_text, describe_tools, find_blocks
from rest_rl.response import ParsedResponse, Region, ToolCall


@dataclass(frozen=True)
class ToolRLFormat:
    """ToolRL (https://github.com/qiancheng0/ToolRL): a think block, then a call block, a response block or both.

    Each line of the call block is a JSON object with `name` and `parameters`. The think block is required.
    """

    name: str = "toolrl"
    tags: tuple[str, ...] = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>")

    _pattern = re.compile(r"<(/?)(think|tool_call|response)>")
    _layouts = (("think",), ("think", "tool_call"), ("think", "response"), ("think", "tool_call", "response"))

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        blocks, strays, nested = find_blocks(text, self._pattern)
        builder = ResponseBuilder(wants_spans=spans)
        at = 0
        for block in blocks:
            self._read_gap(builder, text, at, block.start)
            builder.mark(block.start, block.inner_start, Region.FORMAT)
            self._read_block(builder, text, block)
            builder.mark(block.inner_end, block.end, Region.FORMAT)
            at = block.end
        if blocks:
            self._read_gap(builder, text, at, len(text))
        builder.add_tag_problems(strays, nested)
        layout = tuple(block.tag for block in blocks)
        if layout not in self._layouts:
            builder.add_problem(
                f"expected the blocks think, tool_call, response once and in order, got {list(layout)[:9]}"
            )
        # Of repeated blocks the first one counts, so it is inserted last.
        inner = {block.tag: text[block.inner_start : block.inner_end].strip() for block in reversed(blocks)}
        return ParsedResponse(
            thought=inner.get("think"),
            calls=tuple(builder.calls),
            answer=inner.get("response"),
            spans=tuple(builder.spans),
            problems=tuple(builder.problems),
            well_formed=layout in self._layouts and not strays and not nested,
            attempted_call="tool_call" in inner or any(tag.text == "<tool_call>" for tag in strays),
            unreadable_calls=builder.unreadable_calls,
        )

    @staticmethod
    def _read_gap(builder: ResponseBuilder, text: str, start: int, end: int) -> None:
        if text[start:end].isspace():
            builder.mark(start, end, Region.FORMAT)
        elif start < end:
            builder.add_problem(f"text outside the blocks at character {start}")

    @staticmethod
    def _read_block(builder: ResponseBuilder, text: str, block: Block) -> None:
        if block.tag != "tool_call":
            region = Region.REASONING if block.tag == "think" else Region.ANSWER
            builder.mark(block.inner_start, block.inner_end, region)
            return
        at = block.inner_start
        for start, end in split_call_lines(text, block.inner_start, block.inner_end):
            builder.mark(at, start, Region.FORMAT)
            read_call(builder, text, start, end, "parameters")
            at = end
        builder.mark(at, block.inner_end, Region.FORMAT)

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """Return the blocks of a response; without a thought, the required think block is empty."""
        parts = [f"<think> {clean_text(thought or '', self.tags, 'thought')} </think>"]
        if calls:
            parts.append(
                "\n".join(
                    ["<tool_call>", *(dump_call(call, "parameters", self._pattern) for call in calls), "</tool_call>"]
                )
            )
        if answer is not None:
            parts.append(f"<response> {clean_text(answer, self.tags, 'answer')} </response>")
        return "\n".join(parts)

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return (
            "You can call these tools, one JSON description per line:\n"
            f"{describe_tools(tools)}\n\n"
            "First reason inside <think> </think>. To call tools, add one block with one JSON object per line:\n"
            '<tool_call>\n{"name": "tool name", "parameters": {"argument": "value"}}\n</tool_call>\n'
            "To answer the user, add <response> your answer </response> after it."
        )

    def observation(self, result: str) -> str:
        """Return a tool result as it appears in ToolRL's prompts."""
        return f"<obs> {result} </obs>"
