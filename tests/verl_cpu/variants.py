"""Runs that the command does not offer: a run file on verl's own trainer, or on ours with its batches recorded.

python -m tests.verl_cpu.variants stock RUN.toml
python -m tests.verl_cpu.variants recording RUN.toml
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transfer_queue as tq
from verl.trainer.ppo.v1 import register_trainer

from rest_rl.config import read_run_file
from rest_rl.runlog import SILENT, RunLog
from rest_rl.train.checkpoints import Checkpoint
from rest_rl.train.prompts import read_data
from rest_rl.train.run import resolve_layout
from rest_rl.train.verl.engine import VerlEngine, run_on_ray
from rest_rl.train.verl.plugin import ReSTPPOTrainer, to_list
from rest_rl.train.verl.responses import PER_TOKEN

# Trainer and advantage estimator of each variant.
MODES = {"stock": ("sync", "grpo"), "recording": ("recording", "rest_group")}


@register_trainer("recording")
class RecordingTrainer(ReSTPPOTrainer):
    """Our trainer, which records every batch and its weighted advantages."""

    def _compute_advantage(self, batch, metrics):
        batch = super()._compute_advantage(batch, metrics)
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        data = tq.kv_batch_get(**where, select_fields=[*PER_TOKEN, "prompts", "rm_scores", "uid", "extra_info"])
        tensors = {name: data[name].to_padded_tensor(0) for name in (*PER_TOKEN, "rm_scores")}
        tensors["prompts"] = [row.tolist() for row in data["prompts"].unbind()]
        lists = {name: to_list(data[name]) for name in ("uid", "extra_info")}
        torch.save({**tensors, **lists}, Path(self.config.rest.folder) / f"batch-{self.global_steps}.pt")
        return batch


def main(variant: str, path: str) -> None:
    config, layout = resolve_layout(read_run_file(path), SILENT)
    engine = VerlEngine(config, layout, SILENT)
    log = RunLog(Path(config.run.out).absolute())
    engine.prepare(read_data(config, layout), log, Checkpoint(0))
    engine.start(RunLog.create(log.folder, config.to_toml(), sys.argv))
    verl = engine.verl
    verl.trainer.v1.trainer_mode, verl.algorithm.adv_estimator = MODES[variant]
    run_on_ray(verl, plugin=__spec__.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
