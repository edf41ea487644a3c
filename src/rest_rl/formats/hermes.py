"""The tool-call format of Hermes and Qwen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rest_rl.formats.json_calls import dump_call, read_call
from rest_rl.formats.reading import Block, ResponseBuilder, clean_text, describe_tools, find_blocks
from rest_rl.response import ParsedResponse, Region, ToolCall


@dataclass(frozen=True)
class HermesFormat:
    """Hermes and Qwen: each call is a `<tool_call>` block with a JSON object with `name` and `arguments`.

    The answer is plain text and may appear next to calls. A think block is optional and comes first.
    """

    name: str = "hermes"
    tags: tuple[str, ...] = ("<think>", "</think>", "<tool_call>", "</tool_call>")

    _pattern = re.compile(r"<(/?)(think|tool_call)>")

    def parse(self, text: str, *, spans: bool = True) -> ParsedResponse:
        blocks, strays, nested = find_blocks(text, self._pattern)
        first_stray = strays[0].position if strays else len(text)
        builder = ResponseBuilder(wants_spans=spans)
        answers: list[str] = []
        at = 0
        # An empty block at the end makes the loop read the text after the last block, too.
        for block in [*blocks, Block("end", len(text), len(text), len(text), len(text))]:
            answers.append(self._read_gap(builder, text, at, block.start, first_stray))
            builder.mark(block.start, block.inner_start, Region.FORMAT)
            self._read_block(builder, text, block)
            builder.mark(block.inner_end, block.end, Region.FORMAT)
            at = block.end
        builder.add_tag_problems(strays, nested)
        thoughts = [block for block in blocks if block.tag == "think"]
        in_order = not thoughts or (len(thoughts) == 1 and not text[: thoughts[0].start].strip())
        if not in_order:
            builder.add_problem("expected at most one think block, at the start")
        return ParsedResponse(
            thought=text[thoughts[0].inner_start : thoughts[0].inner_end].strip() if thoughts else None,
            calls=tuple(builder.calls),
            answer="\n".join(filter(None, answers)) or None,
            spans=tuple(builder.spans),
            problems=tuple(builder.problems),
            well_formed=in_order and not strays and not nested,
            attempted_call=len(blocks) > len(thoughts) or any(tag.text == "<tool_call>" for tag in strays),
            unreadable_calls=builder.unreadable_calls,
            untagged_answer=True,
        )

    @staticmethod
    def _read_gap(builder: ResponseBuilder, text: str, start: int, end: int, first_stray: int) -> str:
        # Text between blocks is the answer, and white space around it is FORMAT. After an unmatched tag nothing counts
        # as the answer, because the text may be the inside of a broken block.
        gap = text[start : min(end, first_stray)]
        answer = gap.strip()
        begin = start + len(gap) - len(gap.lstrip())
        builder.mark(start, begin, Region.FORMAT)
        builder.mark(begin, begin + len(answer), Region.ANSWER)
        builder.mark(begin + len(answer), start + len(gap), Region.FORMAT)
        return answer

    @staticmethod
    def _read_block(builder: ResponseBuilder, text: str, block: Block) -> None:
        inner = text[block.inner_start : block.inner_end]
        if block.tag == "think":
            builder.mark(block.inner_start, block.inner_end, Region.REASONING)
        elif block.tag == "tool_call":
            start = block.inner_start + len(inner) - len(inner.lstrip())
            end = start + len(inner.strip())
            builder.mark(block.inner_start, start, Region.FORMAT)
            read_call(builder, text, start, end, "arguments")
            builder.mark(end, block.inner_end, Region.FORMAT)

    def render(self, thought: str | None, calls: Sequence[ToolCall], answer: str | None) -> str:
        """Return the think block, the answer and the calls, if present; an empty answer is omitted."""
        head = "" if thought is None else f"<think>\n{clean_text(thought, self.tags, 'thought')}\n</think>\n\n"
        blocks = [f"<tool_call>\n{dump_call(call, 'arguments', self._pattern)}\n</tool_call>" for call in calls]
        text = [] if not answer else [clean_text(answer, self.tags, "answer")]
        return head + "\n".join(text + blocks)

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return (
            f"You can call these tools:\n<tools>\n{describe_tools(tools)}\n</tools>\n\n"
            "For each call write one JSON object in a block of its own:\n"
            '<tool_call>\n{"name": "tool name", "arguments": {"argument": "value"}}\n</tool_call>\n'
            "Otherwise answer in plain text."
        )
