"""Sample groups of rollouts in an environment, and credit their turns, as training would."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from rest_rl.config import RunConfig
from rest_rl.credit import CreditConfig, spread_credits, stage_credits
from rest_rl.data.layout import PromptLayout
from rest_rl.data.prepare import Prepared
from rest_rl.envs.guard import Limits
from rest_rl.envs.rollout import Trajectory
from rest_rl.envs.session import Environment
from rest_rl.errors import UserError
from rest_rl.probe.gradients import pad_responses
from rest_rl.probe.sample import SampledGroup, SampledResponse, Sampling
from rest_rl.regions import tag_regions
from rest_rl.train.environment import (
    EnvironmentData,
    compute_readable_share,
    make_limits,
    make_rows,
    resolve_credit,
    sample_rollouts,
    stage_rollouts,
)


@dataclass(frozen=True)
class World:
    """The environment of a run, with the limits and the credit of its rollouts."""

    environment: Environment
    limits: Limits
    credit: CreditConfig
    seed: int
    """The run's seed, from which those of the sessions are derived."""

    @classmethod
    def from_run(cls, config: RunConfig, environment: Environment) -> World:
        credit = CreditConfig(resolve_credit(config.rest.credit, environment), config.rest.gamma)
        return cls(environment, make_limits(config), credit, config.run.seed)

    def sample_batch(
        self, model: Any, layout: PromptLayout, prompts: Sequence[Prepared], sampling: Sampling, seed: int
    ) -> Iterator[SampledGroup]:
        """Roll out, in one batch, a group for each task for which a prompt stands."""
        rows, size = make_rows(EnvironmentData(list(prompts), []), self.seed), sampling.group_size
        tasks = [(json.loads(row["task"]), int(row["session_seed"])) for row in rows for _ in range(size)]
        found = sample_rollouts(
            model, self.environment, layout, self.limits, tasks, max_new_tokens=sampling.max_new_tokens,
            batch_size=sampling.batch_size, seed=seed,
        )  # fmt: skip
        for start in range(0, len(found), size):
            yield make_group(found[start : start + size], layout, self.credit)

    def check_groups(self, groups: Sequence[SampledGroup]) -> None:
        """Raise a UserError if no rollout has a response, or none was scored."""
        rollouts = [response for group in groups for response in group.responses]
        first = rollouts[0].rollout
        if not any(any(response.sampled) for response in rollouts) and first is not None:
            problem = f"no rollout has a response; the first ended with {first.failure or first.stop!r}"
            raise UserError(
                problem, remedy="run rest-rl env check, or lower --max-new-tokens if the context is too short"
            )
        if all(math.isnan(response.reward) for response in rollouts):
            raise UserError("the environment scored no rollout", "a reward", "set env.reward")


def make_group(rollouts: Sequence[Trajectory], layout: PromptLayout, credit: CreditConfig) -> SampledGroup:
    """Return the rollouts of one task as a group: one row of tokens each, with regions and credits."""
    prompt_ids = share_prompt(rollouts)
    # Rollouts of a task begin with the same prompt, unless the environment ignores its seed.
    extra = [each.prompt_ids[len(prompt_ids) :] for each in rollouts]
    ids = [[*more, *each.ids] for more, each in zip(extra, rollouts, strict=True)]
    masks = [[*([0] * len(more)), *each.mask] for more, each in zip(extra, rollouts, strict=True)]
    ids_GT, mask_GT = pad_responses(ids)[0], pad_responses(masks)[0]
    regions_GT = tag_regions(ids_GT, mask_GT, layout.tokenizer, layout.format)
    credits_GT = None
    if credit.kind != "outcome":
        staged, stages_GT = stage_rollouts(rollouts, mask_GT, credit.kind)
        rewards, states, matched = zip(*staged, strict=True)
        credits_GT = spread_credits(stage_credits(rewards, credit, states=states, matched=matched).credits, stages_GT)
    responses = tuple(
        SampledResponse(
            own,
            regions_GT[g, : len(own)].tolist(),
            math.nan if each.total is None else each.total,
            compute_readable_share(each),
            each.total or 0.0,
            each.has_succeeded,
            masks[g],
            None if credits_GT is None else credits_GT[g, : len(own)].tolist(),
            each,
        )
        for g, (own, each) in enumerate(zip(ids, rollouts, strict=True))
    )
    return SampledGroup(prompt_ids, responses)


def share_prompt(rollouts: Sequence[Trajectory]) -> list[int]:
    """Return the tokens with which all prompts begin; rollouts that did not start have none."""
    prompts = [each.prompt_ids for each in rollouts if each.prompt_ids]
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))]
