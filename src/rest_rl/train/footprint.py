"""What a run will need before it starts: memory by process, work by step, and whether the device has room for it.

The parts that stay (weights, optimizer states, the cache of a sequence) are exact for the optimizers and models named
below. The parts that come and go (activations, the head's tiles, generation's work) are reckoned at the longest prompt
with the longest response, and follow what torch, transformers 5, accelerate 1 and TRL 1.16 do. On a CPU the sum is
within a tenth of the bytes that were counted, for small models in whole training steps and for Qwen3-1.7B to 14B and
Llama-3.2-3B in passes without storage (`benchmarks/footprint.py`). On a GPU nothing has been measured: allocator, NCCL,
vLLM and compiled kernels are flat allowances, FSDP and DeepSpeed are reckoned from their rules. So an estimate that
says a run does not fit is to be believed; one that leaves less than a tenth to spare is not.

Left out: mixtures of experts count as if every expert were active, linear attention as if it kept activations like full
attention, images not at all. `paged_` optimizers count as if they stayed on the device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rest_rl.config import RunConfig
from rest_rl.train.memory_shares import (
    Device,
    Phase,
    Setting,
    Sharding,
    Share,
    evaluation_shares,
    generation_shares,
    gib,
    remedies,
    state_shares,
    update_shares,
)
from rest_rl.train.model_size import ModelSize, model_size
from rest_rl.train.workload import (
    TRAINING_SHARE,
    Seconds,
    Workload,
    count_work,
    is_reinforcement,
    seconds_per_step,
    training_flop,
)


@dataclass(frozen=True)
class Footprint:
    """The estimate; memory is that of one process, on the device that trains."""

    size: ModelSize
    work: Workload
    shares: tuple[Share, ...]
    device: Device | None
    seconds: Seconds | None
    processes: int
    sharding: Sharding
    remedies: tuple[str, ...]
    """What to change when it does not fit, the first first."""

    def phase_bytes(self, phase: Phase) -> int:
        """What is held at the height of a phase: what is always there and what the phase adds."""
        return total_bytes([share for share in self.shares if share.phase in ("always", phase)])

    @property
    def total(self) -> int:
        """The larger of the two phases' heights."""
        return max(self.phase_bytes("update"), self.phase_bytes("generation"))

    @property
    def fits(self) -> bool | None:
        """Whether the device has room; None without a device."""
        return None if self.device is None else self.total <= self.device.bytes

    @property
    def verdict(self) -> str:
        """One sentence for the user."""
        if not self.work.steps:
            return (
                f"{self.work.lengths.prompts} prompts do not fill one batch of {self.work.prompts}: nothing would be "
                "trained; lower steps_per_generation or per_device_train_batch_size"
            )
        if self.device is None:
            return f"needs about {gib(self.total)} of memory; no GPU here to compare it with"
        spare = self.device.bytes - self.total
        where = f"{self.device.name} ({gib(self.device.bytes)})"
        if spare >= 0:
            close = "; that is close, a first step will tell" if spare < self.device.bytes / 10 else ""
            return f"fits {where} with {gib(spare)} to spare{close}"
        first = "; ".join(self.remedies[:2]) or "take a smaller model"
        return f"does not fit {where} by {gib(-spare)}; first change: {first}"


def estimate(
    config: RunConfig,
    model_config: Any,
    args: Any,
    *,
    lora: Any = None,
    prompt_tokens: Sequence[int] = (),
    processes: int | None = None,
    sharding: Sharding | None = None,
    device: Device | None = None,
) -> Footprint:
    """Estimate a run from its configuration; no weights are loaded and nothing is allocated.

    Args:
        config: the run; `[model]` and `[eval]` are read.
        model_config: the model's transformers configuration.
        args: the trainer's configuration, a `ResTConfig` / `GRPOConfig` or an `SFTConfig`.
        lora: the `peft.LoraConfig`, or None for full fine-tuning.
        prompt_tokens: token count of each training prompt; with an `SFTConfig` of prompt and demonstration together.
        processes: number of processes, by default that of `args`.
        sharding: how they share the model, by default as `args` and the launcher say.
        device: the GPU to compare with (`this_device()`); None on a CPU.
    """
    processes = processes or int(args.world_size)
    size = model_size(model_config, lora, trust_remote_code=config.model.trust_remote_code)
    work = count_work(args, prompt_tokens, processes)
    setting = Setting(
        model_config,
        args,
        size,
        work,
        device,
        processes,
        sharding or sharding_of(args),
        config.weights_dtype,
        config.model.load_in_4bit,
    )
    generation = [generation_shares(setting), evaluation_shares(setting, config)]  # one after the other
    shares = [*state_shares(setting), *update_shares(setting), *max(generation, key=total_bytes)]
    seconds = None if device is None else step_seconds(setting)
    return Footprint(
        size, work, tuple(shares), device, seconds, processes, setting.sharding, tuple(remedies(setting, shares))
    )


