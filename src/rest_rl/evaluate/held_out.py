"""Exact match, S_acc and S_format on held-out prompts: sampled at temperature 1 and greedy, per kind and per split,
and apart for turns that call and turns that answer.

Every score carries its number of responses `n` and the standard error of its exact match over prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from rest_rl.config import EvalTable
from rest_rl.data.samples import ToolSample
from rest_rl.evaluate.generate import end_ids, generate, has_ended
from rest_rl.formats import ToolFormat
from rest_rl.regions import decode_ids
from rest_rl.rewards import judge
from rest_rl.statistics import Outcome, summarise


class Prompt(NamedTuple):
    """A held-out sample and the text the model is asked to go on from."""

    text: str
    sample: ToolSample
    split: str


def evaluate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    tool_format: ToolFormat,
    config: EvalTable,
    on_pass: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Scores sampled at temperature 1, with `calls`, `answers`, `kinds`, `splits`; the same greedy under `greedy`."""
    texts = [prompt.text for prompt in prompts]
    settings: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    ends = end_ids(model, tokenizer)
    sampled: list[Outcome] = []
    for draw in range(config.samples):
        on_pass("sampled")
        ids = generate(model, tokenizer, texts, **settings, seed=config.seed + draw)
        sampled += outcomes_of(ids, prompts, tokenizer, tool_format, ends)
    on_pass("greedy")
    ids = generate(model, tokenizer, texts, **settings, greedy=True)
    greedy = outcomes_of(ids, prompts, tokenizer, tool_format, ends)
    return {**summarise(sampled), "greedy": summarise(greedy)}


def fixed_slice(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """At most `number` of the prompts in their order: as many of each split and kind as there are, the same every time.

    Those of one split and kind are taken at even distances, because neighbours often come from one dialogue.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault((prompt.split, prompt.sample.kind), []).append(index)
    rounds = zip_longest(*([key] * len(group) for key, group in groups.items()))
    quotas = Counter([key for dealt in rounds for key in dealt if key][:number])
    chosen = [group[i * len(group) // quotas[key]] for key, group in groups.items() for i in range(quotas[key])]
    return [prompts[index] for index in sorted(chosen)]


def outcomes_of(
    responses: Sequence[Sequence[int]],
    prompts: Sequence[Prompt],
    tokenizer: Any,
    tool_format: ToolFormat,
    ends: Sequence[int],
) -> list[Outcome]:
    """The worth of one response per prompt, read from its sampled ids; without one of `ends` it was cut off."""
    outcomes: list[Outcome] = []
    for index, (ids, prompt) in enumerate(zip(responses, prompts, strict=True)):
        text, gold = decode_ids(ids, tokenizer, tool_format.tags), prompt.sample.gold
        found = judge(text, gold, tool_format, truncated=not has_ended(ids, ends))
        scores = float(found.exact_match), found.accuracy, found.format
        outcomes.append(Outcome(prompt.sample.kind, prompt.split, index, *scores, gold.turn))
    return outcomes
