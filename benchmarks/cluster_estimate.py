"""Calculate memory and time of a run on verl for docs/cluster.md; nothing here is measured.

    python benchmarks/cluster_estimate.py            # the tables of docs/cluster.md
    python benchmarks/cluster_estimate.py 8B 32      # one model on 32 GPUs, term by term

The batch is the paper's: 512 prompts x 4 responses in 8 optimizer steps. Change the constants for your own run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

PROMPTS, GROUP, UPDATES = 512, 4, 8
PROMPT, RESPONSE, MAX_RESPONSE = 700, 512, 2048
"""Tokens of a prompt, of an average response and of the longest response (assumed; your first run shows them)."""
MFU = 0.35
"""Share of the peak FLOP/s that forward and backward passes reach (assumed)."""
BANDWIDTH_SHARE = 0.5
"""Share of the memory bandwidth that decoding reaches (assumed)."""
GPUS = {"A100": (312e12, 2.04e12), "H100": (989e12, 3.35e12)}
"""Dense bfloat16 FLOP/s and memory bytes/s of the 80 GB models, from the vendor's data sheets."""
GPU_BYTES = 79.1 * 2**30
ALLOWANCE = 4 * 2**30
"""CUDA, NCCL, fragmentation and a sleeping vLLM (assumed)."""
ROLLOUT_SHARE = 0.5
"""`gpu_memory_utilization` of the recipes."""
VOCABULARY = 151_936


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3 model; `tokens` (per micro-batch and GPU) and `tensor_parallel` come from the recipe."""

    layers: int
    hidden: int
    queries: int
    inner: int
    tied: bool
    tokens: int
    tensor_parallel: int
    kv: int = 2 * 8 * 128

    # Parameters of one layer.
    @property
    def layer(self) -> int:
        return self.hidden * (2 * self.queries + self.kv + 3 * self.inner)

    # Parameters of the model, without norms.
    @property
    def parameters(self) -> int:
        return self.layers * self.layer + VOCABULARY * self.hidden * (1 if self.tied else 2)

    # Bytes of the key-value cache per token in bfloat16.
    @property
    def cache(self) -> int:
        return 2 * self.layers * self.kv


SHAPES = {
    "1.7B": ModelShape(28, 2048, 2048, 6144, True, 8 * 4096, 1),
    "4B": ModelShape(36, 2560, 4096, 9728, True, 8 * 4096, 1),
    "8B": ModelShape(36, 4096, 4096, 12288, False, 4 * 4096, 1),
    "14B": ModelShape(40, 5120, 5120, 17408, False, 4 * 4096, 2),
}


# Return the bytes on one GPU by part: FSDP2 over all GPUs, bfloat16 products, activation checkpointing.
def memory_parts(shape: ModelShape, gpus: int) -> dict[str, float]:
    # FSDP2 shards states over all GPUs and gathers one layer while it prefetches the next; logits are not checkpointed.
    n, tokens = shape.parameters, shape.tokens
    return {
        "weights, gradients, Adam (4 + 4 + 8 bytes per parameter / GPUs)": 16 * n / gpus,
        "two gathered layers and the embedding (2 bytes)": 2 * (2 * shape.layer + VOCABULARY * shape.hidden),
        "checkpoints: one input per layer (2 bytes x hidden x layers x tokens)": 2
        * shape.hidden
        * shape.layers
        * tokens,
        "one recomputed layer": 2 * tokens * (8 * shape.hidden + 4 * shape.inner),
        "logits and their gradient (2 + 2 bytes x vocabulary x tokens)": 4 * VOCABULARY * tokens,
        "allowance": ALLOWANCE,
    }


# Return the peak of an optimizer step.
def update_bytes(shape: ModelShape, gpus: int) -> float:
    return sum(memory_parts(shape, gpus).values())


# Return the peak of sampling: weights and Adam states stay (no offload), vLLM takes its share.
def generation_bytes(shape: ModelShape, gpus: int) -> float:
    return 12 * shape.parameters / gpus + ROLLOUT_SHARE * GPU_BYTES + ALLOWANCE


# Return how many responses of `tokens` tokens, prompt included, fit in the cache of one vLLM engine.
def cached_responses(shape: ModelShape, tokens: int) -> int:
    kept = 2 * shape.parameters + 2 * 2**30 * shape.tensor_parallel
    room = shape.tensor_parallel * ROLLOUT_SHARE * GPU_BYTES - kept
    # At most max_num_seqs of vLLM.
    return min(256, int(room / (shape.cache * tokens)))


# Return the seconds of one batch of responses by part, without communication.
def time_parts(shape: ModelShape, gpus: int, gpu: str) -> dict[str, float]:
    peak, bandwidth = GPUS[gpu]
    n, responses = shape.parameters, PROMPTS * GROUP
    tokens = responses * (PROMPT + RESPONSE)
    # Decoding is bound by memory: each step reads the weights once, and each token reads its response's cache.
    engine = shape.tensor_parallel * bandwidth * BANDWIDTH_SHARE
    a_share = responses / (gpus / shape.tensor_parallel)
    steps = max(MAX_RESPONSE, a_share * RESPONSE / cached_responses(shape, PROMPT + RESPONSE))
    cache_read = a_share * RESPONSE * (PROMPT + RESPONSE / 2) * shape.cache
    return {
        "prefill (2 N per prompt token)": 2 * n * PROMPTS * PROMPT / (gpus * peak * MFU),
        "decode (2 N bytes per step, at least one step per token of the longest response; plus cache reads)": (
            steps * 2 * n + cache_read
        )
        / engine,
        "old log-probabilities (2 N per token)": 2 * n * tokens / (gpus * peak * MFU),
        "update (6 N per token + 2 N for checkpointing)": 8 * n * tokens / (gpus * peak * MFU),
    }


# Return the seconds of FSDP traffic between nodes per batch if none of it overlaps with computation.
def network_seconds(shape: ModelShape, gpus: int, node_bytes: float) -> float:
    # A micro-batch gathers the weights twice (2 bytes each) and reduces the gradients once (4 bytes); old
    # log-probabilities gather the weights once more. Each node receives everything except its own part.
    nodes = gpus // 8
    tokens = PROMPTS * GROUP * (PROMPT + RESPONSE)
    micro = UPDATES * max(1.0, tokens / UPDATES / gpus / shape.tokens)
    passes = max(1.0, tokens / gpus / shape.tokens)
    return shape.parameters * (8 * micro + 2 * passes) * (nodes - 1) / nodes / node_bytes


# Print the two tables of docs/cluster.md.
def print_tables() -> None:
    print("| model | GPUs | update | sampling | of 79.1 GiB | responses in one cache |\n|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for gpus in (8, 16, 32, 64):
            heights = update_bytes(shape, gpus), generation_bytes(shape, gpus)
            fits = (
                "fits" if max(heights) < 0.95 * GPU_BYTES else "tight" if max(heights) < GPU_BYTES else "does not fit"
            )
            shown = " | ".join(f"{height / 2**30:.0f} GiB" for height in heights)
            print(f"| {name} | {gpus} | {shown} | {fits} | {cached_responses(shape, PROMPT + MAX_RESPONSE)} |")
    print(
        "\n| model | GPUs | A100: sampling + log-probs + update | H100 | network 8 x 400 Gb/s | 100 Gb/s | run (H100) |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for gpus in (8, 16, 32, 64):
            columns = []
            for gpu in GPUS:
                prefill, decode, old, update = time_parts(shape, gpus, gpu).values()
                columns.append(f"{prefill + decode:.0f} + {old:.0f} + {update:.0f} s")
            columns += [f"{network_seconds(shape, gpus, speed):.0f} s" for speed in (400e9, 12.5e9)]
            hours = 105 * sum(time_parts(shape, gpus, "H100").values()) / 3600
            print(f"| {name} | {gpus} | {' | '.join(columns)} | {hours:.1f} h |")


# Print the terms for one model on one cluster.
def print_terms(name: str, gpus: int) -> None:
    shape = SHAPES[name]
    print(f"Qwen3-{name}, {shape.parameters / 1e9:.2f} billion parameters, {gpus} GPUs, {shape.tokens} tokens per GPU")
    for what, size in memory_parts(shape, gpus).items():
        print(f"{size / 2**30:8.1f} GiB  {what}")
    for gpu in GPUS:
        for what, time in time_parts(shape, gpus, gpu).items():
            print(f"{time:8.1f} s {gpu}  {what}")


if __name__ == "__main__":
    print_terms(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 2 else print_tables()
