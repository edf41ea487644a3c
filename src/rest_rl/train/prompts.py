"""The dataset of prompts that training reads, and demonstrations as token ids and labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rest_rl.data.prompt_layout import PromptLayout
from rest_rl.data.samples import ToolSample, to_json
from rest_rl.formats import ToolFormat, as_demonstrated
from rest_rl.rewards import exact_match

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""The label of a token that is not learnt."""
OnRefused = Callable[[ToolSample, ValueError], None]
"""Who is told of a sample that the model's format or chat template cannot hold."""


def training_dataset(
    samples: Iterable[ToolSample],
    tokenizer: Any,
    tool_format: str | ToolFormat = "toolrl",
    variables: Mapping[str, Any] | None = None,
    on_refused: OnRefused | None = None,
) -> Dataset:
    """The dataset that `ResTTrainer` reads: columns prompt (text), gold (JSON text), id and kind.

    Prompts are laid out here because GRPOTrainer ignores a `tools` column. `gold` is text because Arrow would give
    every row the argument names of all rows. ValueError for no samples, for a tokenizer without a chat template, and
    for gold that no response in the format could match (NaN, tags of the format in the answer); with `on_refused` it
    is told of such samples, and the others are kept.
    """
    layout = PromptLayout(tokenizer, tool_format, variables)
    return dataset_of(samples, lambda sample: _training_row(sample, layout), on_refused)


def dataset_of(
    samples: Iterable[ToolSample], row: Callable[[ToolSample], dict[str, Any]], on_refused: OnRefused | None
) -> Dataset:
    """One row per sample, without those whose `row` is a ValueError if `on_refused` is told; ValueError for none."""
    from datasets import Dataset  # only here: rendering a prompt needs no more than a tokenizer

    rows: list[dict[str, Any]] = []
    first: ValueError | None = None
    for sample in samples:
        try:
            rows.append(row(sample))
        except ValueError as error:  # noqa: PERF203 - rendering a template costs more than any try
            if on_refused is None:
                raise
            first = first or error
            on_refused(sample, error)
    if not rows:
        raise first or ValueError("got no samples, expected at least one; check the data file")
    return Dataset.from_list(rows)


def _training_row(sample: ToolSample, layout: PromptLayout) -> dict[str, Any]:
    check_gold(sample, layout.format)
    gold = json.dumps(to_json(sample)["gold"], ensure_ascii=False)
    return {"prompt": layout.training_text(sample), "gold": gold, "id": sample.id, "kind": sample.kind}


def check_gold(sample: ToolSample, tool_format: ToolFormat) -> None:
    """ValueError for gold that no response in the format could match."""
    try:
        text = tool_format.render(None, sample.gold.calls, sample.gold.answer)
    except ValueError as error:
        raise ValueError(f"sample {sample.id!r}: its gold has no response in the format: {error}") from None
    if not exact_match(tool_format.parse(text, spans=False), sample.gold):
        raise ValueError(
            f"sample {sample.id!r}: got gold that scores less than full marks when written in format "
            f"{tool_format.name!r} ({text!r:.200}); expected JSON within the limits of rest_rl.json_spans; mend the row"
        )


def render_prompt(
    sample: ToolSample,
    tokenizer: Any,
    tool_format: str | ToolFormat = "toolrl",
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of one sample up to where the response begins; see `PromptLayout`."""
    return PromptLayout(tokenizer, tool_format, variables).render(sample)


def demonstration_text(sample: ToolSample, tool_format: ToolFormat, *, thinks: bool = True) -> str:
    """What supervised training has a model say to a sample; ValueError for what the format cannot write.

    What a turn says before its calls stands there as text where the format has room for it, and else as its thought if
    it has no other. Without `thinks` there is no thought, for prompts that end in a closed think block.
    """
    thought, said = (sample.thought if thinks else None), sample.gold.answer
    if sample.preamble and said is None:
        has_room = tool_format.parse("", spans=False).untagged_answer
        said, thought = (sample.preamble, thought) if has_room else (said, thought or sample.preamble)
    return as_demonstrated(tool_format).render(thought, sample.gold.calls, said)


def encode(prompt: str, response: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids, labels) of a prompt and its response, which ends with the end-of-sequence token."""
    prompt_ids, response_ids = tokenizer([prompt, response], add_special_tokens=False)["input_ids"]
    response_ids = [*response_ids, tokenizer.eos_token_id]
    return prompt_ids + response_ids, [IGNORED] * len(prompt_ids) + response_ids
