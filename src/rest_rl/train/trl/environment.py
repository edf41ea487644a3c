"""Rollouts in an environment inside TRL's trainer, and credit for each turn.

TRL's `rollout_func` replaces its generation. Its own loop over tools (`environment_factory`) cannot stop when an
environment is done, has no timeouts, and parses calls only with templates that it knows.

Shapes: B responses, T completion tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from trl import GRPOTrainer

from rest_rl.envs.rollout import Generated, Rollouts, Trajectory


class EnvironmentTrainer(GRPOTrainer):
    """`GRPOTrainer` that rolls out tasks of an environment if it gets `rollouts`; the dataset then holds task rows.

    With `credit = "outcome"` the advantages are TRL's own. The other kinds of credit replace them by one advantage per
    token, of shape (B, T).
    """

    def __init__(self, *args: Any, rollouts: Rollouts | None = None, **kwargs: Any) -> None:
        self.rollouts = rollouts
        self._rows: list[dict[str, Any]] = []
        self._trajectories: list[Trajectory] = []
        if rollouts is not None:
            kwargs["rollout_func"] = self._roll_out
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._rows = inputs
        batch = super()._generate_and_score_completions(inputs)
        if self.rollouts is not None and self.credit != "outcome":
            batch["advantages"] = self._compute_credits(batch["completion_ids"])
        return batch

    @property
    def credit(self) -> str:
        """The kind of credit: that of the settings, or `return_to_go` if the environment rewards single calls."""
        has_steps = self.rollouts is not None and getattr(self.rollouts.environment, "step_rewards", False)
        return cast(Any, self.args).credit or ("return_to_go" if has_steps else "outcome")

    def _roll_out(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        assert self.rollouts is not None
        group = self.num_generations if cast(Any, self.model).training else self.num_generations_eval
        pad = self._tokenizer.pad_token_id

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

    def _compute_credits(self, ids_BT: Tensor) -> Tensor:
        raise NotImplementedError
