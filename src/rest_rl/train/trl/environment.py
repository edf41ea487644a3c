"""Rollouts in an environment inside TRL's trainer, and credit for each turn.

TRL's `rollout_func` replaces its generation. Its own loop over tools (`environment_factory`) cannot stop when an
environment is done, has no timeouts, and parses calls only with templates that it knows.

Shapes: B responses, T completion tokens.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any, cast

from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer

from rest_rl.credit import CreditConfig, CreditKind, find_turn_stages, spread_credits, stage_credits
from rest_rl.envs.rollout import Generated, Rollouts, Trajectory
from rest_rl.errors import UserError
from rest_rl.rewards import match_calls_by_stage


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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'")  # experimental in TRL 1.14 to 1.16
            super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._rows = inputs
        batch = super()._generate_and_score_completions(inputs)
        if self.rollouts is not None and self.credit != "outcome":
            mask_BT = batch["completion_mask"] * batch["tool_mask"]
            batch["advantages"] = self._compute_credits(mask_BT).to(batch["advantages"])
        return batch

    @property
    def credit(self) -> str:
        """The kind of credit: that of the settings, or `return_to_go` if the environment rewards single calls."""
        has_steps = self.rollouts is not None and getattr(self.rollouts.environment, "step_rewards", False)
        return cast(Any, self.args).credit or ("return_to_go" if has_steps else "outcome")

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

    # The credit of each turn, from the rewards of the whole group, which may be spread over processes.
    def _compute_credits(self, mask_BT: Tensor) -> Tensor:
        own = [
            (each.rewards, [turn.state_hash for turn in each.turns] or [None], self._match_gold(each))
            for each in self._trajectories
        ]
        everyone = gather_object(own) if self.accelerator.num_processes > 1 else own
        group = self._group_size
        config = CreditConfig(cast(CreditKind, self.credit), cast(Any, self.args).gamma)
        credits: list[list[float]] = []
        num_stages = num_lone = 0
        for first in range(0, len(everyone), group):
            rewards, states, matched = zip(*everyone[first : first + group], strict=True)
            found = stage_credits(rewards, config, states=states, matched=matched)
            credits += found.credits
            num_stages, num_lone = num_stages + found.num_stages, num_lone + found.num_lone
        mode = "train" if cast(Any, self.model).training else "eval"
        self._metrics[mode]["env/lone_turns"].append(num_lone / max(1, num_stages))
        start = self.accelerator.process_index * len(own)
        stages_BT = find_turn_stages(mask_BT)
        for row, each in zip(stages_BT, self._trajectories, strict=True):  # the mask of a truncated row can be empty
            assert int(row.max()) + 1 in (0, len(each.turns)), "every turn is one run of sampled tokens"
        return spread_credits(credits[start : start + len(own)], stages_BT)

    def _match_gold(self, trajectory: Trajectory) -> list[float]:
        calls = [turn.calls for turn in trajectory.turns] or [()]
        if self.credit != "matched":
            return [0.0] * len(calls)
        if trajectory.gold_calls is None and trajectory.turns:
            problem = f"rest.credit is 'matched', but task {trajectory.task.get('id')!r} has no gold_calls()"
            raise UserError(
                problem, "sessions that know the calls which solve their task", "choose another rest.credit"
            )
        return match_calls_by_stage(calls, trajectory.gold_calls or [])
