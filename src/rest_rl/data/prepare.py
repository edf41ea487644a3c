"""A sample as one model is given it: gold checked and prompt rendered once, for everyone who reads it afterwards."""

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
    """A sample and the text that the model goes on from."""

    sample: ToolSample
    prompt_text: str
    tokenizer: Any = field(repr=False, compare=False)

    @cached_property
    def prompt_ids(self) -> Sequence[int]:
        """The prompt's tokens, made when they are first asked for."""
        return array("I", self.tokenizer(self.prompt_text, add_special_tokens=False)["input_ids"])

    def tokens_if_over(self, limit: int) -> int:
        """The tokens of a prompt of more than `limit`, else 0; a token has a byte, so short prompts need no count."""
        if len(self.prompt_text) <= limit and len(self.prompt_text.encode(errors="replace")) <= limit:
            return 0
        return tokens if (tokens := len(self.prompt_ids)) > limit else 0


class Rejected(NamedTuple):
    """A sample that a model cannot be given, and why."""

    sample: ToolSample
    reason: str
    is_too_long: bool = False


def prepare(sample: ToolSample, layout: PromptLayout) -> Prepared | Rejected:
    """The sample with its prompt; rejected if no response could match its gold or the chat template fails on it.

    So is text that no tokenizer takes, with half of a surrogate pair.
    """
    try:
        check_gold(sample, layout.format)
        prompt = layout.render(sample)
        json.dumps([prompt, to_json(sample)["gold"], sample.preamble, sample.thought], ensure_ascii=False).encode()
        return Prepared(sample, prompt, layout.tokenizer)
    except UnicodeEncodeError:
        return Rejected(sample, f"sample {sample.id!r}, with half of a surrogate pair, which no tokenizer takes")
    except ValueError as error:
        return Rejected(sample, str(error))


def check_gold(sample: ToolSample, tool_format: ToolFormat) -> None:
    """UserError for gold that no response in the format could match."""
    try:
        text = tool_format.render(None, sample.gold.calls, sample.gold.answer)
    except ValueError as error:
        got = f"sample {sample.id!r}, whose gold has no response in the format ({error})"
        raise UserError(got, "one that can be written", "fix the row, or take another format") from None
    if not judge(text, sample.gold, tool_format).exact_match:
        raise UserError(
            f"sample {sample.id!r}, whose gold does not score full marks when written in format "
            f"{tool_format.name!r} ({text!r:.200})",
            "JSON within the limits of rest_rl.json_spans",
            "fix the row",
        )


def prepare_row(row: CheckedRow, layout: PromptLayout, config: CheckConfig) -> tuple[CheckedRow, list[Prepared]]:
    """A checked row without the samples that the model cannot hold or sample, or that exceed a limit of the config.

    Each of them is a finding. Also returns the row's prepared samples, in the same order.
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
    """(reason, detail) of what speaks against a sample that can be laid out."""
    sample, room = prepared.sample, config.max_response_tokens
    if layout.context and (tokens := prepared.tokens_if_over(layout.context - room)):
        yield "beyond_context", f"got {tokens} tokens and {room} for the response, the model holds {layout.context}"
    elif config.max_prompt_tokens and (tokens := prepared.tokens_if_over(config.max_prompt_tokens)):
        yield "prompt_too_long", f"got {tokens} tokens, the limit is {config.max_prompt_tokens}"
    gold = [to_json(sample)["gold"], sample.preamble, sample.thought]
    for where, value in (("gold", gold), ("prompt", [sample.messages, sample.tools])):
        if tokens := find_control_tokens(value, layout):
            yield f"control_token_in_{where}", f"got {', '.join(tokens)}"


def find_control_tokens(value: Any, layout: PromptLayout) -> list[str]:
    """The special tokens, but for tags of the format, that texts of a JSON value spell."""
    text = json.dumps(value, ensure_ascii=False)
    return sorted(token for token in layout.special_tokens - {*layout.format.tags} if len(token) > 2 and token in text)
