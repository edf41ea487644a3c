"""Prompt texts by the tokenizer's chat template, and the dataset of them that training reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rest_rl.data.samples import ToolSample, to_json
from rest_rl.formats import ToolFormat, get_format
from rest_rl.rewards import exact_match

if TYPE_CHECKING:
    from datasets import Dataset


def training_dataset(
    samples: Iterable[ToolSample], tokenizer: Any, tool_format: str | ToolFormat = "toolrl"
) -> Dataset:
    """The dataset that `ResTTrainer` reads: columns prompt (text), gold (JSON text), id and kind.

    Prompts are laid out here because GRPOTrainer ignores a `tools` column. `gold` is text because Arrow would give
    every row the argument names of all rows. ValueError for no samples, for a tokenizer without a chat template, and
    for gold that no response in the format could match (NaN, tags of the format in the answer).
    """
    from datasets import Dataset  # only here: rendering a prompt needs no more than a tokenizer

    samples = list(samples)
    for sample in samples:
        _check_gold(sample, get_format(tool_format))
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


def _check_gold(sample: ToolSample, tool_format: ToolFormat) -> None:
    try:
        text = tool_format.render(None, sample.gold.calls, sample.gold.answer)
    except ValueError as error:
        raise ValueError(f"sample {sample.id!r}: its gold has no response in the format: {error}") from None
    if not exact_match(tool_format.parse(text, spans=False), sample.gold):
        raise ValueError(
            f"sample {sample.id!r}: got gold that scores less than full marks when written in format "
            f"{tool_format.name!r} ({text!r:.200}); expected JSON within the limits of rest_rl.json_spans; mend the row"
        )


def render_prompt(sample: ToolSample, tokenizer: Any, tool_format: str | ToolFormat = "toolrl") -> str:
    """The prompt text of a sample up to where the response begins, by the tokenizer's chat template.

    A template that leaves the tools out gets them, and the format, as a system message. ValueError without a template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "got a tokenizer without a chat template, expected one that lays out tools and messages; use an instruct "
            "model, or set tokenizer.chat_template"
        )
    try:
        return _apply_template(sample, tokenizer, tool_format)
    except (TemplateError, TypeError, KeyError, AttributeError) as error:  # a template is a program of its own
        raise ValueError(
            f"sample {sample.id!r}: the model's chat template failed ({type(error).__name__}: {error}); expected "
            "messages and tools that it can lay out; complete the row (tools need name, description and parameters)"
        ) from error


def _apply_template(sample: ToolSample, tokenizer: Any, tool_format: str | ToolFormat) -> str:
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
