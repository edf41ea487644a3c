"""ResT as an extension of unmodified verl; the driver process and verl's workers import this module.

`ReSTPPOTrainer` multiplies verl's advantages by the token weights, which scales the clipped surrogate of each token by
its weight. This happens in the driver, once per generation batch, and does not depend on the backends for training and
sampling. As in verl, a step is one generation batch, which may have several optimizer steps. `ReSTRewardManager`
computes the rewards. `RenderedPromptLoop` samples from prompts that this package has rendered.

Shapes: B responses, T completion tokens.
"""

# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# verl is installed in a separate environment.
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer.ppo.core_algos import register_adv_est
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from rest_rl.config import RunConfig
from rest_rl.evaluate.generate import has_ended
from rest_rl.formats import get_format
from rest_rl.regions import decode_ids
from rest_rl.runlog import RunLog, replace_file
from rest_rl.statistics import Outcome, summarize
from rest_rl.train.reward import SCORE_METRICS, parse_gold, score_response
from rest_rl.train.verl.responses import (
    DATA_STATE_FILE,
    ESTIMATOR,
    FAILED_METRIC,
    PER_TOKEN,
    STATISTICS_FILE,
    TRAINER,
    Responses,
    compute_group_advantages,
    make_metrics_row,
    make_timing_row,
    parse_run,
    weight_batch,
    write_outcomes,
)
from rest_rl.train.weighing import TokenWeighter

# Fields of a response in verl's TransferQueue that are read in addition to the token fields.
PER_RESPONSE = ("uid", "rm_scores", "reward_model", "extra_info", "extra_fields", "raw_prompt")


def progress_of_step(step: int, total: int) -> float:
    """Return training progress nu in [0, 1] at a step of verl, counted from 1: 0 in the first step, 1 in the last."""
    return min(1.0, max(0, step - 1) / max(1, total - 1))


@register_adv_est(ESTIMATOR)
def group_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Return TRL's group advantages, (B, T) and 0 where masked, and the same tensor again as verl's `returns`.

    (R - mean) / (std + 1e-4), or R - mean without `algorithm.norm_adv_by_std_in_grpo`; verl's `grpo` adds 1e-6 instead.
    """
    kind = "grpo" if config is None or config.get("norm_adv_by_std_in_grpo", True) else "dr_grpo"
    advantages_B = compute_group_advantages(token_level_rewards.sum(-1), list(index), kind)
    advantages_BT = advantages_B[:, None] * response_mask
    return advantages_BT, advantages_BT


@register_trainer(TRAINER)
class ReSTPPOTrainer(PPOTrainerSync):
    """verl's synchronous trainer with advantages weighted by region; weights of 1 leave the advantages unchanged."""

    def __init__(self, config: Any) -> None:
        config.trainer.v1.trainer_mode = "sync"  # verl's base class requires its own name
        super().__init__(config)
        self.run, self.method, self.format, self.tracker = parse_run(config.rest.run)
        self.log = RunLog(config.rest.folder)

    # First hook. `super()` has computed the advantages in the driver's TransferQueue, before any optimizer step on the
    # batch; they are read, weighted and written back. Everything after that (dispatch, clipping, aggregation) is
    # verl's.
    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        data = tq.kv_batch_get(**where, select_fields=list(PER_TOKEN))
        responses = self._read_responses(batch, data["responses"])
        chosen = responses.select_first(self.run.recorded_responses)
        watched = [responses.indices[i] for i in chosen]
        weighter = TokenWeighter(self.tokenizer, self.format, self.method.weights)
        step, progress = self.global_steps, progress_of_step(self.global_steps, self.total_training_steps)
        kind = self.method.advantage
        advantages, figures, tokens = weight_batch(data, weighter, self.tracker, progress, step, watched, kind)
        requested = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
        metrics |= figures | responses.compute_metrics() | {FAILED_METRIC: requested - len(responses.indices)}
        self.log.add_responses(responses.make_rows(chosen, tokens, step, progress))
        return tq.kv_batch_put(**where, fields=TensorDict({"advantages": advantages}, batch_size=len(batch.keys)))

    def _read_responses(self, batch: Any, ids: Tensor) -> Responses:
        places = [place for place, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
        fields = {"keys": [batch.keys[place] for place in places], "partition_id": batch.partition_id}
        data = tq.kv_batch_get(**fields, select_fields=list(PER_RESPONSE))
        columns = {name: to_list(data[name]) for name in PER_RESPONSE if name != "rm_scores"}
        rows = ids.unbind()
        return Responses(
            indices=places,
            ids=[rows[place] for place in places],
            rewards_B=torch.stack([scores.sum() for scores in data["rm_scores"].unbind()]),
            groups=columns["uid"],
            golds=[row["ground_truth"] for row in columns["reward_model"]],
            origins=columns["extra_info"],
            scores=[row["reward_extra_info"] for row in columns["extra_fields"]],
            prompts=[row[-1]["content"] for row in columns["raw_prompt"]],
            tokenizer=self.tokenizer,
            tool_format=self.format,
            ends=frozenset(self.config.rest.ends),
        )

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """Run one step and write its metrics to the run folder, before verl saves a checkpoint of the step."""
        batch = super().step(metrics, timing_raw)
        metrics = {**metrics, "epoch": self.global_steps / self.steps_per_epoch}
        self.log.add_metrics(make_metrics_row(self.global_steps, metrics))
        return batch

    def _compute_metrics(self, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        self.log.add_timing(make_timing_row(self.global_steps, metrics))

    # Second hook: verl calls it after each evaluation, before, during and after training.
    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, reward_extra_infos_dict: Any, *args: Any, **kwargs: Any
    ) -> dict[str, float]:
        prompts = {uid: place for place, uid in enumerate(dict.fromkeys(sample_uids))}
        columns = (reward_extra_infos_dict[name] for name in ("kind", "exact_match", "accuracy", "format", "turn"))
        rows = zip(data_sources, sample_uids, *columns, strict=True)
        outcomes = [
            Outcome(kind, str(split), prompts[uid], *scores) for split, uid, kind, *scores in rows if kind is not None
        ]
        write_outcomes(self.log, self.global_steps, self.total_training_steps, summarize(outcomes))
        return super()._val_metrics_update(data_sources, sample_uids, reward_extra_infos_dict, *args, **kwargs)

    # The region statistics must be in the checkpoint before verl writes DATA_STATE_FILE, which marks it as complete.
    def _save_checkpoint(self) -> None:
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DATA_STATE_FILE).unlink(missing_ok=True)  # of a run that was killed here before
        replace_file(folder / STATISTICS_FILE, json.dumps(self.tracker.table))
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            folder = Path(self.config.trainer.resume_from_path)
            self.tracker.table = json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8"))


