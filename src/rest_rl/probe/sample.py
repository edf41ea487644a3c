"""Sample and score groups of responses as training would, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rest_rl.credit import AdvantageKind, group_advantages
from rest_rl.data.layout import PromptLayout
from rest_rl.data.prepare import Prepared
from rest_rl.envs.rollout import Trajectory
from rest_rl.errors import UserError, check_minimums
from rest_rl.evaluate.generate import eos_token_ids, generate, has_ended
from rest_rl.presets import PRESETS
from rest_rl.regions import decode_ids, tag_regions
from rest_rl.response import Gold
from rest_rl.rewards import RewardRule, apply_reward, judge, uses_random_rewards

if TYPE_CHECKING:
    from rest_rl.probe.rollouts import World


class SampledResponse(NamedTuple):
    """A scored response; `ids` include the end-of-sequence token, and `regions` has the `Region` of each token.

    In an environment it is a rollout: everything after the prompt, including what the environment said.
    """

    ids: list[int]
    regions: list[int]
    reward: float
    """NaN if nothing was scored."""
    s_format: float
    s_acc: float
    is_exact: bool
    mask: list[int] | None = None
    """1 for tokens of the policy, 0 for those of the environment; None if there is no environment."""
    credits: list[float] | None = None
    """The advantage of each token; None if all tokens have that of the response within its group."""
    rollout: Trajectory | None = None

    @property
    def sampled(self) -> list[int]:
        """1 for each token that the policy sampled, 0 for the others."""
        return [1] * len(self.ids) if self.mask is None else self.mask

    def is_truncated(self, eos_ids: Collection[int]) -> bool:
        """Return whether the response, or the last turn of the rollout, reached the limit of tokens."""
        if self.rollout is not None:
            return self.rollout.stop == "truncated"
        return not self.ids or self.ids[-1] not in eos_ids


class SampledGroup(NamedTuple):
    """The responses to one prompt."""

    prompt_ids: Sequence[int]
    responses: tuple[SampledResponse, ...]

    def advantages(self, kind: AdvantageKind = "grpo") -> Tensor:
        """Return the advantage of each of the G responses within the group. Shape (G,), float64.

        Like TRL, this leaves unscored responses out of mean and deviation, and gives them the advantage 0.
        """
        rewards_G = torch.tensor([response.reward for response in self.responses], dtype=torch.float64)
        is_scored_G, advantages_G = ~rewards_G.isnan(), torch.zeros_like(rewards_G)
        if self.num_scored:
            advantages_G[is_scored_G] = group_advantages(rewards_G[is_scored_G], self.num_scored, kind)
        return advantages_G

    @property
    def num_scored(self) -> int:
        return sum(not math.isnan(response.reward) for response in self.responses)

    @property
    def has_spread(self) -> bool:
        """Whether any response has an advantage."""
        if any(response.credits is not None for response in self.responses):
            return any(any(response.credits or ()) for response in self.responses)
        return bool(self.advantages("dr_grpo").any())


@dataclass(frozen=True)
class Sampling:
    """Settings for sampling, at temperature 1, and scoring; the default reward is that of the preset `rest`."""

    group_size: int = 8
    """Responses per prompt."""
    max_new_tokens: int = 160
    batch_size: int = 128
    """Responses per forward pass."""
    seed: int = 0
    progress: float = 0.0
    reward: RewardRule = PRESETS["rest"].reward
    world: World | None = None
    """The environment of the rollouts; None for single responses."""

    def __post_init__(self) -> None:
        check_minimums({"the group size": (self.group_size, 2), "max_new_tokens": (self.max_new_tokens, 1)})
        check_minimums({"the batch size": (self.batch_size, 1), "the seed": (self.seed, 0)})
        if not 0 <= self.progress <= 1:
            raise UserError(f"progress is {self.progress}", "a number from 0 to 1", "change it")
        if uses_random_rewards(self.reward):
            remedy = "pass --set rest.reward.random=false"
            raise UserError("rest.reward.random is true", "a reward that reads the responses", remedy)


def sample_groups(
    model: Any,
    layout: PromptLayout,
    prompts: Sequence[Prepared],
    sampling: Sampling,
    advance: Callable[[], Any] = lambda: None,
) -> list[SampledGroup]:
    """Sample a group of responses to each prompt, in order; equal arguments give equal groups.

    With `sampling.world`, a prompt stands for a task, and its group has rollouts; UserError if none has a response, or
    none was scored.
    """
    groups: list[SampledGroup] = []
    sample = sampling.world.sample_batch if sampling.world else sample_batch
    per_batch = max(1, sampling.batch_size // sampling.group_size)
    for first in range(0, len(prompts), per_batch):
        # Each batch has its own seed, so a group does not depend on how many prompts follow.
        for group in sample(model, layout, prompts[first : first + per_batch], sampling, sampling.seed + first):
            groups.append(group)
            advance()
    if sampling.world:
        sampling.world.check_groups(groups)
    return groups


def sample_batch(
    model: Any, layout: PromptLayout, prompts: Sequence[Prepared], sampling: Sampling, seed: int
) -> Iterator[SampledGroup]:
    """Sample, in one batch, a group of responses to each prompt."""
    ends, size = eos_token_ids(model, layout.tokenizer), sampling.group_size
    ids = generate(
        model,
        layout.tokenizer,
        [prompt.prompt_text for prompt in prompts for _ in range(size)],
        max_new_tokens=sampling.max_new_tokens,
        batch_size=sampling.batch_size,
        seed=seed,
    )
    for index, prompt in enumerate(prompts):
        own = ids[index * size : (index + 1) * size]
        responses = tuple(tag_and_score(response, prompt.sample.gold, layout, sampling, ends) for response in own)
        yield SampledGroup(prompt.prompt_ids, responses)


def tag_and_score(
    ids: list[int], gold: Gold, layout: PromptLayout, sampling: Sampling, eos_ids: Sequence[int]
) -> SampledResponse:
    """Tag the regions of a response and score it; a response that does not end with one of `eos_ids` was cut off."""
    text = decode_ids(ids, layout.tokenizer, layout.format.tags)
    judgement = judge(text, gold, layout.format, truncated=not has_ended(ids, eos_ids))
    ids_1T = torch.tensor([ids], dtype=torch.long)
    regions_1T = tag_regions(ids_1T, torch.ones_like(ids_1T), layout.tokenizer, layout.format)
    reward = apply_reward(sampling.reward, judgement, sampling.progress).total
    scores = judgement.format, judgement.accuracy, judgement.exact_match
    return SampledResponse(list(ids), regions_1T[0].tolist(), reward, *scores)
