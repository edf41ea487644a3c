"""Estimate a run before it starts: the memory of each process, the work per step, and whether the run fits its device.

Each memory figure is marked *exact*, *bound* or *measured*. Exact figures follow from shapes and settings: weights,
gradients, optimizer states, KV cache. The activations of update and prefill have generous bounds, and libraries have a
flat allowance. On a GPU, the peak of a forward and backward pass over the longest prompt and response can be
measured and replaces the bound of the update. Images and memory fragmentation are not included. The estimate assumes
that every expert of a mixture of experts is active, and that `paged_` optimizers stay on the device. Rollouts count as
many turns as gold needs, and results as long as responses, so figures of several turns are marked *estimate*. Prompts
that the trainer shares within groups count once per group in the bounds; a measured pass does not share them.
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

from rest_rl.config import WORLDS, RunConfig
from rest_rl.errors import UserError
from rest_rl.evaluate.shared_attention import find_model_obstacle
from rest_rl.train.duration import Duration
from rest_rl.train.policy import add_adapter

GIB = 2**30
Sharding = Literal["none", "zero1", "zero2", "zero3", "fsdp"]
Phase = Literal["always", "update", "generation"]
# What is sharded over processes: from 1 optimizer states, from 2 gradients too, from 3 weights too (ZeRO's stages).
SHARDING_LEVELS = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}
# TRL's fused head (1.16) multiplies this many positions by this much of the vocabulary at a time.
FUSED_HEAD_TILE = 4096, 32768
# Our allowance: a GPU's context and libraries, or what the libraries take on a CPU besides the loaded model.
DEVICE_ALLOWANCE = {True: int(1.5 * GIB), False: GIB // 4}
# Bytes of a 4-bit weight in bitsandbytes: half a byte, an 8-bit scale per 64 weights, a float32 per 256 scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Optimizer states per trained parameter, in bytes or as copies of the parameter. Other optimizers count as AdamW, 2
# copies.
OPTIMIZER_BYTES: dict[str, float] = {
    "adamw_torch_8bit": 2, "adamw_torch_4bit": 1, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8, "ademamix": 12, "ademamix_8bit": 3, "paged_ademamix_8bit": 3, "lion_8bit": 1,
    "paged_lion_8bit": 1, "lion_32bit": 4, "paged_lion_32bit": 4, "rmsprop_bnb_8bit": 1,
}  # fmt: skip
OPTIMIZER_COPIES: dict[str, float] = {"sgd": 0, "adafactor": 0.01, "adagrad": 1, "rmsprop": 1}


class Device(NamedTuple):
    """The device that trains, with its memory in bytes; for a CPU, `bytes` is the memory that is available now."""

    name: str
    bytes: int
    is_gpu: bool = True


class ParameterCounts(NamedTuple):
    """Parameters of the model (`base`), trained parameters, and those that 4-bit loading quantizes (`linear`)."""

    base: int
    trained: int
    linear: int


class Workload(NamedTuple):
    """Batch sizes, lengths and steps of a run, over all processes; supervised prompts include their demonstrations."""

    samples: int
    median_tokens: int  # of the prompts
    longest_tokens: int
    max_response: int  # of a whole rollout
    prompts: int  # of one generation batch
    responses: int  # of one generation batch
    per_step: int  # responses in one optimizer step
    steps: int


class MemoryPart(NamedTuple):
    """One part of a process's memory: its name, the phase that uses it, its size, and how the size was found."""

    name: str
    phase: Phase
    bytes: int
    how: str


@dataclass(frozen=True)
class Estimate:
    """The estimated work of a run, and the memory that one of its processes needs on its device."""

    size: ParameterCounts
    work: Workload
    parts: tuple[MemoryPart, ...]
    device: Device | None
    duration: Duration | None = None
    """How long the run takes, if it was measured on this machine's CPU."""

    def phase_bytes(self, phase: Phase) -> int:
        """Return the peak memory of a phase in bytes, including the parts that are always in use."""
        return sum(part.bytes for part in self.parts if part.phase in ("always", phase))

    @property
    def total(self) -> int:
        """The peak memory of the run in bytes: the larger peak of update and generation."""
        return max(self.phase_bytes("update"), self.phase_bytes("generation"))


