"""The parts of a training process's memory: when each is there, its size, and how that was reckoned.

What stays is exact for the optimizers named here; what comes and goes is reckoned at the longest prompt with the
longest response and follows what torch, transformers 5, accelerate 1 and TRL 1.16 do. `footprint` adds the parts up and
says how far they can be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from rest_rl.config import EMBEDDED, RunConfig
from rest_rl.train.model_size import (
    FOUR_BIT,
    ModelSize,
    cache_bytes,
    cache_bytes_per_token,
    head_dim,
    layer_activation_bytes,
)
from rest_rl.train.workload import Workload, is_reinforcement

GIB = 2**30
Sharding = Literal["none", "zero1", "zero2", "zero3", "fsdp"]
Phase = Literal["always", "update", "generation"]
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""TRL's fused head projects this many positions onto this much of the vocabulary at a time (trl.kernels)."""
ALLOWANCE = 1.5 * GIB
"""For the CUDA context, libraries and fragmentation (ours)."""
ASLEEP = 2 * GIB
"""What vLLM keeps while it sleeps: its context and captured graphs (ours)."""

OPTIMIZER_BYTES: dict[str, tuple[float, bool]] = {
    "sgd": (0, False),
    "adafactor": (0.01, False),
    "adamw_torch_8bit": (2, True),
    "adamw_torch_4bit": (1, True),
    "adamw_bnb_8bit": (2, True),
    "adamw_8bit": (2, True),
    "paged_adamw_8bit": (2, True),
    "ademamix_8bit": (3, True),
    "paged_ademamix_8bit": (3, True),
    "lion_8bit": (1, True),
    "paged_lion_8bit": (1, True),
    "rmsprop_bnb_8bit": (1, True),
    "paged_adamw_32bit": (8, True),
    "lion_32bit": (4, True),
    "paged_lion_32bit": (4, True),
    "ademamix": (12, True),
    "adagrad": (1, False),
    "rmsprop": (1, False),
}
"""(amount, whether that is bytes) of the states by trained parameter; else in units of the parameter's own bytes.
Optimizers not named here count as AdamW, two states in the parameter's own type."""


class Device(NamedTuple):
    """A GPU: its name and the bytes it has."""

    name: str
    bytes: int


class Share(NamedTuple):
    """A part of the memory of one process: when it is there, its size, and how that was reckoned."""

    name: str
    phase: Phase
    bytes: int
    how: str


def gib(size: float) -> str:
    """Bytes for reading: GiB, or MiB for little."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


class Setting(NamedTuple):
    """What the shares are reckoned from."""

    model_config: Any
    args: Any
    size: ModelSize
    work: Workload
    device: Device | None
    processes: int
    sharding: Sharding
    dtype: str
    four_bit: bool

    @property
    def is_mixed(self) -> bool:
        """Whether products are computed in 16 bits whatever the weights are."""
        return bool(self.args.bf16 or self.args.fp16)

    @property
    def stream(self) -> int:
        """Bytes of a value between layers: those of a weight, which FSDP and ZeRO narrow."""
        return 2 if self.is_mixed and self.sharding != "none" else width_of(self.dtype)

    @property
    def compute(self) -> int:
        """Bytes of the inputs of matrix products."""
        return 2 if self.is_mixed else width_of(self.dtype)

    @property
    def trained_bytes(self) -> int:
        """Bytes of one trained parameter: an adapter is float32, and accelerate makes FSDP's parameters so."""
        if self.size.adapter or (self.sharding == "fsdp" and self.is_mixed):
            return 4
        return 2 if self.is_deepspeed else width_of(self.dtype)

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed trains in 16 bits and keeps weights of 32 beside them."""
        return self.is_mixed and self.sharding.startswith("zero")

    @property
    def narrowed(self) -> int:
        """The 16-bit copies of all weights that autocast makes for the length of a forward pass."""
        return 2 * self.size.linear if self.stream == 4 and self.compute == 2 else 0

    @property
    def gathered(self) -> int:
        """Two layers in 16 bits, from all processes: one in use, one on its way."""
        return 2 * 2 * self.size.largest_layer if self.parts["weights"] > 1 else 0

    @property
    def text(self) -> Any:
        """The configuration of the language model."""
        return self.model_config.get_text_config()

    @property
    def parts(self) -> dict[str, int]:
        """Into how many parts weights, gradients and optimizer states are cut."""
        stage = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}[self.sharding]
        return {
            "weights": self.processes if stage >= 3 else 1,
            "gradients": self.processes if stage >= 2 else 1,
            "optimizer": self.processes if stage >= 1 else 1,
        }


def width_of(dtype: str) -> int:
    """Bytes of a value of this type."""
    return 4 if dtype == "float32" else 2


def state_shares(of: Setting) -> list[Share]:
    """What is there all the time: weights, optimizer states, a reference model, a vLLM that does not sleep."""
    weights, how = weight_bytes(of)
    shares = [Share("weights", "always", weights, how)]
    cut = f", in {of.parts['optimizer']} parts" if of.parts["optimizer"] > 1 else ""
    amount, is_bytes = OPTIMIZER_BYTES.get(optimizer_of(of.args), (2, False))
    each = amount if is_bytes else amount * (4 if of.is_deepspeed else of.trained_bytes)
    if of.is_deepspeed:
        each, cut = each + 4, f"{cut}, with the 32-bit weights that DeepSpeed keeps"
    states = int(of.size.trained * each / of.parts["optimizer"])
    how = f"{optimizer_of(of.args)}: {each:g} bytes for each of {of.size.trained:,} trained parameters{cut}"
    shares.append(Share("optimizer states", "always", states, how))
    if is_reinforcement(of.args) and of.args.beta and not of.size.adapter:
        shares.append(Share("reference model", "always", weights, "a second model, because beta is not 0"))
    if uses_vllm(of) and of.device and not of.args.vllm_enable_sleep_mode:
        shares.append(vllm_share(of, "always"))
    if of.device:
        shares.append(Share("context and fragmentation", "always", int(ALLOWANCE), "a flat allowance"))
    return shares


def weight_bytes(of: Setting) -> tuple[int, str]:
    """Bytes of the weights on one process, and how."""
    base, adapter, parts = of.size.base, of.size.adapter, of.parts["weights"]
    each = width_of(of.dtype) if adapter else of.trained_bytes
    how = f"{base:,} parameters of {each} bytes"
    total = base * each
    if of.four_bit:
        total = int(of.size.linear * FOUR_BIT) + (base - of.size.linear) * each
        how = f"{of.size.linear:,} parameters of 4 bits with their scales, {base - of.size.linear:,} of {each} bytes"
    if adapter:
        how += f", and an adapter of {adapter:,} in float32"
    if parts > 1:
        how += f", in {parts} parts"
    return (total + 4 * adapter) // parts, how


def optimizer_of(args: Any) -> str:
    """The optimizer's name."""
    return str(getattr(args.optim, "value", args.optim))


