"""Prompt texts by the tokenizer's chat template, and the dataset of them that training reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rest_rl.data.samples import ToolSample, to_json
from rest_rl.formats import ToolFormat, get_format

if TYPE_CHECKING:
    from datasets import Dataset


def training_dataset(
    samples: Iterable[ToolSample], tokenizer: Any, tool_format: str | ToolFormat = "toolrl"
) -> Dataset:
    """The dataset that `ResTTrainer` reads: columns prompt (text), gold (JSON text), id and kind.

    Prompts are laid out here because GRPOTrainer ignores a `tools` column. `gold` is text because Arrow would give
    every row the argument names of all rows. ValueError for no samples and for a tokenizer without a chat template.
    """
    from datasets import Dataset  # only here: rendering a prompt needs no more than a tokenizer

    rows = [
        {
            "prompt": _without_second_bos(render_prompt(sample, tokenizer, tool_format), tokenizer),
            "gold": json.dumps(to_json(sample)["gold"], ensure_ascii=False),
            "id": sample.id,
            "kind": sample.kind,
        }
        for sample in samples
    ]
    if not rows:
        raise ValueError("got no samples, expected at least one; check the data file")
    return Dataset.from_list(rows)


def render_prompt(sample: ToolSample, tokenizer: Any, tool_format: str | ToolFormat = "toolrl") -> str:
    """The prompt text of a sample up to where the response begins, by the tokenizer's chat template.

    A template that leaves the tools out gets them, and the format, as a system message. ValueError without a template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "got a tokenizer without a chat template, expected one that lays out tools and messages; use an instruct "
            "model, or set tokenizer.chat_template"
        )
    messages, tools = list(sample.messages), list(sample.tools)
    settings: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    text = tokenizer.apply_chat_template(messages, tools=tools or None, **settings)
    if tools and text == tokenizer.apply_chat_template(messages, **settings):
        instructions = {"role": "system", "content": get_format(tool_format).instructions(tools)}
        text = tokenizer.apply_chat_template([instructions, *messages], **settings)
    return text


def _without_second_bos(text: str, tokenizer: Any) -> str:
    """Drop the template's beginning-of-sequence token where the tokenizer adds its own: TRL tokenises the text."""
    bos = tokenizer.bos_token
    if not bos or not text.startswith(bos) or tokenizer(text)["input_ids"][:2] != [tokenizer.bos_token_id] * 2:
        return text
    return text.removeprefix(bos)