def estimate_resources(
    config: RunConfig,
    model_config: Any,
    args: Any,
    *,
    lora: Any = None,
    prompt_tokens: Sequence[int] = (),
    samples: int | None = None,
    turns: int = 1,
    processes: int | None = None,
    sharding: Sharding | None = None,
    device: Device | None = None,
    measure: bool = False,
) -> Estimate:
    """Estimate the memory and work of a run from its settings, without loading weights.

    Args:
        config: the run, of which the tables `[model]`, `[data]` and `[eval]` are read.
        model_config: the model's transformers configuration.
        args: the trainer's configuration, a `ResTConfig`, `GRPOConfig` or `SFTConfig`.
        lora: the `peft.LoraConfig`, or None for full fine-tuning.
        prompt_tokens: the length of each training prompt; for an `SFTConfig`, of prompt and demonstration together.
        samples: the number of training prompts, if `prompt_tokens` covers only some of them.
        turns: the responses in a rollout; the memory holds all of them, with results in between.
        processes: the number of processes; by default, the world size in `args`.
        sharding: how processes share the model; by default, as set in `args` or by `accelerate launch`.
        device: the device that the run has to fit (see `find_device`), if known.
        measure: measure the activations of the model, with random weights, on this process's GPU. Sharded and 4-bit
            models keep the bound.
    """
    if not hasattr(text := model_config.get_text_config(), "num_attention_heads"):
        remedy = "try two steps instead: --set trl.max_steps=2"
        raise UserError(f"{text.model_type} cannot be estimated", "an architecture with attention", remedy)
    processes, sharding = processes or int(args.world_size), sharding or find_sharding(args)
    size = count_parameters(model_config, lora, trust_remote_code=config.model.trust_remote_code)
    work = count_work(args, prompt_tokens, processes, samples)
    work = work._replace(max_response=count_rollout_tokens(config, work.max_response, turns))
    model = _MemoryModel(config, model_config, args, lora, size, work, turns, processes, sharding, device)
    can_measure = measure and device and device.is_gpu and sharding == "none" and not config.model.load_in_4bit
    moving = model.measure_activations() if can_measure else model.activation_bound()
    return Estimate(size, work, (*model.states(), moving, *model.generation()), device)


def count_rollout_tokens(config: RunConfig, response: int, turns: int) -> int:
    """Return the longest rollout of `turns` responses of this many tokens, without its prompt.

    Results count as long as responses: their limit, `env.result_tokens`, is often far above their length.
    """
    return turns * response + (turns - 1) * min(config.env.result_tokens, response)


def find_device(args: Any) -> Device | None:
    """Return this process's GPU, or this machine's memory for training on the CPU; None if there is no GPU."""
    if args.use_cpu and not getattr(args, "use_vllm", False):
        limit = Path("/sys/fs/cgroup/memory.max")  # the limit of a container
        text = limit.read_text().strip() if limit.exists() else ""
        available = psutil.virtual_memory().available
        size = min(available, int(text)) if text.isdigit() else available
        return Device("this machine's available memory", size, is_gpu=False)
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(properties.name, properties.total_memory)


def find_sharding(args: Any) -> Sharding:
    """Return how the processes shard the model, from the trainer's configuration or the variables of `accelerate`."""
    if (plugin := getattr(args, "deepspeed_plugin", None)) is not None:
        return {1: "zero1", 2: "zero2", 3: "zero3"}.get(plugin.zero_stage, "none")  # pyright: ignore[reportReturnType]
    is_fsdp = getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return "fsdp" if is_fsdp else "none"


def count_parameters(model_config: Any, lora: Any = None, *, trust_remote_code: bool = False) -> ParameterCounts:
    """Count the parameters of a model and its adapter without allocating them; tied weights count once."""
    # Tensors on the meta device have shapes and no storage.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), trust_remote_code=trust_remote_code)
    head, base = model.get_output_embeddings(), sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    trained = sum(p.numel() for p in add_adapter(model, lora).parameters() if p.requires_grad)
    return ParameterCounts(base, trained, linear)