# tensordict returns a column of lists as a list, and other columns as a stack.
def to_list(column: Any) -> list[Any]:
    return list(column) if isinstance(column, list) else column.tolist()


class ReSTRewardManager(RewardManagerBase):
    """Scores each response with the preset's rule reward at the training progress of the response's step."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, *_: Any, **__: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        rest = RunConfig.from_toml(config.rest.run).rest
        self.format, self.method, self.ends = get_format(rest.format), rest.resolve(), frozenset(config.rest.ends)
        self.total = int(config.actor_rollout_ref.actor.optim.total_training_steps)  # verl has computed it by now

    async def run_single(self, data: Any) -> dict[str, Any]:
        return await self.loop.run_in_executor(None, self._score, data[-1:][0])

    def _score(self, item: Any) -> dict[str, Any]:
        columns, ids = item.non_tensor_batch, item.batch["responses"]
        length = int(item.batch["attention_mask"][-len(ids) :].sum())
        ids = ids[:length].tolist()
        text, is_cut = decode_ids(ids, self.tokenizer, self.format.tags), not has_ended(ids, self.ends)
        step = int(columns["global_steps"])
        gold = parse_gold(columns["reward_model"]["ground_truth"])
        progress = progress_of_step(step, self.total)
        scored = score_response(text, gold, self.format, self.method.reward, progress, max(1, step), truncated=is_cut)
        extra = {name: getattr(scored, name) for name in SCORE_METRICS}
        kind = {"kind": columns["extra_info"]["kind"], "turn": gold.turn}
        return {"reward_score": scored.total, "reward_extra_info": {**extra, **kind}}


class RenderedPromptLoop(SingleTurnAgentLoop):
    """Samples a response to a prompt that is already rendered, without applying a chat template."""

    async def ct_build_initial_tokens(self, messages: list[dict[str, Any]], *_: Any, **__: Any) -> list[int]:
        return self.tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
