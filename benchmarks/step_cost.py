"""Measure the cost of a ResT step relative to a GRPO step in CPU seconds, alternating both in one run.

The two steps of a pair have the same prompts, the same random state and, at learning rate 0, the same policy. They
therefore sample and score the same responses. Which step comes first alternates as well.

python benchmarks/step_cost.py --pairs 12 --batch 64
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from rest_rl.config import EMBEDDED, ModelTable
from rest_rl.data.tool_world import tool_world
from rest_rl.train.policy import load_policy
from rest_rl.train.prompts import build_training_dataset
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer


def is_grpo_step(step: int) -> bool:
    return step % 4 in (0, 3)  # GRPO, ResT, ResT, GRPO: each method is first in every other pair


class AlternatingTrainer(ResTTrainer):
    """Uses stock GRPO in one step of a pair and ResT in the other, with the same reward."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss_of = GRPOTrainer if is_grpo_step(self.state.global_step) else ResTTrainer
        return loss_of.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def _weight_advantages(self, *args: Any) -> Any:
        start = time.process_time()
        weights_BT = super()._weight_advantages(*args)
        self.weighing.append(time.process_time() - start)
        return weights_BT

    weighing: list[float] = []  # noqa: RUF012


class StepTimer(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Both steps of a pair sample the same responses.
        torch.manual_seed(state.global_step // 2)
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(time.process_time() - self.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="model folder (default: the embedded model)")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_policy(ModelTable(path=options.model))
    clock = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        args = ResTConfig(
            folder, max_steps=2 * options.pairs + 2, per_device_train_batch_size=options.batch, num_generations=8,
            learning_rate=0.0, max_completion_length=128, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
            logging_steps=1, activation_checkpointing=False, disable_tqdm=True, shuffle_dataset=False,
        )  # fmt: skip
        size = options.batch // 8
        drawn = tool_world(0, (options.pairs + 1) * size)
        samples = [s for pair in range(options.pairs + 1) for s in drawn[pair * size : (pair + 1) * size] * 2]
        trainer = AlternatingTrainer(
            model, args=args, train_dataset=build_training_dataset(samples, tokenizer), processing_class=tokenizer,
            callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # The first pair warms up and is dropped.
    stock = [seconds for step, seconds in enumerate(clock.steps) if is_grpo_step(step)][1:]
    ours, weighing = (
        [seconds for step, seconds in enumerate(clock.steps) if not is_grpo_step(step)][1:],
        trainer.weighing[1:],
    )
    ratios = [b / a for a, b in zip(stock, ours, strict=True)]
    print(f"{options.pairs} pairs of steps, {options.batch} responses each, {options.threads} thread(s), CPU seconds\n")
    print("| GRPO step | ResT step | ratio of medians | median of paired ratios | weighting | weighting / GRPO step |")
    print("|---|---|---|---|---|---|")
    a, b, w = map(statistics.median, (stock, ours, weighing))
    print(f"| {a:.3f} | {b:.3f} | {b / a:.3f} | {statistics.median(ratios):.3f} | {w:.4f} | {w / a:.2%} |")


if __name__ == "__main__":
    main()
