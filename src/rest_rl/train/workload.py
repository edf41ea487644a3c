"""How much there is to do in a training run: prompts, responses, tokens and steps, and on a known GPU the time.

The time is arithmetic over a stated share of the GPU's peak (Kaplan et al., arXiv 2001.08361, section 2.1: 2 FLOP per
parameter and token forward, 4 backward). It leaves out attention scores, loading and saving, and can be off by a
factor of two or three in either direction; without a known GPU none is given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

TRAINING_SHARE = 0.35
"""Of the peak that the forward and backward passes reach (ours: the order that dense models of this size report)."""
GENERATION_SHARE = {True: 0.15, False: 0.02}
"""Of the peak that generation reaches, with vLLM and with `model.generate` (ours, rough: it waits for memory)."""
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX 5090": 209,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense bfloat16 peak by a part of the device's name, from the vendor's data sheets; the first that fits counts."""


class Lengths(NamedTuple):
    """Token counts of prompts (for supervised training of prompts with their responses)."""

    prompts: int
    median: int
    longest: int


@dataclass(frozen=True)
class Workload:
    """A run in numbers; all counts are over all processes."""

    lengths: Lengths
    prompts: int
    """Different prompts in one batch of responses (in one step of supervised training)."""
    responses: int
    """Responses that are generated together, or demonstrations a step."""
    per_step: int
    """Responses or demonstrations that one optimizer step learns from."""
    uses: int
    """Optimizer steps that learn from the same response (TRL's num_iterations)."""
    steps: int
    """Optimizer steps of the whole run; 0 if the data do not fill one batch."""
    max_response: int
    """Tokens of a response at most; 0 in supervised training, where they are part of the lengths."""

    @property
    def width(self) -> int:
        """The longest sequence that is trained on."""
        return self.lengths.longest + self.max_response

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step at most: median prompts, every response as long as allowed."""
        return self.per_step * (self.lengths.median + self.max_response)

    @property
    def updates(self) -> float:
        """Optimizer steps that share one batch of responses; below 1 where a step needs several batches."""
        return self.responses * self.uses / self.per_step


def count_work(args: Any, prompt_tokens: Sequence[int], processes: int) -> Workload:
    """Count what the trainer's configuration (TRL's GRPOConfig or SFTConfig) makes of prompts of these lengths."""
    lengths = Lengths(len(prompt_tokens), int(statistics.median(prompt_tokens or [0])), max(prompt_tokens, default=0))
    per_update = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
    if not is_reinforcement(args):
        limit = args.max_length or lengths.longest
        lengths = Lengths(lengths.prompts, min(lengths.median, limit), min(lengths.longest, limit))
        per_epoch = math.ceil(lengths.prompts / per_update)
        return Workload(lengths, per_update, per_update, per_update, 1, steps_of(args, per_epoch), 0)
    responses = args.per_device_train_batch_size * processes * args.steps_per_generation
    prompts = responses // args.num_generations
    micro_batches = lengths.prompts // prompts * args.steps_per_generation * args.num_iterations
    steps = steps_of(args, math.ceil(micro_batches / args.gradient_accumulation_steps))
    longest = args.max_completion_length
    return Workload(lengths, prompts, responses, per_update, args.num_iterations, steps, longest)


def steps_of(args: Any, per_epoch: int) -> int:
    """Optimizer steps of the run: `max_steps` if set, else whole epochs."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def is_reinforcement(args: Any) -> bool:
    """Whether responses are generated, that is, whether this is a GRPOConfig."""
    return hasattr(args, "num_generations")


class Seconds(NamedTuple):
    """Time of one optimizer step, its share of the generation included."""

    training: float
    generation: float
    generation_share: float
    """Of the GPU's peak, that generation was taken to reach."""


def training_flop(work: Workload, parameters: int, *, is_adapter: bool, checkpointing: bool) -> float:
    """Of one optimizer step: 6 N T; 2 N T less where weights are frozen, 2 N T more where the forward is repeated."""
    return (6 - 2 * is_adapter + 2 * checkpointing) * parameters * work.tokens_per_step


def seconds_per_step(
    training: float, generation: float, device_name: str, processes: int, vllm: bool
) -> Seconds | None:
    """Times for these FLOP counts on `processes` of the named GPU; None if its peak is not known."""
    peak = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in device_name), None)
    if peak is None:
        return None
    flops = peak * 1e12 * processes
    share = GENERATION_SHARE[vllm]
    return Seconds(training / (flops * TRAINING_SHARE), generation / (flops * share), share)
