"""Compare a whole training step with shared prompts with TRL's own step: time in one process, and peak memory.

Both trainers start from the same weights and get the same prompts, the same reward and responses of the same length:
each generates G x n responses of exactly T tokens to n prompts of P tokens, scores them and makes one optimizer step.
They alternate, and each pair gives a ratio. Peak memory is that of a process of its own per trainer (on a GPU, of the
allocator), above what the process held before the step.

python benchmarks/shared_prompts.py --model smollm2 --prompt-tokens 300 650
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rest_rl.config import ModelTable
from rest_rl.train.policy import load_policy, silence_transformers
from rest_rl.train.trl.trainer import ResTConfig, ResTTrainer

KINDS = ("TRL", "shared")


class StepClock(TrainerCallback):
    """CPU seconds of the last step; seconds on the clock on a GPU."""

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = self.now() - self.start


def reward_by_position(completions: list[Any], **columns: Any) -> list[float]:
    """Return rewards that differ within every group, whatever was generated."""
    return [float(index % 2) for index in range(len(completions))]


def make_trainer(kind: str, options: argparse.Namespace, prompt_tokens: int) -> tuple[Any, StepClock]:
    silence_transformers()
    model, tokenizer = load_policy(ModelTable(path=options.model))
    prompts = [f"{index}" + " word" * (prompt_tokens - 1) for index in range(options.prompts)]
    rows, on_gpu = options.prompts * options.group, torch.cuda.is_available()
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 1,
        "per_device_train_batch_size": options.group,
        "gradient_accumulation_steps": rows // options.group,
        "num_generations": options.group,
        "max_completion_length": options.response_tokens,
        "generation_kwargs": {"min_new_tokens": options.response_tokens},
        "bf16": options.dtype == "bf16",
        "use_cpu": not on_gpu,
        "learning_rate": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": options.checkpointing,
    }
    clock = StepClock()
    own: dict[str, Any] = {"loss_type": "grpo"} if kind == "TRL" else {"preset": "grpo"}
    trainer = (GRPOTrainer if kind == "TRL" else ResTTrainer)(
        model,
        reward_funcs=reward_by_position,
        args=(GRPOConfig if kind == "TRL" else ResTConfig)(**settings, **own),
        train_dataset=Dataset.from_dict({"prompt": prompts, "gold": prompts}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # The resident peak of this process. `ru_maxrss` would include that of the parent before the fork.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measure_memory(kind: str, options: argparse.Namespace, prompt_tokens: int, queue: Any) -> None:
    torch.set_num_threads(options.threads)
    trainer, _ = make_trainer(kind, options, prompt_tokens)
    before = peak_bytes()
    trainer.train()
    queue.put((peak_bytes(), before))


def measure(options: argparse.Namespace, prompt_tokens: int) -> None:
    peaks, context = {}, multiprocessing.get_context("spawn")
    for kind in KINDS if options.memory else ():
        queue = context.Queue()
        child = context.Process(target=measure_memory, args=(kind, options, prompt_tokens, queue))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"the process of the {kind} step ended with status {child.exitcode} (-9: out of memory)")
        peaks[kind] = queue.get()
    trainers = {kind: make_trainer(kind, options, prompt_tokens) for kind in KINDS}
    assert trainers["shared"][0].not_shared is None
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for pair in range(options.pairs):
        for kind in KINDS if pair % 2 == 0 else KINDS[::-1]:
            trainer, clock = trainers[kind]
            torch.manual_seed(pair)
            trainer.train()
            seconds[kind].append(clock.seconds)
    ratios = [a / b for a, b in zip(seconds["TRL"], seconds["shared"], strict=True)]
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}" if len(ratios) > 1 else "one pair"
    figures = [f"{statistics.median(seconds[kind]):.1f}" for kind in KINDS]
    figures.append(f"{statistics.median(ratios):.2f} ({spread})")
    if peaks:
        figures += [f"{peaks[kind][0] / 1e9:.2f}" for kind in KINDS]
        figures.append(f"{peaks['TRL'][0] / peaks['shared'][0]:.2f}")
    size = f"{options.prompts} x {options.group}, P = {prompt_tokens}, T = {options.response_tokens}, {options.dtype}"
    print(f"| {size} | " + " | ".join(figures) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="model folder or name (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[300, 650])
    parser.add_argument("--response-tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=1, help="prompts per step (default: %(default)s)")
    parser.add_argument("--group", type=int, default=8, help="responses per prompt (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="autocast (default: %(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    unit = "seconds" if torch.cuda.is_available() else "CPU seconds"
    print(f"{options.model}, torch {torch.__version__}, {options.threads} thread(s), {options.pairs} pairs of steps\n")
    print(f"| step | TRL, {unit} | shared | ratio (range) | TRL, peak GB | shared | ratio |")
    print("|---|---|---|---|---|---|---|")
    for prompt_tokens in options.prompt_tokens:
        measure(options, prompt_tokens)


if __name__ == "__main__":
    main()
