"""Score held-out prompts by exact match and ResT's rewards S_acc and S_format, and measure the policy entropy.

Responses are greedy, sampled at temperature 1, and sampled at a low temperature: training that only sharpens the policy
raises scores at temperature 1 to what the low temperature gives before training. Scores are reported in total, per kind
of sample, per split of the held-out set, and for call turns and answer turns, each with the number of responses `n`,
the standard error of exact match over prompts, and the share of responses that are calls as JSON which the format does
not read (`unread_calls`). On answer turns, the other scores count them as answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from rest_rl.config import EvalTable, RunConfig
from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import ToolSample
from rest_rl.evaluate.generate import Draw, EntropyMeter, decoding_steps, eos_token_ids, generate_draws, has_ended
from rest_rl.evaluate.shared_attention import can_share
from rest_rl.formats import ToolFormat
from rest_rl.formats.detect import is_json_call
from rest_rl.regions import decode_ids
from rest_rl.rewards import judge
from rest_rl.runlog import SILENT, Observer
from rest_rl.statistics import Outcome, summarize

REASONING_ALLOWANCE, TEXT_ALLOWANCE = 256, 64
"""Tokens beyond twice the longest gold: if the prompt asks for reasoning, which gold may lack, and for other text."""


LIMIT_WITHOUT_GOLD = 256


class HeldOutPrompt(NamedTuple):
    """A held-out sample with its rendered prompt and its response limit in tokens."""

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
    """Return the scores (total, by turn, kind and split) of responses sampled at temperature 1.

    The scores of greedy responses are under `greedy`. Those at `eval.low_temperature` are under `low_temperature`,
    together with the `temperature`; the key is missing if it is 0. `policy_entropy` is the mean over the tokens of the
    responses at temperature 1, in nats.
    """
    draws, meter, ends = plan_draws(config), EntropyMeter(), eos_token_ids(model, tokenizer)
    rounds = plan_rounds(model, draws)
    texts, limits = [prompt.text for prompt in prompts], [prompt.limit for prompt in prompts]
    steps = decoding_steps(texts, limits, config.batch_size)
    outcomes: dict[str, list[Outcome]] = {}
    what = f"evaluating {len(prompts)} held-out prompts, decoding steps"
    with observer.track(what, steps * len(rounds)) as advance:
        for number, together in enumerate(rounds):
            note = ", ".join(dict.fromkeys(kind for kind, _ in together))
            drawn = generate_draws(
                *(model, tokenizer, texts, [draw for _, draw in together]),
                max_new_tokens=limits,
                batch_size=config.batch_size,
                on_token=lambda done, note=note, before=number * steps: advance(before + done, note=note),
                meter=meter,
            )
            for (kind, _), ids in zip(together, drawn, strict=True):
                outcomes.setdefault(kind, []).extend(score_responses(ids, prompts, tokenizer, tool_format, ends))
    scores = {**summarize(outcomes["sampled"]), "greedy": summarize(outcomes["greedy"]), "policy_entropy": meter.mean}
    if low := config.low_temperature:
        scores["low_temperature"] = {**summarize(outcomes["low temperature"]), "temperature": low}
    return scores


def plan_draws(config: EvalTable) -> list[tuple[str, Draw]]:
    """Return the draws of an evaluation, each with what it measures."""
    draws = [("sampled", Draw(1.0, config.seed + number)) for number in range(config.samples_per_prompt)]
    draws.append(("greedy", Draw(0.0, config.seed)))
    if config.low_temperature:
        draws.append(("low temperature", Draw(config.low_temperature, config.seed)))
    return draws


def plan_rounds(model: Any, draws: Sequence[tuple[str, Draw]]) -> list[list[tuple[str, Draw]]]:
    """Return which draws run together: all, where prompts are shared, so that each prompt is computed once."""
    return [list(draws)] if can_share(model) else [[draw] for draw in draws]


def response_limit(config: RunConfig, golds: Sequence[str], layout: PromptLayout) -> int:
    """Return the response limit of an evaluation: `eval.max_new_tokens` or, if that is 0, `derive_response_limit`."""
    return config.eval.max_new_tokens or derive_response_limit(golds, layout, config.max_response_tokens)


# A limit far above the gold is expensive: a model that does not stop by itself generates up to it. A model that was
# trained to reason gets all of `most`, because gold without its reasoning says nothing about the length it needs.
def derive_response_limit(golds: Sequence[str], layout: PromptLayout, most: int) -> int:
    """Return a response limit in tokens, at most `most`: twice the longest gold response plus an allowance."""
    if layout.expects_reasoning:
        return most
    if golds and not any(golds):  # an environment that does not know the calls
        return min(most, LIMIT_WITHOUT_GOLD)
    allowance = REASONING_ALLOWANCE if layout.asks_for_reasoning else TEXT_ALLOWANCE
    return min(most, 2 * max(count_tokens(golds, layout.tokenizer), default=0) + allowance)


def count_tokens(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the number of tokens of each text."""
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []


# Sampling at even distances: prompts are dealt round-robin to the (split, kind) groups until `number` are dealt,
# which gives each group its quota (equal, as far as the group has enough prompts). A group of size n with quota q then
# contributes its indices 0, n/q, 2n/q, ... (rounded down). A prefix would be less diverse, since neighbors often come
# from the same dialogue. There is no randomness: every evaluation of a run uses the same prompts.
def select_interim_prompts(prompts: Sequence[HeldOutPrompt], number: int) -> list[HeldOutPrompt]:
    """Select at most `number` prompts for evaluations during training, balanced over splits and kinds."""
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
    """Score one response per prompt, given as token ids; a response that ends with none of `ends` is truncated."""
    outcomes: list[Outcome] = []
    for index, (ids, prompt) in enumerate(zip(responses, prompts, strict=True)):
        text, gold = decode_ids(ids, tokenizer, tool_format.tags), prompt.sample.gold
        found = judge(text, gold, tool_format, truncated=not has_ended(ids, ends))
        scores = float(found.exact_match), found.accuracy, found.format
        unread = not found.parsed.calls and is_json_call(found.parsed.answer or text)
        outcomes.append(Outcome(prompt.sample.kind, prompt.split, index, *scores, gold.turn, unread))
    return outcomes
