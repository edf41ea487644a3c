"""Exact match, S_acc and S_format on held-out prompts: sampled at temperature 1 and greedy, per kind and per split,
and apart for turns that call and turns that answer.

Every score carries its number of responses `n` and the standard error of its exact match over prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from rest_rl.config import EvalTable, RunConfig
from rest_rl.data.samples import ToolSample
from rest_rl.evaluate.generate import decoding_steps, eos_token_ids, generate, has_ended
from rest_rl.formats import ToolFormat
from rest_rl.regions import decode_ids
from rest_rl.rewards import judge
from rest_rl.runlog import SILENT, Observer
from rest_rl.statistics import Outcome, summarise

REASONING_ALLOWANCE = 256
"""Tokens beside twice the longest gold: for the thoughts of a model that reasons where gold has none."""


class HeldOutPrompt(NamedTuple):
    """A held-out sample, the text the model is asked to go on from, and how many tokens it may write."""

    text: str
    sample: ToolSample
    split: str
    limit: int


def evaluate_held_out(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[HeldOutPrompt],
    tool_format: ToolFormat,
    config: EvalTable,
    observer: Observer = SILENT,
) -> dict[str, Any]:
    """Scores sampled at temperature 1, with `calls`, `answers`, `kinds`, `splits`; the same greedy under `greedy`."""
    texts, limits = [prompt.text for prompt in prompts], [prompt.limit for prompt in prompts]
    settings: dict[str, Any] = {"max_new_tokens": limits, "batch_size": config.batch_size}
    steps = decoding_steps(texts, limits, config.batch_size)
    passes = [("sampled", {"seed": config.seed + draw}) for draw in range(config.samples_per_prompt)] + [("greedy", {})]
    ends = eos_token_ids(model, tokenizer)
    outcomes: dict[str, list[Outcome]] = {"sampled": [], "greedy": []}
    what = f"evaluating {len(prompts)} held-out prompts, decoding steps"
    with observer.track(what, steps * len(passes)) as advance:
        for number, (kind, seed) in enumerate(passes):
            ids = generate(
                *(model, tokenizer, texts),
                **(settings | seed),
                greedy=kind == "greedy",
                on_token=lambda done, kind=kind, before=number * steps: advance(before + done, note=kind),
            )
            outcomes[kind] += score_responses(ids, prompts, tokenizer, tool_format, ends)
    return {**summarise(outcomes["sampled"]), "greedy": summarise(outcomes["greedy"])}


def response_limit(config: RunConfig, golds: Iterable[str], tokenizer: Any) -> int:
    """Tokens that a held-out response may have: `eval.max_new_tokens`, or if that is 0 what the golds call for.

    That is twice the longest gold plus room to reason, and at most what training allows a response.
    """
    if config.eval.max_new_tokens:
        return config.eval.max_new_tokens
    longest = max((len(tokenizer(gold, add_special_tokens=False)["input_ids"]) for gold in golds), default=0)
    return min(config.max_response_tokens, 2 * longest + REASONING_ALLOWANCE)


def select_interim_prompts(prompts: Sequence[HeldOutPrompt], number: int) -> list[HeldOutPrompt]:
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


def score_responses(
    responses: Sequence[Sequence[int]],
    prompts: Sequence[HeldOutPrompt],
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
