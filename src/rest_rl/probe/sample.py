"""Groups of sampled responses as training would see them, without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rest_rl.credit import AdvantageKind, group_advantages
from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import ToolSample
from rest_rl.errors import UserError
from rest_rl.evaluate.generate import generate
from rest_rl.presets import PRESETS
from rest_rl.regions import decode_ids, tag_regions
from rest_rl.rewards import RewardRule, apply_reward, judge


class Response(NamedTuple):
    """One sampled response: `ids` with the end-of-sequence token, and the `Region` of each of them."""

    ids: list[int]
    regions: list[int]
    reward: float
    s_format: float
    s_acc: float
    is_exact: bool


class Group(NamedTuple):
    """The responses to one prompt."""

    sample: ToolSample
    prompt_ids: list[int]
    responses: tuple[Response, ...]

    def advantages(self, kind: AdvantageKind = "grpo") -> Tensor:
        """The advantage of each response within the group: float64 (G,)."""
        rewards_G = torch.tensor([response.reward for response in self.responses], dtype=torch.float64)
        return group_advantages(rewards_G, len(self.responses), kind)


def sample_groups(
    model: Any,
    layout: PromptLayout,
    samples: Sequence[ToolSample],
    *,
    group_size: int = 8,
    max_new_tokens: int = 160,
    batch_size: int = 128,
    seed: int = 0,
    progress: float = 0.0,
    reward: RewardRule = PRESETS["rest"].reward,
) -> Iterator[Group]:
    """`group_size` responses per prompt at temperature 1, scored at training progress `progress`, in order.

    Groups come as their batch is done, so that a caller can show how far it is; equal arguments give equal groups. The
    default reward is that of the preset `rest`. UserError for one that is random.
    """
    check_reads(reward)
    per_batch = max(1, batch_size // group_size)
    for first in range(0, len(samples), per_batch):
        chunk = samples[first : first + per_batch]
        prompts = [layout.render(sample) for sample in chunk]
        ids = generate(
            model,
            layout.tokenizer,
            [prompt for prompt in prompts for _ in range(group_size)],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed + first,
        )
        for index, (sample, prompt) in enumerate(zip(chunk, prompts, strict=True)):
            own = ids[index * group_size : (index + 1) * group_size]
            prompt_ids = layout.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            responses = tuple(judged(response, sample, layout, progress, reward) for response in own)
            yield Group(sample, list(prompt_ids), responses)


def check_reads(reward: RewardRule) -> None:
    """ValueError for a random reward, from which nothing about the responses follows."""
    if getattr(reward, "random", False):
        raise UserError(
            "reward.random = true", "a reward that reads the responses", "pass --set rest.reward.random=false"
        )


def judged(ids: list[int], sample: ToolSample, layout: PromptLayout, progress: float, reward: RewardRule) -> Response:
    """A response with its regions and scores."""
    tool_format, tokenizer = layout.format, layout.tokenizer
    judgement = judge(decode_ids(ids, tokenizer, tool_format.tags), sample.gold, tool_format)
    row = torch.tensor([ids], dtype=torch.long)
    regions_BT = tag_regions(row, torch.ones_like(row), tokenizer, tool_format)
    total = apply_reward(reward, judgement, progress).total
    scores = judgement.format, judgement.accuracy, judgement.exact_match
    return Response(list(ids), regions_BT[0].tolist(), total, *scores)