def total_bytes(shares: Sequence[Share]) -> int:
    """The sum of some shares."""
    return sum(share.bytes for share in shares)


def this_device() -> Device | None:
    """The GPU of this process, or None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(properties.name, properties.total_memory)


def sharding_of(args: Any) -> Sharding:
    """How the trainer's configuration, or `accelerate launch` in the environment, cuts up the model."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        return {1: "zero1", 2: "zero2", 3: "zero3"}.get(plugin.zero_stage, "none")  # pyright: ignore[reportReturnType]
    if getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp"
    return "none"


def step_seconds(of: Setting) -> Seconds | None:
    """Time of one optimizer step, its share of generating included; None for a GPU whose peak is not known."""
    assert of.device is not None
    training = training_flop(
        of.work,
        of.size.base,
        is_adapter=bool(of.size.adapter),
        checkpointing=of.args.gradient_checkpointing,
    )
    is_rl = is_reinforcement(of.args)
    generation = 2 * of.size.base * of.work.tokens_per_step * is_rl / of.work.uses
    return seconds_per_step(training, generation, of.device.name, of.processes, is_rl and of.args.use_vllm)


def footprint_rows(footprint: Footprint) -> list[tuple[str, str, str]]:
    """(quantity, value, how it was reckoned) of every line, the verdict last."""
    size, work = footprint.size, footprint.work
    phases = {"always": "", "update": " (update)", "generation": " (generation)"}
    kind = "the adapter's" if size.adapter else "all"
    rows = [
        ("parameters", f"{size.base:,}", "counted on the model without storage, tied weights once"),
        ("trained", f"{size.trained:,}", f"{kind}: {size.trained / size.base:.2%}"),
    ]
    rows += [(share.name + phases[share.phase], gib(share.bytes), share.how) for share in footprint.shares]
    for phase in ("update", "generation"):
        if any(share.phase == phase for share in footprint.shares):
            rows.append((f"height of the {phase}", gib(footprint.phase_bytes(phase)), "with what is always there"))
    shared = f"{footprint.processes} processes, {footprint.sharding}" if footprint.processes > 1 else "one process"
    rows.append(("memory of one device", gib(footprint.total), f"the larger of the two; {shared}"))
    return [*rows, *work_rows(work), *time_rows(footprint), ("verdict", verdict_word(footprint), footprint.verdict)]


def verdict_word(footprint: Footprint) -> str:
    """The verdict in a word."""
    if not footprint.work.steps:
        return "no step"
    return {None: "no GPU", True: "fits", False: "does not fit"}[footprint.fits]


def work_rows(work: Workload) -> list[tuple[str, str, str]]:
    """The rows of what there is to do."""
    lengths = work.lengths
    rows = [
        ("prompt tokens", f"{lengths.median:,} / {lengths.longest:,}", f"median and longest of {lengths.prompts:,}")
    ]
    if work.max_response:
        several = f"{1 / work.updates:g} such batches in one optimizer step"
        use = several if work.updates < 1 else f"learnt from in {work.updates:g} steps"
        rows.append(("responses at a time", f"{work.responses:,}", f"{work.prompts:,} prompts; {use}"))
    rows.append(("tokens a step", f"{work.tokens_per_step:,}", "at most: median prompts, longest responses"))
    return [*rows, ("steps", f"{work.steps:,}", "optimizer steps of the run")]


def time_rows(footprint: Footprint) -> list[tuple[str, str, str]]:
    """The row of the time of a step, or why there is none."""
    if footprint.device is None:
        return [("time a step", "-", "not estimated without a GPU")]
    if footprint.seconds is None:
        return [("time a step", "-", f"the peak of {footprint.device.name} is not known")]
    training, generation, share = footprint.seconds
    how = f"{training:.0f} s training at {TRAINING_SHARE:.0%} of the peak, {generation:.0f} s generating at {share:.0%}"
    return [("time a step", f"{training + generation:.0f} s", f"{how}, with responses of full length; a rough guide")]
