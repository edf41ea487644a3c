"""Sampling at temperature 1 and greedy decoding in left-padded batches, without touching anybody's random state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

NO_PENALTIES: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0}
"""Qwen2.5's generation_config.json has a repetition penalty of 1.05, which would count in greedy decoding, too."""
NO_FILTERS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int],
    batch_size: int,
    greedy: bool = False,
    seed: int = 0,
    on_token: Callable[[int], Any] | None = None,
) -> list[list[int]]:
    """The sampled ids of one response per prompt, in order, with the end-of-sequence token and without padding.

    Sampling is from the whole distribution at temperature 1, whatever the model's own generation settings say. The
    global random state and the model's mode are as before afterwards. Prompts of like length share a batch.
    `max_new_tokens` is one limit for all, or one per prompt. After every token of a batch `on_token` gets how many
    of `decoding_steps` are done; a batch that ends early has done all of its own.
    """
    responses: list[list[int]] = [[] for _ in prompts]
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    done = 0
    with evaluation_mode(model, seed):
        for batch in batch_by_length(prompts, batch_size):
            batch_limits = [limits[i] for i in batch]
            settings = generation_settings(model, tokenizer, max(batch_limits), greedy=greedy)
            texts, progress = [prompts[i] for i in batch], TokenProgress(on_token, done) if on_token else None
            ids = generate_batch(model, tokenizer, texts, settings, batch_limits, progress)
            done += max(batch_limits)
            if on_token:
                on_token(done)
            for i, response in zip(batch, ids, strict=True):
                responses[i] = response
    return responses


def batch_by_length(prompts: Sequence[str], batch_size: int) -> list[list[int]]:
    """The indices of the prompts in batches, those of like length together."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def decoding_steps(prompts: Sequence[str], limits: Sequence[int], batch_size: int) -> int:
    """How many tokens `generate` samples one after the other at most."""
    return sum(max(limits[i] for i in batch) for batch in batch_by_length(prompts, batch_size))


def generation_settings(model: Any, tokenizer: Any, max_new_tokens: int, *, greedy: bool) -> GenerationConfig:
    """Decoding settings with every filter off, also those that `generate` would take over from the model's own."""
    ends = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    settings = {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": pad, **NO_PENALTIES}
    return GenerationConfig(do_sample=not greedy, **settings, **({} if greedy else NO_FILTERS))


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the model's own, if there is one, and the tokenizer's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends


def has_ended(ids: Sequence[int], ends: Collection[int]) -> bool:
    """Whether a response ends with one of `ends`; every one does where nothing is known to end any."""
    return not ends or (bool(ids) and ids[-1] in ends)


class PerRowLimit(StoppingCriteria):
    """Ends each row of a batch at a length of its own, so that one with little room stops and the others go on."""

    def __init__(self, lengths_B: torch.Tensor) -> None:
        """`lengths_B` are the rows' lengths with padding and prompt."""
        self.lengths_B = lengths_B

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return input_ids.shape[1] >= self.lengths_B


class TokenProgress(StoppingCriteria):
    """Stops nothing; tells after each token how many steps are done, `done` of them before this batch."""

    def __init__(self, on_token: Callable[[int], Any], done: int) -> None:
        self.on_token, self.done = on_token, done

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        self.done += 1
        self.on_token(self.done)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: GenerationConfig,
    limits: Sequence[int],
    progress: TokenProgress | None = None,
) -> list[list[int]]:
    """One response per prompt of a single batch, each of as many tokens as its own limit at most."""
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    width = max(map(len, rows))  # padded here: Llama's and Mistral's tokenizers have no padding token
    padded = torch.tensor([[settings.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    stops = StoppingCriteriaList([progress] if progress else [])
    if len(set(limits)) > 1:
        stops.append(PerRowLimit(torch.tensor(limits, device=model.device) + width))
    output = model.generate(
        input_ids=padded.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        stopping_criteria=stops,
    )
    ends = set(settings.eos_token_id or [])  # a row at its limit goes on as padding, or as text in a model without ends
    rows = (row[:limit].tolist() for row, limit in zip(output[:, width:], limits, strict=True))
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row)) + 1] for row in rows]


@contextmanager
def evaluation_mode(model: Any, seed: int) -> Iterator[None]:
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
