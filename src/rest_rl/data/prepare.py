"""Prepare samples for one model: check once that its format can express the gold, and render the prompt once."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from rest_rl.data.check import CheckConfig, CheckedRow
from rest_rl.data.layout import PromptLayout
from rest_rl.data.reasons import RowFinding, make_finding
from rest_rl.data.samples import ToolSample, to_json
from rest_rl.errors import UserError
from rest_rl.formats import ToolFormat
from rest_rl.rewards import judge


@dataclass(frozen=True)
class Prepared:
    """A sample and its rendered prompt."""

    sample: ToolSample
    prompt_text: str
    tokenizer: Any = field(repr=False, compare=False)

    @cached_property
    def prompt_ids(self) -> Sequence[int]:
        """The token ids of the prompt, computed on first use."""
        return array("I", self.tokenizer(self.prompt_text, add_special_tokens=False)["input_ids"])

    def tokens_if_over(self, limit: int) -> int:
        """Return the number of prompt tokens if it exceeds `limit`, otherwise 0."""
        # Every token covers at least one byte, so the number of bytes bounds the number of tokens.
        if len(self.prompt_text) <= limit and len(self.prompt_text.encode(errors="replace")) <= limit:
            return 0
        return tokens if (tokens := len(self.prompt_ids)) > limit else 0


class Rejected(NamedTuple):
    """A sample that the model cannot represent, and the reason."""

    sample: ToolSample
    reason: str
    is_too_long: bool = False


def prepare(sample: ToolSample, layout: PromptLayout) -> Prepared | Rejected:
    """Return the sample with its rendered prompt.

    A sample is rejected if no response in the format can match its gold, if the chat template fails, or if it contains
    a lone surrogate, which no tokenizer accepts.
    """
    try:
        check_gold(sample, layout.format)
        prompt = layout.render(sample)
        json.dumps([prompt, to_json(sample)["gold"], sample.preamble, sample.thought], ensure_ascii=False).encode()
        return Prepared(sample, prompt, layout.tokenizer)
    except UnicodeEncodeError:
        return Rejected(sample, f"sample {sample.id!r} contains a lone surrogate, which no tokenizer accepts")
    except ValueError as error:
        return Rejected(sample, str(error))


def check_gold(sample: ToolSample, tool_format: ToolFormat) -> None:
    """Raise UserError if no response in the format can match the gold."""
    try:
        text = tool_format.render(None, sample.gold.calls, sample.gold.answer)
    except ValueError as error:
        problem = f"the format {tool_format.name!r} cannot express the gold of sample {sample.id!r} ({error})"
        raise UserError(problem, remedy="fix the row, or choose another format") from None
    # The gold written in the format must score as an exact match of itself; otherwise no response can, for example when
    # the JSON exceeds the limits of the parser.
    if not judge(text, sample.gold, tool_format).exact_match:
        raise UserError(
            f"the gold of sample {sample.id!r}, written in the format {tool_format.name!r}, is not an exact match of "
            f"itself ({text!r:.200})",
            "JSON within the limits of rest_rl.json_spans",
            "fix the row",
        )


def prepare_row(row: CheckedRow, layout: PromptLayout, config: CheckConfig) -> tuple[CheckedRow, list[Prepared]]:
    """Prepare the samples of a checked row.

    Returns:
        The row without the samples that the model cannot represent or generate, or that exceed a limit of the config
        (the row gets a finding for each of them), and the remaining samples, prepared, in the order of the row.
    """
    kept: list[Prepared] = []
    found: list[RowFinding] = []
    for sample in row.samples:
        prepared = prepare(sample, layout)
        if isinstance(prepared, Rejected):
            found.append(make_finding("not_laid_out", prepared.reason, sample.id))
            continue
        keep = row.reasons_to_allow(config)
        new = [
            make_finding(reason, detail, sample.id, keep) for reason, detail in find_refusals(prepared, layout, config)
        ]
        kept += [] if any(each.severity == "rejected" for each in new) else [prepared]
        found += new
    return row.with_findings(found), kept


def find_refusals(prepared: Prepared, layout: PromptLayout, config: CheckConfig) -> Iterator[tuple[str, str]]:
    """Yield (reason, detail) for each defect of a rendered sample: too many tokens, or control tokens in its text."""
    sample, room = prepared.sample, config.max_response_tokens
    if layout.context and (tokens := prepared.tokens_if_over(layout.context - room)):
        yield (
            "beyond_context",
            f"the prompt has {tokens} tokens, the response needs {room}, and the context length is {layout.context}",
        )
    elif config.max_prompt_tokens and (tokens := prepared.tokens_if_over(config.max_prompt_tokens)):
        yield "prompt_too_long", f"the prompt has {tokens} tokens, the limit is {config.max_prompt_tokens}"
    gold = [to_json(sample)["gold"], sample.preamble, sample.thought]
    for where, value in (("gold", gold), ("prompt", [sample.messages, sample.tools])):
        if tokens := find_control_tokens(value, layout):
            yield f"control_token_in_{where}", f"found {', '.join(tokens)}"


def find_control_tokens(value: Any, layout: PromptLayout) -> list[str]:
    """Return the tokenizer's special tokens in the texts of a JSON value, except format tags and short tokens."""
    text = json.dumps(value, ensure_ascii=False)
    # Special tokens of one or two characters are ordinary text in most prompts, so they are ignored.
    return sorted(token for token in layout.special_tokens - {*layout.format.tags} if len(token) > 2 and token in text)
