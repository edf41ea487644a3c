"""Stock verl in the CPU test environment: what works here and fails with our trainer is our trainer's fault."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rest_rl.train.named_models import embedded_model_dir
from tests.verl_cpu.tiny import CPU_SETTINGS, hydra_overrides, logged_metrics, run_cpu, started

pytestmark = [
    pytest.mark.verl,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="needs verl: make test-verl"),
]
CITIES = ("lima", "oslo", "rome", "cairo", "tokyo", "paris", "delhi", "quito")


def length(data_source, solution_str, ground_truth, extra_info):
    """A reward for which the responses of a group differ."""
    return len(solution_str) / 100


def stock(folder: Path, ranks: int, steps: int) -> list[str]:
    """Arguments of a stock run: 4 prompts and 16 responses per step, in 2 optimizer steps."""
    prompts = folder / "prompts.parquet"
    rows = [{"prompt": [{"role": "user", "content": f"check weather {city}"}], **UNUSED} for city in CITIES]
    pq.write_table(pa.Table.from_pylist(rows), prompts)
    settings = {
        "actor_rollout_ref": {
            "model": {
                "external_lib": f"[rest_rl.train.verl.trl_shim,{__package__}.hf_rollout]",
                "path": str(embedded_model_dir()),
            },
            "actor": {"optim": {"lr": 1e-4}, "ppo_mini_batch_size": 2, "ppo_micro_batch_size_per_gpu": 4},
            "rollout": {"n": 4, "log_prob_micro_batch_size_per_gpu": 4},
        },
        "algorithm": {"adv_estimator": "grpo"},
        "data": {
            "train_files": str(prompts),
            "val_files": str(prompts),
            "train_batch_size": 4,
            "max_prompt_length": 32,
            "max_response_length": 32,
        },
        "reward": {"custom_reward_function": {"path": f"pkg://{__name__}", "name": length.__name__}},
        "trainer": {
            "default_local_dir": str(folder / "checkpoints"),
            "logger": ["file"],
            "n_gpus_per_node": ranks,
            "save_freq": 1,
            "total_training_steps": steps,
            "val_before_train": False,
        },
    }
    return ["-m", "verl.trainer.main_ppo", *hydra_overrides(CPU_SETTINGS), *hydra_overrides(settings)]


UNUSED = {"data_source": "cities", "reward_model": {"style": "rule", "ground_truth": ""}, "extra_info": {"index": 0}}
"""Columns that verl requires."""


def check(folder: Path, steps: list[int]) -> None:
    rows = logged_metrics(folder)
    assert [row["training/global_step"] for row in rows] == steps
    for row in rows:
        assert row["actor/grad_norm"] > 0
        # Rounding changes it by 5e-6, a replica that misses the update of one step by 0.15 (measured).
        assert row["training/rollout_probs_diff_max"] < 1e-4


def test_stock_verl_trains_on_one_rank(tmp_path):
    run_cpu(stock(tmp_path, ranks=1, steps=2), tmp_path)
    check(tmp_path, [1, 2])


def test_a_killed_run_on_two_ranks_resumes_from_its_checkpoint(tmp_path):
    arguments = stock(tmp_path, ranks=2, steps=3)
    saved = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    with started(arguments, tmp_path) as run:
        while not saved.exists():
            assert run.poll() is None, (tmp_path / "log.txt").read_text(encoding="utf-8")[-5000:]
            time.sleep(0.1)
    step = int(saved.read_text(encoding="utf-8"))
    run_cpu(arguments, tmp_path)
    check(tmp_path, list(range(step + 1, 4)))