# A GRPOConfig generates responses, an SFTConfig does not.
def is_reinforcement(args: Any) -> bool:
    return hasattr(args, "num_generations")


def count_work(args: Any, prompt_tokens: Sequence[int], processes: int = 1, samples: int | None = None) -> Workload:
    """Return the workload of a run with the GRPOConfig or SFTConfig `args` and prompts of these lengths."""
    samples, longest = samples or len(prompt_tokens), max(prompt_tokens, default=0)
    median = int(statistics.median(prompt_tokens or [0]))
    together = args.per_device_train_batch_size * processes
    per_step = together * args.gradient_accumulation_steps
    if is_reinforcement(args):
        # TRL's units: a generation batch is steps_per_generation micro-batches, trained on num_iterations times; the
        # sampler drops the last incomplete generation batch of an epoch, and gradient_accumulation_steps micro-batches
        # are a step.
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


# Bytes per number of the model in one process, and the parts of memory that follow from them.
@dataclass
class _MemoryModel:
    config: RunConfig
    model_config: Any
    args: Any
    lora: Any
    size: ParameterCounts
    work: Workload
    turns: int
    processes: int
    sharding: Sharding
    device: Device | None

    def __post_init__(self) -> None:
        args, text = self.args, self.model_config.get_text_config()
        self.text, self.sharding_level = text, SHARDING_LEVELS[self.sharding]
        self.is_gpu = bool(self.device and self.device.is_gpu)
        self.micro_batch = args.per_device_train_batch_size, self.work.longest_tokens + self.work.max_response
        checkpointing = "with checkpointing" if args.gradient_checkpointing else "without checkpointing"
        rows, length = self.micro_batch
        self.shape = f"{rows} x {length:,} tokens, longest prompt and response, {checkpointing}"
        self.copies = args.num_generations if self.shares_prompts() else 1  # responses that share one prompt
        loaded, self.is_mixed = 4 if self.config.weights_dtype == "float32" else 2, bool(args.bf16 or args.fp16)
        # DeepSpeed trains 16-bit weights, with float32 copies in the optimizer; FSDP with accelerate trains float32.
        self.is_deepspeed = self.is_mixed and self.sharding.startswith("zero")
        is_fsdp = self.is_mixed and self.sharding == "fsdp"
        self.trained_bytes = 4 if self.lora or is_fsdp else 2 if self.is_deepspeed else loaded
        self.weight_bytes = loaded if self.lora else self.trained_bytes
        self.compute_bytes = 2 if self.is_mixed else loaded  # of an input of a matrix product
        self.value_bytes = 2 if self.is_mixed and self.sharding_level else loaded  # of an activation between layers
        # Upper bounds of what autograd stores of a layer: per token, counted generously for gated feed-forward layers;
        # per pair of tokens, with eager attention, the scores of every head. The mask of padded rows, in the type of
        # the products, is stored once per model; flash attention needs none.
        kind, heads = self.config.model.attn_implementation, text.num_attention_heads
        values = 14 * text.hidden_size + 4 * heads * head_dim(text) + 4 * feed_forward_width(text)
        self.layer_bytes = self.compute_bytes * values
        self.num_masks, self.pair_bytes = (0, 0) if "flash" in kind else (1, self.compute_bytes)
        self.pair_bytes += (2 * self.compute_bytes + 4) * heads if kind == "eager" else 0

    # Only as far as settings and configuration tell: the trainer tries the model as well (`shared_prompts`).
    def shares_prompts(self) -> bool:
        args, dropout = self.args, [getattr(self.text, "attention_dropout", 0), getattr(self.lora, "lora_dropout", 0)]
        return (
            getattr(args, "share_prompts", False)
            and self.text is self.model_config  # no images
            and self.is_shareable()
            and self.sharding == "none"
            and not args.torch_compile
            and not (any(dropout) and not args.disable_dropout)
        )

    def is_shareable(self) -> bool:
        return find_model_obstacle(self.text) is None and self.config.model.attn_implementation in ("", "sdpa")

    # Determined by the settings: weights, optimizer states, gradients, reference model, allowance.
    def states(self) -> list[MemoryPart]:
        size = self.size
        shards = [self.processes if self.sharding_level >= least else 1 for least in range(4)]
        weights, how = size.base * self.weight_bytes, f"{size.base:,} parameters of {self.weight_bytes} bytes"
        if self.config.model.load_in_4bit:
            weights = int(size.linear * NF4_BYTES) + (size.base - size.linear) * self.weight_bytes
            how = f"{size.linear:,} parameters of 4 bits with their scales, {size.base - size.linear:,} of 16"
        weights = (weights + (4 * size.trained if self.lora else 0)) // shards[3]
        name = str(getattr(self.args.optim, "value", self.args.optim))
        copies = OPTIMIZER_COPIES.get(name, 2) * (4 if self.is_deepspeed else self.trained_bytes)
        each: float = OPTIMIZER_BYTES.get(name, copies) + 4 * self.is_deepspeed
        states, per_parameter = int(size.trained * each / shards[1]), "bytes per trained parameter"
        gradients = size.trained * self.trained_bytes // shards[2]
        parts = [
            MemoryPart("weights", "always", weights, f"exact: {how}"),
            MemoryPart("optimizer states", "always", states, f"exact: {name}, {each:g} {per_parameter}"),
            MemoryPart("gradients", "update", gradients, f"exact: {self.trained_bytes} {per_parameter}"),
        ]
        if is_reinforcement(self.args) and self.args.beta and not self.lora:
            parts.append(MemoryPart("reference model", "always", weights, "exact: a copy, because beta is not 0"))
        if self.device:
            allowance = DEVICE_ALLOWANCE[self.is_gpu]
            parts.append(MemoryPart("context", "always", allowance, "bound: libraries and device context"))
        return parts

    # Peak of forward and backward pass beyond weights and gradients. Without checkpointing every layer's activations
    # are stored; with it only every layer's input, and one layer at a time is recomputed. The backward pass of a layer
    # takes half a layer more. Fixed terms: TRL's tile of logits, the gradient of the output head, and without
    # sharding autocast's 16-bit copies of the weights.
    def activation_bound(self) -> MemoryPart:
        text, (rows, length) = self.text, self.micro_batch
        tokens = math.ceil(rows / self.copies) * self.work.longest_tokens + rows * self.work.max_response
        stored = 1 if self.args.gradient_checkpointing else text.num_hidden_layers
        inputs = text.num_hidden_layers * text.hidden_size * self.value_bytes
        token = self.layer_bytes * (2 * stored + 1) // 2 + inputs + 8 * text.hidden_size
        # One buffer of a tile; without the GPU kernel eight more float32 copies of its logits.
        positions, vocabulary = FUSED_HEAD_TILE
        tile = 4 * vocabulary + (0 if self.is_gpu else 32 * min(text.vocab_size, vocabulary))
        fixed = min(tokens, positions) * tile + (0 if self.lora else 4 * text.vocab_size * text.hidden_size)
        fixed += 2 * self.size.linear if self.value_bytes > self.compute_bytes else 0
        total = tokens * token + rows * length**2 * (self.num_masks + self.pair_bytes * stored) + fixed
        how = f", each prompt once for {self.copies} responses" if self.copies > 1 else ""
        return MemoryPart("activations", "update", total, f"{self.mark('bound')}: {self.shape}{how}")

    # If the pass runs out of memory, the device's whole memory counts, so that the verdict is "does not fit".
    def measure_activations(self) -> MemoryPart:
        device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.reset_peak_memory_stats(device)
        try:
            resident, seconds = self.run_micro_step(device)
            how = f"a forward and backward pass, {seconds:.2f} s"
            extra = torch.cuda.max_memory_allocated(device) - resident
        except torch.cuda.OutOfMemoryError:
            total = torch.cuda.get_device_properties(device).total_memory
            extra, how = total, "a forward and backward pass ran out of memory"
        torch.cuda.empty_cache()
        return MemoryPart("activations", "update", extra, f"measured: {how}; {self.shape}")

    # Returns (bytes of weights and gradients, seconds) of one pass of random weights through the model with TRL's head.
    def run_micro_step(self, device: torch.device) -> tuple[int, float]:
        args, dtype = self.args, getattr(torch, self.config.weights_dtype)
        with device:
            model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(self.model_config), dtype=dtype)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        model = add_adapter(model, self.lora).train()
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        ids_BT, begin = torch.zeros(self.micro_batch, dtype=torch.long, device=device), perf_counter()
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[0, 0] = 0  # a padded row, as prompts differ in length: without one, attention builds no mask
        with torch.autocast(device.type, torch.float16 if args.fp16 else torch.bfloat16, enabled=self.is_mixed):
            inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": ids_BT}
            loss = model(**inputs, fused_lm_head=True).loss
        loss.backward()
        loss.item()  # waits for the device
        tensors = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors), perf_counter() - begin

    # Training and evaluation generate at different times, so the larger of the two counts. A vLLM in the same process
    # reserves its share of the GPU, always or, with sleep mode, only while generating.
    def generation(self) -> list[MemoryPart]:
        args, table, data = self.args, self.config.eval, self.config.data
        always, alternatives = list[MemoryPart](), list[list[MemoryPart]]()
        if is_reinforcement(args) and args.use_vllm and args.vllm_mode == "colocate" and self.device:
            share, sleeps = args.vllm_gpu_memory_utilization, args.vllm_enable_sleep_mode
            how = f"exact: vllm_gpu_memory_utilization {share:g}"
            vllm = MemoryPart("vLLM", "generation" if sleeps else "always", int(share * self.device.bytes), how)
            always, alternatives = ([], [[vllm]]) if sleeps else ([vllm], [])
        elif is_reinforcement(args) and not args.use_vllm:
            together = self.work.responses // self.processes
            copies = self.copies if self.turns == 1 else 1  # the prompts of later turns contain earlier responses
            alternatives.append(self.responses(together, args.max_completion_length, "responses", copies))
        has_held_out = data.held_out or data.path in WORLDS or self.config.env.path
        if table.prompts and self.sharding_level < 3 and has_held_out:
            limit = table.max_new_tokens or self.config.max_response_tokens
            draws = table.samples_per_prompt + 1 + bool(table.low_temperature)
            copies = draws if not self.is_gpu and self.turns == 1 and self.is_shareable() else 1
            together = copies * min(table.batch_size, table.prompts)
            alternatives.append(self.responses(together, limit, "held-out responses", copies))
        return always + max(alternatives, key=lambda parts: sum(part.bytes for part in parts), default=[])

    # The KV cache of responses to the longest prompts, and the prefill, one forward pass over all prompts. In the last
    # turn of a rollout, the prompt contains the turns before it.
    def responses(self, together: int, longest: int, what: str, copies: int = 1) -> list[MemoryPart]:
        tokens = self.work.longest_tokens + count_rollout_tokens(self.config, longest, self.turns)
        prompt = tokens - longest
        value = (self.value_bytes + self.compute_bytes) // 2  # autocast narrows the values but not the keys
        own = longest if copies > 1 else tokens
        size = together * count_cache_bytes(self.text, own, value)
        size += math.ceil(together / copies) * count_cache_bytes(self.text, tokens - own, value)
        how, once = f"{together} {what} at once", f", each once for {copies}" if copies > 1 else ""
        cache = f"{how}, {own:,} tokens each" + (f", and their prompts{once}" if once else "")
        begin = prompt * self.layer_bytes // 2 + prompt**2 * (self.num_masks + self.pair_bytes)
        begin *= math.ceil(together / copies)
        prefill = f"{self.mark('bound')}: one pass over the prompts of {how}{once}, {prompt:,} tokens each"
        return [
            MemoryPart("KV cache", "generation", size, f"{self.mark('exact')}: {cache}"),
            MemoryPart("prefill", "generation", begin, prefill),
        ]

    # The length of a rollout of several turns is a guess, and so is what follows from it.
    def mark(self, how: Literal["exact", "bound"]) -> str:
        return how if self.turns == 1 else "estimate"