def update_shares(of: Setting) -> list[Share]:
    """What forward, backward and optimizer step add."""
    each = of.trained_bytes
    gradients = of.size.trained * each // of.parts["gradients"]
    cut = f", in {of.parts['gradients']} parts" if of.parts["gradients"] > 1 else ""
    width, batch = of.work.width, of.args.per_device_train_batch_size
    tokens = width * batch
    kept, how = activation_bytes(of, tokens)
    work, moment = working_bytes(of, tokens)
    where = f"micro-batch of {batch} x {width:,} tokens (longest prompt and response)"
    return [
        Share("gradients", "update", gradients, f"{each} bytes for each trained parameter{cut}"),
        Share("activations", "update", kept, f"{where}: {how}"),
        Share("work of an update", "update", work, moment),
    ]


def activation_bytes(of: Setting, tokens: int) -> tuple[int, str]:
    """What the forward pass keeps for the backward pass."""
    layers, hidden = of.text.num_hidden_layers, of.text.hidden_size
    ends = tokens * hidden * (of.stream + 4)  # what enters and leaves the last norm
    if of.args.gradient_checkpointing:
        return tokens * layers * hidden * of.stream + ends, f"only the input of each of {layers} layers (checkpointing)"
    each = layer_activation_bytes(of.model_config, of.size, of.stream, of.compute)
    return tokens * layers * each + ends, f"{each:,} bytes a token in each of {layers} layers; no checkpointing"


def working_bytes(of: Setting, tokens: int) -> tuple[int, str]:
    """The largest of the moments of an update: the head, one layer run again, the last of the gradients."""
    hidden, inner = of.text.hidden_size, of.text.intermediate_size
    one_layer = layer_activation_bytes(of.model_config, of.size, of.stream, of.compute) + 3 * of.compute * inner
    is_checkpointed = of.args.gradient_checkpointing
    table = 0 if of.size.adapter else of.text.vocab_size * hidden * of.trained_bytes
    moments = {
        "the head": head_bytes(of, tokens) + (0 if is_checkpointed else of.narrowed),
        "16-bit copies of the weights in the forward pass": of.narrowed,
        "one layer run again": is_checkpointed * tokens * (one_layer + 2 * hidden * of.stream),
        "gradients of the embedding": table * (2 if of.model_config.tie_word_embeddings else 1),
    }
    moment = max(moments, key=lambda name: moments[name])
    extra = ", and two layers gathered from all processes" if of.gathered else ""
    return moments[moment] + of.gathered, f"the largest moment: {moment}{extra}"


def head_bytes(of: Setting, tokens: int) -> int:
    """The output head's work: TRL never lays out the logits of all tokens but goes through them in tiles."""
    hidden, vocabulary = of.text.hidden_size, of.text.vocab_size
    on_gpu = of.device is not None
    is_compact = on_gpu and of.work.max_response
    positions = of.args.per_device_train_batch_size * of.work.max_response if is_compact else tokens
    rows, columns = min(positions, TILE_TOKENS), min(vocabulary, TILE_VOCABULARY)
    buffer = rows * TILE_VOCABULARY * of.compute
    # Without Triton a tile is folded in float32: logits, log p, p, the gradient and its parts.
    folding = 0 if on_gpu else rows * columns * 4 * (8 if of.compute < 4 else 7)
    head_weight = 0 if of.size.adapter else vocabulary * hidden * 4
    return buffer + folding + columns * hidden * of.compute + positions * hidden * 8 + head_weight


