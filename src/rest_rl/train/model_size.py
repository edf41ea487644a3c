"""What a model's architecture costs, from its configuration alone: parameters, cache and activations by the token.

Parameters are counted on the model itself, built on the `meta` device without storage, so they are exact, tied
embeddings and adapters included. Activations are a formula of dense decoders with gated feed-forward layers (Llama,
Mistral, Qwen): it counts what autograd keeps, tensor by tensor, in the manner of Korthikanti et al., "Reducing
Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), section 4, for attention that keeps no
scores. Mixtures of experts and linear attention are reckoned as if they were dense and full.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit weight of bitsandbytes: half a byte, a scale of 8 bits for 64, a float32 for 256 scales."""


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters; an adapter's are in `adapter` alone, `linear` is what 4-bit loading would shrink."""

    base: int
    adapter: int
    linear: int
    """Weights of linear layers except the output head."""
    largest_layer: int
    """Parameters of one decoder layer, or of the embedding where that is larger: what sharding gathers at once."""
    adapted_inputs: int
    """Widths of the inputs of all linear layers with an adapter, summed over one decoder layer."""

    @property
    def trained(self) -> int:
        """Parameters that get gradients: the adapter's if there is one, else all."""
        return self.adapter or self.base


def model_size(model_config: Any, lora: Any = None, *, trust_remote_code: bool = False) -> ModelSize:
    """Count the parameters of a causal model of this transformers configuration; `lora` is a `peft.LoraConfig`."""
    config = copy.deepcopy(model_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    base = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    embedding = model.get_input_embeddings().weight.numel()
    adapter, adapted_inputs = adapter_size(model, lora) if lora is not None else (0, 0)
    return ModelSize(
        base=base,
        adapter=adapter,
        linear=sum(m.weight.numel() for m in linears),
        largest_layer=max([embedding, *layers]),
        adapted_inputs=adapted_inputs,
    )


def layers_of(model: Any) -> list[Any]:
    """The decoder layers: the longest list of modules in the model."""
    lists = [list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def adapter_size(model: Any, lora: Any) -> tuple[int, int]:
    """(trained parameters, summed input widths by layer) of a model with the adapter laid on; changes the model."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    adapted = get_peft_model(model, copy.deepcopy(lora))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    layers = layers_of(adapted)
    widths = sum(int(m.in_features or 0) for layer in layers for m in layer.modules() if isinstance(m, LoraLayer))
    return trained, widths // max(1, len(layers))


def cache_bytes_per_token(model_config: Any, value_bytes: int) -> int:
    """Keys and values of one token: layers that keep them * kv_heads * head_dim * 2 * bytes."""
    return sum(per_token for per_token, _ in cache_layers(model_config, value_bytes))


def cache_bytes(model_config: Any, tokens: int, value_bytes: int) -> int:
    """The cache of one sequence of `tokens`: a sliding window keeps its length, linear attention one state."""
    layers = cache_layers(model_config, value_bytes)
    return sum(per_token * min(tokens, window) for per_token, window in layers) + state_bytes(model_config, value_bytes)


def cache_layers(model_config: Any, value_bytes: int) -> list[tuple[int, int]]:
    """(bytes per token, tokens kept at most) of every layer with a cache of keys and values."""
    config = model_config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * kv_heads * head_dim(config) * value_bytes
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or 0
    windows = {"sliding_attention": window, "linear_attention": 0}
    kept = [windows.get(kind, 0) or 2**62 for kind in kinds if kind != "linear_attention"]
    return [(per_token, tokens) for tokens in kept]


def state_bytes(model_config: Any, value_bytes: int) -> int:
    """The recurrent states of linear attention layers (Qwen3.5, Qwen3-Next) of one sequence; 0 without such layers."""
    config = model_config.get_text_config()
    count = list(getattr(config, "layer_types", None) or []).count("linear_attention")
    if not count or not hasattr(config, "linear_num_value_heads"):
        return 0
    matrix = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    return count * matrix * value_bytes


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_activation_bytes(model_config: Any, size: ModelSize, stream: int, compute: int) -> int:
    """Bytes that autograd keeps of one token in one decoder layer.

    `stream` is the width of a value between layers (4 for float32 weights, 2 for bfloat16), `compute` that of the
    inputs of matrix products (2 under autocast or with bfloat16 weights). Two norms, the rotated queries, keys and
    values (repeated to all heads where a padding mask is given), attention's result, and the gated feed-forward layer's
    four. An adapter is float32, so that in 16 bits each keeps a copy of its input of its own, not the shared one.
    """
    config = model_config.get_text_config()
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * head_dim(config)
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim(config)
    normed = 0 if size.adapter else 1  # what a norm's scale multiplies is kept where that is trained
    kept = 2 * (4 + normed * stream) * hidden + compute * 4 * queries + 4 * config.num_attention_heads
    if has_head_norms(config):
        kept += (4 + normed * compute) * (queries + keys)
    kept += 3 * compute * inner  # the gate before and after its activation function, and the other factor
    if size.adapter and compute < 4:
        return kept + compute * size.adapted_inputs
    return kept + compute * (2 * hidden + inner)  # inputs of the projections; attention's result is above


def has_head_norms(config: Any) -> bool:
    """Whether queries and keys are normed by head."""
    return config.model_type.startswith(("qwen3", "gemma3", "olmo2", "olmo3"))