def count_cache_bytes(text: Any, tokens: int, value_bytes: int) -> int:
    """Return the KV cache size of one sequence of `tokens` tokens; `text` is the text model's configuration."""
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kept = {"sliding_attention": min(tokens, getattr(text, "sliding_window", None) or tokens), "linear_attention": 0}
    values = sum(2 * kv_heads * head_dim(text) * kept.get(kind, tokens) for kind in kinds)
    if hasattr(text, "linear_num_value_heads"):
        state = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
        values += kinds.count("linear_attention") * state
    return values * value_bytes


# Architectures name it differently; without a name it is 4 x hidden_size, as in the original Transformer.
def feed_forward_width(text: Any) -> int:
    names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    return next((size for name in names if (size := getattr(text, name, None))), 4 * text.hidden_size)


def head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def make_estimate_rows(estimate: Estimate) -> list[tuple[str, str, str]]:
    """Return the rows (quantity, value, source) of the table that shows an estimate; the last row is the verdict."""
    size, work = estimate.size, estimate.work
    tokens = work.per_step * (work.median_tokens + work.max_response)
    return [
        ("parameters", f"{size.base:,}", "exact: counted in the model; tied weights count once"),
        ("trained", f"{size.trained:,}", f"exact: {size.trained / size.base:.2%} of them"),
        *((f"{name} ({phase})", format_bytes(number), how) for name, phase, number, how in estimate.parts),
        ("peak memory, update", format_bytes(estimate.phase_bytes("update")), "with all (always) parts"),
        ("peak memory, generation", format_bytes(estimate.phase_bytes("generation")), "with all (always) parts"),
        ("peak memory of one device", format_bytes(estimate.total), "the larger of the two"),
        (
            "prompt tokens",
            f"{work.median_tokens:,} / {work.longest_tokens:,}",
            f"median and longest of {work.samples:,} prompts",
        ),
        ("responses per batch", f"{work.responses:,}", f"for {work.prompts:,} prompts; {work.per_step:,} per step"),
        ("tokens per step", f"{tokens:,}", "estimate: median prompt and longest response"),
        ("steps", f"{work.steps:,}", "optimizer steps of the run"),
        *make_duration_rows(estimate.duration),
        ("verdict", *judge_fit(estimate)),
    ]


