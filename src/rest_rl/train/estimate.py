"""What a run needs before it starts: memory of one process by part, work by step, and whether the device has room.

Three kinds of numbers, marked as such. *Exact*: what shapes and settings fix (weights, gradients, optimizer states, the
cache of keys and values). *Bound*: activations, one generous line each for update and prompts, and a flat allowance.
*Measured*: on a GPU, the peak memory of one forward and backward pass over the longest prompt with the longest
response, which takes the place of the bound. Left out: images, fragmentation. Mixtures of experts count as if every
expert were active, `paged_` optimizers as if they stayed on the device.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import psutil
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rest_rl.config import EMBEDDED, RunConfig
from rest_rl.errors import UserError

GIB = 2**30
Sharding = Literal["none", "zero1", "zero2", "zero3", "fsdp"]
Phase = Literal["always", "update", "generation"]
SHARDING_LEVELS = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}
"""How much is cut up over processes: from 1 on optimizer states, from 2 on gradients, from 3 on weights."""
FUSED_HEAD_TILE = 4096, 32768
"""TRL's fused head projects this many positions onto this much of the vocabulary at a time."""
DEVICE_ALLOWANCE = {True: int(1.5 * GIB), False: GIB // 4}
"""For a GPU's context and libraries, and for what the libraries take on a CPU besides what is loaded (ours)."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit weight of bitsandbytes: half a byte, a scale of 8 bits for 64, a float32 for 256 scales."""
OPTIMIZER_BYTES: dict[str, float] = {
    "adamw_torch_8bit": 2, "adamw_torch_4bit": 1, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8, "ademamix": 12, "ademamix_8bit": 3, "paged_ademamix_8bit": 3, "lion_8bit": 1,
    "paged_lion_8bit": 1, "lion_32bit": 4, "paged_lion_32bit": 4, "rmsprop_bnb_8bit": 1,
}  # fmt: skip
OPTIMIZER_COPIES: dict[str, float] = {"sgd": 0, "adafactor": 0.01, "adagrad": 1, "rmsprop": 1}
"""Optimizer states of a trained parameter, in bytes or as copies of it; others count as AdamW with two copies."""


class Device(NamedTuple):
    """What trains: its name and the bytes it has; of a machine that trains on its CPU, those that are available."""

    name: str
    bytes: int
    is_gpu: bool = True


class ParameterCounts(NamedTuple):
    """Numbers of parameters; `trained` are the adapter's if there is one; `linear` are what 4-bit loading shrinks."""

    base: int
    trained: int
    linear: int


class Workload(NamedTuple):
    """A run in numbers, over all processes; supervised prompts are counted with their responses."""

    samples: int
    median_tokens: int  # tokens, as are the next two
    longest_tokens: int
    max_response: int
    prompts: int  # in one batch of responses, as is the next
    responses: int
    per_step: int  # responses in one optimizer step
    steps: int


class MemoryPart(NamedTuple):
    """A part of the memory of one process: when it is held, its size, and how that is known."""

    name: str
    phase: Phase
    bytes: int
    how: str


@dataclass(frozen=True)
class Estimate:
    """Memory and work of a run; memory is that of one process, on the device that trains."""

    size: ParameterCounts
    work: Workload
    parts: tuple[MemoryPart, ...]
    device: Device | None

    def phase_bytes(self, phase: Phase) -> int:
        """What is held at the height of a phase, with what is always there."""
        return sum(part.bytes for part in self.parts if part.phase in ("always", phase))

    @property
    def total(self) -> int:
        """The larger of the two phases' heights."""
        return max(self.phase_bytes("update"), self.phase_bytes("generation"))

    @property
    def fits(self) -> bool | None:
        """Whether the device has room; None without a device."""
        return None if self.device is None else self.total <= self.device.bytes


def estimate_resources(
    config: RunConfig,
    model_config: Any,
    args: Any,
    *,
    lora: Any = None,
    prompt_tokens: Sequence[int] = (),
    samples: int | None = None,
    processes: int | None = None,
    sharding: Sharding | None = None,
    device: Device | None = None,
    measure: bool = False,
) -> Estimate:
    """Estimate a run from `[model]`, `[data]` and `[eval]` and its trainer's configuration; loads no weights.

    Args:
        config: the run.
        model_config: the model's transformers configuration.
        args: a `ResTConfig` / `GRPOConfig`, or an `SFTConfig`.
        lora: the `peft.LoraConfig`, or None for full fine-tuning.
        prompt_tokens: tokens of each training prompt, with an `SFTConfig` of prompt and demonstration together.
        samples: the number of training prompts where `prompt_tokens` are of some of them only.
        processes: by default as `args` says.
        sharding: how processes share the model, by default as `args` and the launcher say.
        device: what to compare with (`find_device(args)`), if anything.
        measure: pass random weights through the GPU of this process, where the model is neither cut up nor 4-bit.
    """
    if not hasattr(text := model_config.get_text_config(), "num_attention_heads"):
        expected = "an architecture with attention"
        raise UserError(f"an estimate of {text.model_type}", expected, "try two steps: --set trl.max_steps=2")
    processes, sharding = processes or int(args.world_size), sharding or find_sharding(args)
    size = count_parameters(model_config, lora, trust_remote_code=config.model.trust_remote_code)
    work = count_work(args, prompt_tokens, processes, samples)
    model = _MemoryModel(config, model_config, args, lora, size, work, processes, sharding, device)
    can_measure = measure and device and device.is_gpu and sharding == "none" and not config.model.load_in_4bit
    moving = model.measure_activations() if can_measure else model.activation_bound()
    return Estimate(size, work, (*model.states(), moving, *model.generation()), device)


def find_device(args: Any) -> Device | None:
    """The GPU of this process, or the memory of this machine where it trains on its CPU; None for another machine."""
    if args.use_cpu and not getattr(args, "use_vllm", False):
        limit = Path("/sys/fs/cgroup/memory.max")  # of a container
        text = limit.read_text().strip() if limit.exists() else ""
        available = psutil.virtual_memory().available
        size = min(available, int(text)) if text.isdigit() else available
        return Device("this machine's available memory", size, is_gpu=False)
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(properties.name, properties.total_memory)


def find_sharding(args: Any) -> Sharding:
    """How the trainer's configuration, or `accelerate launch` in the environment, cuts up the model."""
    if (plugin := getattr(args, "deepspeed_plugin", None)) is not None:
        return {1: "zero1", 2: "zero2", 3: "zero3"}.get(plugin.zero_stage, "none")  # pyright: ignore[reportReturnType]
    is_fsdp = getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return "fsdp" if is_fsdp else "none"


def count_parameters(model_config: Any, lora: Any = None, *, trust_remote_code: bool = False) -> ParameterCounts:
    """Count on the model itself, built without storage: exact, tied weights once, adapters included."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), trust_remote_code=trust_remote_code)
    head, base = model.get_output_embeddings(), sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    trained = sum(p.numel() for p in add_lora(model, lora).parameters() if p.requires_grad)
    return ParameterCounts(base, trained, linear)


def add_lora(model: Any, lora: Any) -> Any:
    """The model with its adapter, if there is one."""
    if lora is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, copy.deepcopy(lora))


def is_reinforcement(args: Any) -> bool:
    """Whether responses are generated, that is, whether this is a GRPOConfig."""
    return hasattr(args, "num_generations")


def count_work(args: Any, prompt_tokens: Sequence[int], processes: int = 1, samples: int | None = None) -> Workload:
    """What the trainer's configuration (TRL's GRPOConfig or SFTConfig) makes of prompts of these lengths."""
    samples, longest = samples or len(prompt_tokens), max(prompt_tokens, default=0)
    median = int(statistics.median(prompt_tokens or [0]))
    together = args.per_device_train_batch_size * processes
    per_step = together * args.gradient_accumulation_steps
    if is_reinforcement(args):
        responses = together * args.steps_per_generation
        prompts, response = responses // args.num_generations, args.max_completion_length
        micro_batches = samples // prompts * args.steps_per_generation * args.num_iterations
        per_epoch = math.ceil(micro_batches / args.gradient_accumulation_steps)
    else:
        limit = args.max_length or longest
        median, longest = min(median, limit), min(longest, limit)
        responses, prompts, response, per_epoch = per_step, per_step, 0, math.ceil(samples / per_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Workload(samples, median, longest, response, prompts, responses, per_step, steps)


@dataclass
class _MemoryModel:
    """The model in one process of the run: bytes of its numbers, and the parts of memory that follow."""

    config: RunConfig
    model_config: Any
    args: Any
    lora: Any
    size: ParameterCounts
    work: Workload
    processes: int
    sharding: Sharding
    device: Device | None

    def __post_init__(self) -> None:
        args, text = self.args, self.model_config.get_text_config()
        self.text, self.sharding_level, self.is_gpu = (
            text,
            SHARDING_LEVELS[self.sharding],
            bool(self.device and self.device.is_gpu),
        )
        self.micro_batch = args.per_device_train_batch_size, self.work.longest_tokens + self.work.max_response
        kept = "with checkpointing" if args.gradient_checkpointing else "no checkpointing"
        self.shape = f"{self.micro_batch[0]} x {self.micro_batch[1]:,} tokens, longest prompt and response, {kept}"
        loaded, self.is_mixed = 4 if self.config.weights_dtype == "float32" else 2, bool(args.bf16 or args.fp16)
        # DeepSpeed trains in 16 bits and keeps 32-bit weights with the optimizer; accelerate makes FSDP's float32.
        self.is_deepspeed = self.is_mixed and self.sharding.startswith("zero")
        is_fsdp = self.is_mixed and self.sharding == "fsdp"
        self.trained = 4 if self.lora or is_fsdp else 2 if self.is_deepspeed else loaded
        self.weight = loaded if self.lora else self.trained
        self.compute = 2 if self.is_mixed else loaded  # bytes of a product's input
        self.stream = 2 if self.is_mixed and self.sharding_level else loaded  # bytes of a value between layers
        # Bounds of what autograd keeps of a layer: for each token (gated feed-forward layers), and for each pair of
        # tokens (the mask of padded rows in the type of the products; the eager kind's scores). `mask` is kept once.
        kind, heads = self.config.model.attn_implementation, text.num_attention_heads
        self.layer = self.compute * (14 * text.hidden_size + 4 * heads * head_dim(text) + 4 * feed_forward_width(text))
        self.mask, self.pair = (0, 0) if "flash" in kind else (1, self.compute)
        self.pair += (2 * self.compute + 4) * heads if kind == "eager" else 0

    def states(self) -> list[MemoryPart]:
        """What settings fix: weights, optimizer states, gradients, a reference model."""
        size = self.size
        cut = [self.processes if self.sharding_level >= least else 1 for least in range(4)]
        weights, how = size.base * self.weight, f"{size.base:,} parameters of {self.weight} bytes"
        if self.config.model.load_in_4bit:
            weights = int(size.linear * NF4_BYTES) + (size.base - size.linear) * self.weight
            how = f"{size.linear:,} parameters of 4 bits with their scales, {size.base - size.linear:,} of 16"
        weights = (weights + (4 * size.trained if self.lora else 0)) // cut[3]
        name = str(getattr(self.args.optim, "value", self.args.optim))
        copies = OPTIMIZER_COPIES.get(name, 2) * (4 if self.is_deepspeed else self.trained)
        each: float = OPTIMIZER_BYTES.get(name, copies) + 4 * self.is_deepspeed
        states, of_each = int(size.trained * each / cut[1]), "bytes for each trained parameter"
        parts = [
            MemoryPart("weights", "always", weights, f"exact: {how}"),
            MemoryPart("optimizer states", "always", states, f"exact: {name}, {each:g} {of_each}"),
            MemoryPart(
                "gradients", "update", size.trained * self.trained // cut[2], f"exact: {self.trained} {of_each}"
            ),
        ]
        if is_reinforcement(self.args) and self.args.beta and not self.lora:
            parts.append(
                MemoryPart("reference model", "always", weights, "exact: a second model, because beta is not 0")
            )
        if self.device:
            allowance = DEVICE_ALLOWANCE[self.is_gpu]
            parts.append(MemoryPart("context", "always", allowance, "bound: a flat allowance for device and libraries"))
        return parts

    def activation_bound(self) -> MemoryPart:
        """What forward and backward pass hold besides weights and gradients.

        The inputs of all layers, and what is kept of all of them, or with checkpointing of one; half a layer more for
        the backward pass. Then TRL's tile of the logits, the head's gradient, and autocast's 16-bit copies of weights.
        """
        text, (rows, length) = self.text, self.micro_batch
        held = 1 if self.args.gradient_checkpointing else text.num_hidden_layers
        inputs = text.num_hidden_layers * text.hidden_size * self.stream
        token = self.layer * (2 * held + 1) // 2 + inputs + 8 * text.hidden_size
        # a buffer of one tile, and without a GPU's kernel eight more of the tile's logits in float32
        positions, vocabulary = FUSED_HEAD_TILE
        tile = 4 * vocabulary + (0 if self.is_gpu else 32 * min(text.vocab_size, vocabulary))
        fixed = min(rows * length, positions) * tile + (0 if self.lora else 4 * text.vocab_size * text.hidden_size)
        fixed += 2 * self.size.linear if self.stream > self.compute else 0
        total = rows * (length * token + length**2 * (self.mask + self.pair * held)) + fixed
        return MemoryPart("activations", "update", total, f"bound: {self.shape}")

    def measure_activations(self) -> MemoryPart:
        """Peak memory of a forward and backward pass besides weights and gradients, or all if it needs more."""
        device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.reset_peak_memory_stats(device)
        try:
            held, seconds = self.run_micro_step(device)
            extra, how = torch.cuda.max_memory_allocated(device) - held, f"a forward and backward pass, {seconds:.2f} s"
        except torch.cuda.OutOfMemoryError:
            total = torch.cuda.get_device_properties(device).total_memory
            extra, how = total, "a forward and backward pass ran out of memory"
        torch.cuda.empty_cache()
        return MemoryPart("activations", "update", extra, f"measured: {how}; {self.shape}")

    def run_micro_step(self, device: torch.device) -> tuple[int, float]:
        """(bytes of weights and gradients, seconds) of one pass of the model with random weights through TRL's head."""
        args, dtype = self.args, getattr(torch, self.config.weights_dtype)
        with device:
            model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(self.model_config), dtype=dtype)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        model = add_lora(model, self.lora).train()
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        ids_BT, begin = torch.zeros(self.micro_batch, dtype=torch.long, device=device), perf_counter()
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[0, 0] = 0  # prompts differ in length: without padding, attention would need no mask
        with torch.autocast(device.type, torch.float16 if args.fp16 else torch.bfloat16, enabled=self.is_mixed):
            inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": ids_BT}
            loss = model(**inputs, fused_lm_head=True).loss
        loss.backward()
        loss.item()  # waits for the device
        tensors = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors), perf_counter() - begin

    def generation(self) -> list[MemoryPart]:
        """The larger of what training's and what evaluation's responses take; a vLLM that never sleeps comes on top."""
        args, table, data = self.args, self.config.eval, self.config.data
        always, in_turn = list[MemoryPart](), list[list[MemoryPart]]()
        if is_reinforcement(args) and args.use_vllm and args.vllm_mode == "colocate" and self.device:
            share, sleeps = args.vllm_gpu_memory_utilization, args.vllm_enable_sleep_mode
            how = f"exact: vllm_gpu_memory_utilization {share:g}"
            vllm = MemoryPart("vLLM", "generation" if sleeps else "always", int(share * self.device.bytes), how)
            always, in_turn = ([], [[vllm]]) if sleeps else ([vllm], [])
        elif is_reinforcement(args) and not args.use_vllm:
            in_turn.append(self.responses(self.work.responses // self.processes, self.work.max_response, "responses"))
        if table.prompts and self.sharding_level < 3 and (data.held_out or data.path == EMBEDDED):
            together = min(table.batch_size, table.prompts * table.samples_per_prompt)
            limit = table.max_new_tokens or self.config.max_response_tokens
            in_turn.append(self.responses(together, limit, "evaluated responses"))
        return always + max(in_turn, key=lambda parts: sum(part.bytes for part in parts), default=[])

    def responses(self, together: int, longest: int, what: str) -> list[MemoryPart]:
        """What responses to the longest prompts take: their cache, and the pass over all prompts that fills it."""
        prompt, tokens = self.work.longest_tokens, self.work.longest_tokens + longest
        value = (self.stream + self.compute) // 2  # autocast narrows values only
        size, how = together * count_cache_bytes(self.text, tokens, value), f"{together} {what} at once"
        begin = together * (prompt * self.layer // 2 + prompt**2 * (self.mask + self.pair))
        return [
            MemoryPart("cache of keys and values", "generation", size, f"exact: {how}, {tokens:,} tokens each"),
            MemoryPart("prompts", "generation", begin, f"bound: the first pass of {how}, {prompt:,} tokens each"),
        ]


def count_cache_bytes(text: Any, tokens: int, value_bytes: int) -> int:
    """The cache of one sequence: a sliding window keeps its length, linear attention one state instead."""
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kept = {"sliding_attention": min(tokens, getattr(text, "sliding_window", None) or tokens), "linear_attention": 0}
    values = sum(2 * kv_heads * head_dim(text) * kept.get(kind, tokens) for kind in kinds)
    if hasattr(text, "linear_num_value_heads"):
        state = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
        values += kinds.count("linear_attention") * state
    return values * value_bytes


def feed_forward_width(text: Any) -> int:
    """Width of a feed-forward layer, by any of its names; four times the model's by default."""
    names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    return next((size for name in names if (size := getattr(text, name, None))), 4 * text.hidden_size)


def head_dim(text: Any) -> int:
    """Width of an attention head."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def make_estimate_rows(estimate: Estimate) -> list[tuple[str, str, str]]:
    """(quantity, value, how it is known) of every line, the verdict last."""
    size, work = estimate.size, estimate.work
    tokens = work.per_step * (work.median_tokens + work.max_response)
    return [
        ("parameters", f"{size.base:,}", "exact: counted on the model without storage, tied weights once"),
        ("trained", f"{size.trained:,}", f"exact: {size.trained / size.base:.2%} of them"),
        *((f"{name} ({phase})", format_bytes(number), how) for name, phase, number, how in estimate.parts),
        ("memory of the update", format_bytes(estimate.phase_bytes("update")), "with what is always there"),
        ("memory of generation", format_bytes(estimate.phase_bytes("generation")), "with what is always there"),
        ("memory of one device", format_bytes(estimate.total), "the larger of the two"),
        (
            "prompt tokens",
            f"{work.median_tokens:,} / {work.longest_tokens:,}",
            f"median and longest of {work.samples:,}",
        ),
        ("responses at a time", f"{work.responses:,}", f"of {work.prompts:,} prompts; {work.per_step:,} in one step"),
        ("tokens a step", f"{tokens:,}", "at most: median prompts, longest responses"),
        ("steps", f"{work.steps:,}", "optimizer steps of the run"),
        ("verdict", *judge_fit(estimate)),
    ]


def judge_fit(estimate: Estimate) -> tuple[str, str]:
    """In a word, and in a sentence with what to change."""
    if not estimate.work.steps:
        work = estimate.work
        few = f"{work.samples} prompts do not fill one batch of {work.prompts}: nothing would be trained"
        return "no step", f"{few}; lower steps_per_generation or per_device_train_batch_size"
    if estimate.device is None:
        return "no GPU", f"needs about {format_bytes(estimate.total)} of memory; no GPU here to compare with"
    spare, where = (
        estimate.device.bytes - estimate.total,
        f"{estimate.device.name} ({format_bytes(estimate.device.bytes)})",
    )
    if spare >= 0:
        return "fits", f"fits {where} with {format_bytes(spare)} to spare"
    changes = "train an adapter ([peft]), set trl.gradient_checkpointing, lower trl.per_device_train_batch_size"
    if estimate.phase_bytes("generation") > estimate.phase_bytes("update"):
        changes = "lower data.max_prompt_tokens, trl.steps_per_generation or eval.batch_size, set trl.use_vllm"
    return "does not fit", f"does not fit {where} by {format_bytes(-spare)}; {changes}"


def format_bytes(size: float) -> str:
    """Bytes for reading: GiB, or MiB for little."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
