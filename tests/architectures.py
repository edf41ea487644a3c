"""Published architectures as transformers configurations, without weights."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, Qwen3Config

QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
LLAMA3 = {"vocab_size": 128256, "head_dim": 128, "num_key_value_heads": 8, "intermediate_size": 8192}


def qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        **QWEN3,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
    )


def published_config(name: str) -> Any:
    """Return the configuration of a model named in a recipe."""
    if name.startswith("meta-llama/Llama-3.2-3B"):
        return LlamaConfig(
            **LLAMA3, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, tie_word_embeddings=True
        )
    return {
        "Qwen/Qwen3-1.7B": lambda: qwen3(2048, 6144, 28, 16, tied=True),
        "Qwen/Qwen3-4B-Instruct-2507": lambda: qwen3(2560, 9728, 36, 32, tied=True),
        "Qwen/Qwen3-8B": lambda: qwen3(4096, 12288, 36, 32, tied=False),
        "Qwen/Qwen3-14B": lambda: qwen3(5120, 17408, 40, 40, tied=False),
    }[name]()


NUM_PARAMETERS = {
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
}
"""Numbers of parameters as published; tied embeddings (1.7B, 4B, Llama) count once."""
