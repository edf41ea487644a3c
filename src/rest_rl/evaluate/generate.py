"""Sampling at temperature 1 and greedy decoding in left-padded batches, without touching anybody's random state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    greedy: bool = False,
    seed: int = 0,
) -> list[list[int]]:
    """The sampled ids of one response per prompt, in order, with the end-of-sequence token and without padding.

    Sampling is from the whole distribution at temperature 1, whatever the model's own generation settings say. The
    global random state and the model's mode are as before afterwards. Prompts of like length share a batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[int]] = [[] for _ in prompts]
    settings = generation_settings(model, tokenizer, max_new_tokens, greedy=greedy)
    with undisturbed(model, seed):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = generate_batch(model, tokenizer, [prompts[i] for i in batch], settings)
            for i, response in zip(batch, ids, strict=True):
                responses[i] = response
    return responses


def generation_settings(model: Any, tokenizer: Any, max_new_tokens: int, *, greedy: bool) -> GenerationConfig:
    """Decoding settings with every sampling filter off."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        do_sample=not greedy, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, **sampling
    )


def generate_batch(model: Any, tokenizer: Any, prompts: Sequence[str], settings: GenerationConfig) -> list[list[int]]:
    """One response per prompt of a single batch."""
    inputs = tokenizer(
        list(prompts), add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device)
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
    )
    ends = set(settings.eos_token_id or [])
    return [until_end(row.tolist(), ends) for row in output[:, inputs["input_ids"].shape[1] :]]


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The ids up to and with the first that ends a response."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids


@contextmanager
def undisturbed(model: Any, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients and a seed of its own; model mode and random state are restored."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)
