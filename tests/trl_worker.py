"""Runs that the tests start in separate processes: one that is killed, one on one or two processes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback

from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from tests.tiny_policy import (
    copy_parameters,
    logged_steps,
    scripted_completions,
    tiny_model,
    tiny_samples,
    tiny_settings,
    tiny_tokenizer,
)


class KillAfterThreeSteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(folder: str) -> None:
    tokenizer = tiny_tokenizer()
    trainer = ResTTrainer(
        tiny_model(tokenizer),
        args=ResTConfig(**tiny_settings(folder, max_steps=5, save_strategy="steps", save_steps=2)),
        train_dataset=build_training_dataset(tiny_samples(), tokenizer),
        processing_class=tokenizer,
        callbacks=[KillAfterThreeSteps()],
    )
    trainer.train()


def run_scripted(path: str, batch_size: str, rule: str) -> None:
    tokenizer = tiny_tokenizer()
    settings = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4, "max_grad_norm": 0.0, "weights": {"rule": rule}}
    trainer = ResTTrainer(
        tiny_model(tokenizer),
        args=ResTConfig(**tiny_settings(f"{path}.out", per_device_train_batch_size=int(batch_size), **settings)),
        train_dataset=build_training_dataset(tiny_samples(), tokenizer),
        processing_class=tokenizer,
        rollout_func=scripted_completions,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if trainer.accelerator.is_main_process:
        result = {
            "parameters": copy_parameters(trainer.accelerator.unwrap_model(trainer.model)),
            "history": logged_steps(trainer),
            "totals": trainer.tracker.totals_3R,
        }
        torch.save(result, path)
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # the destructors of gloo's process group sometimes abort or hang


def run_resampled(path: str) -> None:
    """On each process, write the samples of every batch of responses, the history and the final weights."""
    from tests.test_resample import make_trainer

    trainer = make_trainer(
        tiny_tokenizer(), Path(path).parent / f"out{os.environ['RANK']}", 12, 40, per_device_train_batch_size=8
    )
    ids: list[list[str]] = []
    calls: list[str] = []
    plain = trainer.reward_funcs[0]

    def noted(**columns):
        calls.extend(columns["id"])
        return plain(**columns)

    def keep(indices_B):
        ids.append([calls[index] for index in indices_B])
        calls.clear()

    trainer.reward_funcs[0], trainer.on_generated = noted, keep
    trainer.train()
    rank = trainer.accelerator.process_index
    parameters = copy_parameters(trainer.accelerator.unwrap_model(trainer.model))
    torch.save({"ids": ids, "history": logged_steps(trainer), "parameters": parameters}, f"{path}{rank}.pt")
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # see `run_scripted`


if __name__ == "__main__":
    runs = {"killed": run_until_killed, "scripted": run_scripted, "resampled": run_resampled}
    runs[sys.argv[1]](*sys.argv[2:])