def generation_shares(of: Setting) -> list[Share]:
    """What generating responses adds: vLLM's share while it is awake, or the cache and work of `model.generate`."""
    if not is_reinforcement(of.args) or (of.args.use_vllm and not uses_vllm(of)):
        return []
    if uses_vllm(of):
        if not of.device or not of.args.vllm_enable_sleep_mode:
            return []
        asleep = Share("vLLM asleep", "update", int(ASLEEP), "its context and captured graphs, a flat allowance")
        return [asleep, vllm_share(of, "generation")]
    together = of.work.responses // of.processes
    shares = [*sampling_shares(of, together, of.work.lengths.longest, of.work.max_response, "generation")]
    if of.parts["weights"] > 1:
        whole = of.size.base * width_of(of.dtype)
        shares.append(Share("gathered weights", "generation", whole, "the whole model on every process, to generate"))
    return shares


def sampling_shares(of: Setting, together: int, prompt: int, response: int, phase: Phase) -> list[Share]:
    """The cache of `together` sequences, and the work of the prompts' pass and of sampling."""
    value = (of.stream + of.compute) // 2  # under autocast keys stay in the stream's type, values do not
    each = cache_bytes(of.model_config, prompt + response, value)
    per_token = cache_bytes_per_token(of.model_config, value)
    how = f"{together} sequences at once, {prompt + response:,} tokens each, {per_token:,} bytes a token"
    queries = of.text.num_attention_heads * head_dim(of.text)
    inner, hidden = of.text.intermediate_size, of.text.hidden_size
    widened = 6 * inner if of.size.adapter and of.compute < 4 else 0  # an adapter's input in float32 and narrowed again
    first_pass = together * prompt * ((3 * inner + 2 * hidden) * of.compute + widened)
    repeated = together * (prompt + response) * 2 * queries * of.compute
    sampling = together * of.text.vocab_size * 4 * 3
    work = max(first_pass, repeated + each * together // max(1, of.text.num_hidden_layers), sampling) + of.narrowed
    return [
        Share("cache of keys and values", phase, each * together, how),
        Share("work of generation", phase, work, "first pass over the prompts, repeated keys and values, or sampling"),
    ]


def evaluation_shares(of: Setting, config: RunConfig) -> list[Share]:
    """What evaluating in the run adds; nothing where it has no data or the model is cut up."""
    table, data = config.eval, config.data
    if not table.prompts or of.parts["weights"] > 1 or not (data.held_out or data.path == EMBEDDED):
        return []
    together = min(table.batch_size, table.prompts * table.samples)
    shares = sampling_shares(of, together, of.work.lengths.longest, table.max_new_tokens, "generation")
    return [share._replace(name=f"{share.name}, evaluation") for share in shares]


def uses_vllm(of: Setting) -> bool:
    """Whether vLLM generates on the devices that train."""
    return is_reinforcement(of.args) and bool(of.args.use_vllm and of.args.vllm_mode == "colocate")


def vllm_share(of: Setting, phase: Phase) -> Share:
    """The memory that vLLM takes for its copy of the weights and its cache."""
    assert of.device is not None
    utilisation = of.args.vllm_gpu_memory_utilization
    share = int(utilisation * of.device.bytes)
    weights = 2 * of.size.base // of.args.vllm_tensor_parallel_size
    tokens = max(0, share - weights) * of.args.vllm_tensor_parallel_size // cache_bytes_per_token(of.model_config, 2)
    how = f"vllm_gpu_memory_utilization {utilisation:g}: 16-bit weights {gib(weights)}, cache of {tokens:,} tokens"
    return Share("vLLM", phase, share, how)


def remedies(of: Setting, shares: Sequence[Share]) -> list[str]:
    """Changes that would help, by the size of what they save."""
    by_name = {share.name: share.bytes for share in shares}
    args, options = of.args, list[tuple[int, str]]()
    moving = by_name["activations"] + by_name["work of an update"]
    if not args.gradient_checkpointing:
        options.append((moving, "gradient_checkpointing = true"))
    if args.per_device_train_batch_size > 1:
        options.append((moving // 2, "halve per_device_train_batch_size and double gradient_accumulation_steps"))
    if not of.size.adapter:
        options.append((by_name["gradients"] + by_name["optimizer states"], "train an adapter: a [peft] table"))
    if of.size.adapter and not of.four_bit:
        options.append((by_name["weights"] // 2, "model.load_in_4bit = true"))
    if of.processes > 1 and of.parts["weights"] == 1:
        options.append((by_name["weights"] // 2, "launch with FSDP or ZeRO-3, which cut up the model"))
    if by_name.get("cache of keys and values"):
        options.append((by_name["cache of keys and values"], "use_vllm = true, or a smaller steps_per_generation"))
    if "vLLM" in by_name and not args.vllm_enable_sleep_mode:
        options.append((by_name["vLLM"], "vllm_enable_sleep_mode = true"))
    return [text for _, text in sorted(options, reverse=True)]