def make_duration_rows(duration: Duration | None) -> list[tuple[str, str, str]]:
    if duration is None:
        return []
    lengths = "from responses as long as gold to responses up to the limit"
    rows = [
        ("generation of a step", str(duration.generation), f"measured: a few tokens; {lengths}"),
        ("update of a step", str(duration.update), "measured: one micro-batch and one optimizer step"),
        ("one evaluation", str(duration.evaluation), "measured: a few tokens of one batch"),
        ("the whole run", str(duration.run), "predicted from these, under the present load of this machine"),
    ]
    return [row for row, seconds in zip(rows, duration, strict=True) if seconds.high]


def judge_fit(estimate: Estimate) -> tuple[str, str]:
    """Return a short verdict, such as "fits", and a text that explains it and says what to change if necessary."""
    if not estimate.work.steps:
        work = estimate.work
        few = f"{work.samples} prompts do not fill one batch of {work.prompts}, so nothing would be trained"
        return "cannot train", f"{few}; lower trl.steps_per_generation or trl.per_device_train_batch_size"
    if estimate.device is None:
        return "no GPU", f"needs about {format_bytes(estimate.total)}; this machine has no GPU to compare with"
    device, spare = estimate.device, estimate.device.bytes - estimate.total
    where = f"{device.name} ({format_bytes(device.bytes)})"
    if spare >= 0:
        return "fits", f"fits {where} with {format_bytes(spare)} to spare"
    changes = "train an adapter ([peft]), set trl.gradient_checkpointing, or lower trl.per_device_train_batch_size"
    if estimate.phase_bytes("generation") > estimate.phase_bytes("update"):
        changes = "lower data.max_prompt_tokens, trl.steps_per_generation or eval.batch_size, or set trl.use_vllm"
    return "does not fit", f"exceeds {where} by {format_bytes(-spare)}; {changes}"


def format_bytes(size: float) -> str:
    """Format a number of bytes in GiB or, below 0.1 GiB, in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
