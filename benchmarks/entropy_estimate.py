"""Measure the error of the lagged moving average of region entropies against the exact mean of the step it weights.

The script trains on the tool world, records the exact global sums of every step, and replays them through
`EntropyTracker` at several decays. The estimate for step k >= 1 is the average over the steps before k. It prints two
errors per decay, weighted by token share: the RMS error of the entropy in nats, and the RMS of
log(weight from the estimate / weight from the exact means).

    python benchmarks/entropy_estimate.py --steps 60 --batch 64
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from rest_rl.config import EMBEDDED, ModelTable
from rest_rl.data.tool_world import tool_world
from rest_rl.presets import PRESETS
from rest_rl.response import Region
from rest_rl.train.policy import load_policy
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer
from rest_rl.train.weighing import COUNTS, ENTROPIES, EntropyTracker
from rest_rl.weights import WeightConfig, region_weights

DECAYS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


class StepSums(TrainerCallback):
    """Records the sums of every step; with a decay of 0 the tracker contains only the last step."""

    def __init__(self) -> None:
        self.trainer: ResTTrainer | None = None
        self.sums: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.sums.append(self.trainer.tracker.totals_3R.clone())


def record_sums(options: argparse.Namespace) -> list[Tensor]:
    model, tokenizer = load_policy(ModelTable(path=options.model))
    recorder = StepSums()
    with tempfile.TemporaryDirectory() as folder:
        args = ResTConfig(
            folder, preset=options.preset, entropy_decay=0.0, max_steps=options.steps, learning_rate=options.lr,
            per_device_train_batch_size=options.batch, num_generations=8, max_completion_length=128, seed=options.seed,
            lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
            activation_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        samples = tool_world(options.seed, options.steps * options.batch // 8 + 8)
        recorder.trainer = trainer = ResTTrainer(
            model, args=args, train_dataset=build_training_dataset(samples, tokenizer), processing_class=tokenizer,
            callbacks=[recorder],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(
        f"{options.steps} steps, batch {options.batch}, lr {options.lr}, reward {rewards[0]:.3f} -> {rewards[-1]:.3f}"
    )
    return recorder.sums


# Return (entropy RMS in nats, weight RMS in log, entropy RMS by region) of the estimate from step `first` on.
def estimate_errors(
    sums: Sequence[Tensor], decay: float, config: WeightConfig, first: int
) -> tuple[float, float, Tensor]:
    # Replay: at each step, compare the statistics of the steps before with the exact ones, then add the step.
    tracker, entropy_R, weight_R, counts_R = EntropyTracker(decay), torch.zeros(6), torch.zeros(6), torch.zeros(6)
    for step, exact_3R in enumerate(sums):
        estimate = tracker.statistics()
        if estimate is not None and step >= first:
            exact = EntropyTracker(0.0)
            exact.update(exact_3R, step)
            truth = exact.statistics()
            assert truth is not None
            seen_R = (exact_3R[COUNTS] > 0) & (estimate.counts_R > 0)
            gap_R = (estimate.entropies_R - truth.entropies_R).square()
            log_R = (region_weights(estimate, config) / region_weights(truth, config)).log().square()
            # Each region of a step counts by its share of tokens.
            shares_R = exact_3R[COUNTS] / exact_3R[COUNTS].sum()
            entropy_R += torch.where(seen_R, gap_R * shares_R, 0.0)
            weight_R += torch.where(seen_R, log_R * shares_R, 0.0)
            counts_R += torch.where(seen_R, shares_R, 0.0)
        tracker.update(exact_3R, step)
    total = counts_R.sum()
    by_region_R = (entropy_R / counts_R).sqrt()
    return math.sqrt(entropy_R.sum() / total), math.sqrt(weight_R.sum() / total), by_region_R


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="model folder (default: the embedded model)")
    parser.add_argument("--preset", default="rest")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sums = record_sums(options)
    config = PRESETS[options.preset].weights
    assert config is not None
    means = torch.stack([table[ENTROPIES] / table[COUNTS] for table in sums])
    for name, row in (("first step", means[0]), ("last step", means[-1])):
        print(f"{name}: " + "  ".join(f"{r.label} {v:.3f}" for r, v in zip(Region, row.tolist(), strict=True)))
    print("\n| decay | entropy RMS (nats) | weight RMS (log) | " + " | ".join(r.label for r in Region) + " |")
    print("|---|---|---|" + "---|" * len(Region))
    for decay in DECAYS:
        entropy, weight, by_region_R = estimate_errors(sums, decay, config, first=1)
        cells = " | ".join(f"{value:.4f}" for value in by_region_R.tolist())
        print(f"| {decay} | {entropy:.4f} | {weight:.4f} | {cells} |")
    # The yardstick: the error of equal weights, which need no estimate at all.
    flat = torch.zeros(6, dtype=torch.float64)
    for table in sums[1:]:
        exact = EntropyTracker(0.0)
        exact.update(table)
        shares_R = table[COUNTS] / table[COUNTS].sum()
        flat += region_weights(exact.statistics(), config).log().square() * shares_R
    print(f"\nequal weights instead: weight RMS (log) {math.sqrt(flat.sum() / (len(sums) - 1)):.4f}")


if __name__ == "__main__":
    main()
