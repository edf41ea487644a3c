"""Generate responses in left-padded batches, sampled or greedy; preserve the global random state."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

NO_PENALTIES: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0}
"""Qwen2.5's generation_config.json sets a repetition penalty of 1.05, which also applies to greedy decoding."""
NO_FILTERS = {"top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


# Batching: prompts are sorted by length (in characters, a cheap proxy for tokens), so that a batch needs little padding
# and short prompts do not wait for long ones. Each batch runs until its largest limit or until all of its rows ended.
# The results go back to the original order. Progress counts a batch that ended early as if it had used all its steps.
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    batch_size: int,
    greedy: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int], Any] | None = None,
    meter: EntropyMeter | None = None,
) -> list[list[int]]:
    """Generate one response per prompt (text or token ids) and return its ids, in the order of the prompts.

    Responses include the end-of-sequence token but no padding. Sampling uses the full distribution at `temperature` and
    ignores the model's generation config. The global random state and the model's training mode are restored.
    `max_new_tokens` is a limit for all prompts, or a list with a limit per prompt. After each decoding step `on_token`
    is called with the number of steps so far, out of `decoding_steps`. `meter` measures the policy entropy.
    """
    responses: list[list[int]] = [[] for _ in prompts]
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    done = 0
    with evaluation_mode(model, seed):
        for batch in batch_by_length(prompts, batch_size):
            batch_limits = [limits[i] for i in batch]
            settings = generation_settings(
                model, tokenizer, max(batch_limits), temperature=None if greedy else temperature
            )
            texts, progress = [prompts[i] for i in batch], TokenProgress(on_token, done) if on_token else None
            ids = generate_batch(model, tokenizer, texts, settings, batch_limits, progress, meter)
            done += max(batch_limits)
            if on_token:
                on_token(done)
            for i, response in zip(batch, ids, strict=True):
                responses[i] = response
    return responses


def batch_by_length(prompts: Sequence[str | Sequence[int]], batch_size: int) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def decoding_steps(prompts: Sequence[str | Sequence[int]], limits: Sequence[int], batch_size: int) -> int:
    """Return the maximum number of decoding steps that `generate` needs for these prompts, for progress reports."""
    return sum(max(limits[i] for i in batch) for batch in batch_by_length(prompts, batch_size))


def generation_settings(
    model: Any, tokenizer: Any, max_new_tokens: int, *, temperature: float | None
) -> GenerationConfig:
    # set every filter explicitly: `model.generate` fills missing values from the model's generation config
    ends = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    settings = {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": pad, **NO_PENALTIES}
    if temperature is None:
        return GenerationConfig(do_sample=False, **settings)
    return GenerationConfig(do_sample=True, temperature=temperature, **settings, **NO_FILTERS)


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end a response, from the model's generation config and the tokenizer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends


def has_ended(ids: Sequence[int], ends: Collection[int]) -> bool:
    """Return whether a response ends with one of the token ids in `ends`; always true if `ends` is empty."""
    return not ends or (bool(ids) and ids[-1] in ends)


class EntropyMeter(LogitsProcessor):
    """Measures the mean entropy of the policy over the tokens of all responses, in nats at temperature 1.

    It reads the logits of every decoding step and leaves them unchanged.
    """

    def __init__(self) -> None:
        self._steps: list[Tensor] = []
        self._total, self._tokens = 0.0, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._steps.append(Categorical(logits=scores.float(), validate_args=False).entropy())
        return scores

    # Generation continues until the last row ends. The steps of a row after its end belong to no token of its response.
    def finish_batch(self, lengths: Sequence[int]) -> None:
        """Count the entropies of a batch whose responses have these lengths."""
        entropies_BT = torch.stack(self._steps, dim=1).double().cpu()
        self._total += sum(float(row[:length].sum()) for row, length in zip(entropies_BT, lengths, strict=True))
        self._tokens += sum(lengths)
        self._steps.clear()

    @property
    def mean(self) -> float:
        """The mean over all tokens so far; NaN without tokens."""
        return self._total / self._tokens if self._tokens else math.nan


class PerRowLimit(StoppingCriteria):
    """Stop row i of a batch when its padding, prompt and response together have `lengths_B[i]` tokens."""

    def __init__(self, lengths_B: torch.Tensor) -> None:
        self.lengths_B = lengths_B

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return input_ids.shape[1] >= self.lengths_B


class TokenProgress(StoppingCriteria):
    """Pass the number of decoding steps to `on_token` after each step, starting from `done`; never stop a row."""

    def __init__(self, on_token: Callable[[int], Any], done: int) -> None:
        self.on_token, self.done = on_token, done

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        self.done += 1
        self.on_token(self.done)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    settings: GenerationConfig,
    limits: Sequence[int],
    progress: TokenProgress | None = None,
    meter: EntropyMeter | None = None,
) -> list[list[int]]:
    """Generate one response per prompt, all in one batch; return the token ids of each, cut at its limit."""
    encode = partial(tokenizer, add_special_tokens=False)
    rows = [encode(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    width = max(map(len, rows))  # pad here: the tokenizers of Llama and Mistral have no padding token
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
        logits_processor=LogitsProcessorList([meter] if meter else []),
    )
    # a row that stopped at its limit continues as padding, or as text if the model has no end-of-sequence token
    ends = set(settings.eos_token_id or [])
    rows = (row[:limit].tolist() for row, limit in zip(output[:, width:], limits, strict=True))
    responses = [row[: next((i for i, token in enumerate(row) if token in ends), len(row)) + 1] for row in rows]
    if meter:
        meter.finish_batch([len(response) for response in responses])
    return responses


@contextmanager
def evaluation_mode(model: Any, seed: int) -> Iterator[None]:
    """Enter evaluation mode without gradients and with a fixed seed; restore the random state and mode on exit."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)
