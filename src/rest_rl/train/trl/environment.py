"""Rollouts in an environment inside TRL's trainer, and credit for each turn or part of a response.

TRL's `rollout_func` replaces its generation. Its own loop over tools (`environment_factory`) cannot stop when an
environment is done, has no timeouts, and parses calls only with templates that it knows.

Shapes: B responses, T completion tokens.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer

from rest_rl.credit import CreditConfig, CreditKind, spread_credits, stage_credits
from rest_rl.envs.rollout import Generated, Rollouts, Trajectory
from rest_rl.train.environment import Staged, resolve_credit, stage_rollouts


class EnvironmentTrainer(GRPOTrainer):
    """`GRPOTrainer` that rolls out tasks of an environment if it gets `rollouts`; the dataset then holds task rows.

    With `credit = "outcome"` the advantages are TRL's own. The other kinds of credit replace them by one advantage per
    token, of shape (B, T). Their stages are the turns of rollouts, or else the parts of a response that decide its
    reward (`split_response`, which a subclass defines).
    """

    def __init__(self, *args: Any, rollouts: Rollouts | None = None, **kwargs: Any) -> None:
        self.rollouts = rollouts
        self._rows: list[dict[str, Any]] = []
        self._trajectories: list[Trajectory] = []
        if rollouts is not None:
            kwargs["rollout_func"] = self._roll_out
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'")  # experimental in TRL 1.14 to 1.16
            super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._rows = inputs
        batch = super()._generate_and_score_completions(inputs)
        if self.credit != "outcome":
            staged, stages_BT = self._stage_rollouts(batch) if self.rollouts else self._stage_responses(batch)
            credits_BT = self._compute_credits(staged, stages_BT)
            batch["advantages"] = credits_BT.to(batch["advantages"])
        return batch

    def split_response(self, row: Mapping[str, Any], ids: Sequence[int]) -> tuple[list[float], list[int]]:
        """Return the rewards of the stages of a response to a dataset row, and the stage of each of its tokens."""
        raise NotImplementedError

    @property
    def credit(self) -> CreditKind:
        """The kind of credit: that of the settings, or `return_to_go` if the environment rewards single calls."""
        return resolve_credit(cast(Any, self.args).credit, self.rollouts and self.rollouts.environment)

    @property
    def _group_size(self) -> int:
        is_training = cast(Any, self.model).training
        return cast(int, self.num_generations if is_training else self.num_generations_eval)

    def _roll_out(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        assert self.rollouts is not None
        group, pad = self._group_size, cast(int, self._tokenizer.pad_token_id)

        def respond(ids: Sequence[list[int]], is_first: bool) -> Generated:
            # Groups share the first prompt; later ones differ.
            return Generated(*self._generate_single_turn(ids, None, {}, group if is_first else 1))

        tasks = [(json.loads(row["task"]), int(row["session_seed"])) for row in self._rows]
        self._trajectories = found = self.rollouts.run(tasks, respond)
        for each in found:  # TRL needs at least one token of each
            each.prompt_ids = each.prompt_ids or [pad]
            if not each.ids:
                each.ids, each.mask, each.logprobs = [pad], [0], [0.0]
        has_logprobs = self.use_vllm
        return {
            "prompt_ids": [each.prompt_ids for each in found],
            "completion_ids": [each.ids for each in found],
            "logprobs": [each.logprobs for each in found] if has_logprobs else None,
            "env_mask": [each.mask for each in found],
            "trajectory": found,
        }

    def _stage_rollouts(self, batch: dict[str, Any]) -> tuple[list[Staged], Tensor]:
        return stage_rollouts(self._trajectories, batch["completion_mask"] * batch["tool_mask"], self.credit)

    def _stage_responses(self, batch: dict[str, Any]) -> tuple[list[Staged], Tensor]:
        mask_BT = batch["completion_mask"].bool()
        stages_BT, staged = torch.full(mask_BT.shape, -1, device=mask_BT.device), []
        for number, (row, ids) in enumerate(zip(self._rows, batch["completion_ids"], strict=True)):
            rewards, stages = self.split_response(row, ids[mask_BT[number]].tolist())
            stages_BT[number, mask_BT[number]] = torch.tensor(stages, device=mask_BT.device)
            staged.append(Staged(rewards, [None] * len(rewards), [0.0] * len(rewards)))
        return staged, stages_BT

    # The credit of each stage, from the rewards of the whole group, which may be spread over processes.
    def _compute_credits(self, own: list[Staged], stages_BT: Tensor) -> Tensor:
        everyone = gather_object(own) if self.accelerator.num_processes > 1 else own
        config = CreditConfig(self.credit, cast(Any, self.args).gamma)
        credits: list[list[float]] = []
        num_stages = num_lone = 0
        for first in range(0, len(everyone), self._group_size):
            rewards, states, matched = zip(*everyone[first : first + self._group_size], strict=True)
            found = stage_credits(rewards, config, states=states, matched=matched)
            credits += found.credits
            num_stages, num_lone = num_stages + found.num_stages, num_lone + found.num_lone
        mode = "train" if cast(Any, self.model).training else "eval"
        self._metrics[mode]["env/lone_turns" if self.rollouts else "rest/lone_stages"].append(
            num_lone / max(1, num_stages)
        )
        start = self.accelerator.process_index * len(own)
        return spread_credits(credits[start : start + len(own)], stages_BT)
