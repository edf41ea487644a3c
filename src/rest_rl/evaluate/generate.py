"""Generate responses in left-padded batches, sampled or greedy; preserve the global random state."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

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

from rest_rl.evaluate.shared_attention import sharing

NO_PENALTIES: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0}
"""Qwen2.5's generation_config.json sets a repetition penalty of 1.05, which also applies to greedy decoding."""
NO_FILTERS = {"top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    batch_size: int,
    temperature: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int], Any] | None = None,
    meter: EntropyMeter | None = None,
) -> list[list[int]]:
    """Generate one response per prompt: `generate_draws` with a single draw."""
    settings: dict[str, Any] = {"batch_size": batch_size, "on_token": on_token, "meter": meter}
    return generate_draws(
        model, tokenizer, prompts, [Draw(temperature, seed)], max_new_tokens=max_new_tokens, **settings
    )[0]


# Batching: prompts are sorted by length (in characters, a cheap proxy for tokens), so that a batch needs little padding
# and short prompts do not wait for long ones. Each batch runs until its largest limit or until all of its rows ended.
# The results go back to the original order. Progress counts a batch that ended early as if it had used all its steps.
def generate_draws(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    draws: Sequence[Draw],
    *,
    max_new_tokens: int | Sequence[int],
    batch_size: int,
    on_token: Callable[[int], Any] | None = None,
    meter: EntropyMeter | None = None,
) -> list[list[list[int]]]:
    """Generate one response per draw to each prompt (text or token ids); return the ids by draw and prompt.

    All draws run together, in batches of `batch_size` prompts, and none depends on the others. Responses include the
    end-of-sequence token but no padding. Sampling uses the full distribution and ignores the model's generation config.
    The global random state and the model's training mode are restored. `max_new_tokens` is a limit for all prompts, or
    a list with a limit per prompt. After each decoding step `on_token` is called with the number of steps so far, out
    of `decoding_steps`. `meter` measures the policy entropy of the responses at temperature 1.
    """
    responses: list[list[list[int]]] = [[[] for _ in prompts] for _ in draws]
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    separate = SeparateDraws(draws, model.device) if len(draws) > 1 else None
    done = 0
    with evaluation_mode(model, draws[0].seed), sharing(model) as generate_groups:
        for batch in batch_by_length(prompts, batch_size):
            ids = generate_batch(
                model,
                tokenizer,
                [prompts[i] for i in batch for _ in draws],
                [limits[i] for i in batch for _ in draws],
                generate_groups,
                draws,
                separate,
                TokenProgress(on_token, done) if on_token else None,
                meter,
            )
            done += max(limits[i] for i in batch)
            if on_token:
                on_token(done)
            for place, own in enumerate(responses):
                for i, response in zip(batch, ids[place :: len(draws)], strict=True):
                    own[i] = response
    return responses


def batch_by_length(prompts: Sequence[str | Sequence[int]], batch_size: int) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def decoding_steps(prompts: Sequence[str | Sequence[int]], limits: Sequence[int], batch_size: int) -> int:
    """Return the maximum number of decoding steps that `generate` needs for these prompts, for progress reports."""
    return sum(max(limits[i] for i in batch) for batch in batch_by_length(prompts, batch_size))


def generation_settings(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> GenerationConfig:
    # set every filter explicitly: `model.generate` fills missing values from the model's generation config
    ends = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    settings = {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": pad, **NO_PENALTIES}
    if not temperature:
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
    """Measures the mean entropy of the policy over the tokens of all responses sampled at temperature 1, in nats.

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
        """Count the entropies of the first tokens of each row of a batch, of as many as `lengths` says."""
        entropies_BT = torch.stack(self._steps, dim=1).double().cpu()
        self._total += sum(float(row[:length].sum()) for row, length in zip(entropies_BT, lengths, strict=True))
        self._tokens += sum(lengths)
        self._steps.clear()

    @property
    def mean(self) -> float:
        """The mean over all tokens so far; NaN without tokens."""
        return self._total / self._tokens if self._tokens else math.nan


class Draw(NamedTuple):
    """How responses are sampled: the temperature (0: greedy decoding) and the seed."""

    temperature: float = 1.0
    seed: int = 0


class SeparateDraws(LogitsProcessor):
    """Chooses the tokens of a batch whose row i belongs to draw `i % len(draws)`, each draw as if it were alone.

    Only the logits of the chosen tokens remain, so that greedy decoding takes them. Generators go on over batches.
    """

    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        self.draws = draws
        self.generators = [torch.Generator(device).manual_seed(draw.seed) for draw in draws]

    def start_batch(self, width: int, limits: Sequence[int], ends: Sequence[int]) -> None:
        self.width, self.limits_B, self.ends = width, torch.tensor(limits), torch.tensor(ends)
        self.has_ended_B = torch.zeros(len(limits), dtype=torch.bool)

    # Alone, a draw stops when its rows have ended: from then on it takes no random numbers.
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        length, tokens_B = input_ids.shape[1] - self.width, scores.argmax(1)
        if length:
            self.has_ended_B |= torch.isin(input_ids[:, -1].cpu(), self.ends) | (length >= self.limits_B)
        for place, (draw, generator) in enumerate(zip(self.draws, self.generators, strict=True)):
            rows = slice(place, None, len(self.draws))
            if draw.temperature and not bool(self.has_ended_B[rows].all()):
                probs_BV = (scores[rows] / draw.temperature).softmax(-1)
                tokens_B[rows] = torch.multinomial(probs_BV, 1, generator=generator)[:, 0]
        return torch.full_like(scores, -math.inf).scatter_(1, tokens_B[:, None], 0.0)


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
    limits: Sequence[int],
    generate_groups: Callable[..., Any],
    draws: Sequence[Draw],
    separate: SeparateDraws | None = None,
    progress: TokenProgress | None = None,
    meter: EntropyMeter | None = None,
) -> list[list[int]]:
    """Generate one response per row, all in one batch; return the token ids of each, cut at its limit."""
    settings = generation_settings(model, tokenizer, max(limits), 0.0 if separate else draws[0].temperature)
    ends = settings.eos_token_id or []
    encode = partial(tokenizer, add_special_tokens=False)
    rows = [encode(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    width = max(map(len, rows))  # pad here: the tokenizers of Llama and Mistral have no padding token
    padded = torch.tensor([[settings.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    stops = StoppingCriteriaList([progress] if progress else [])
    if len(set(limits)) > 1:
        stops.append(PerRowLimit(torch.tensor(limits, device=model.device) + width))
    processors = LogitsProcessorList([meter] if meter else [])
    if separate:
        separate.start_batch(width, limits, ends)
        processors.append(separate)
    output = generate_groups(
        math.gcd(*(len(list(group)) for _, group in groupby(rows))),  # the group size: neighbors with equal prompts
        input_ids=padded.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        stopping_criteria=stops,
        logits_processor=processors,
    )
    # a row that stopped at its limit continues as padding, or as text if the model has no end-of-sequence token
    rows = (row[:limit].tolist() for row, limit in zip(output[:, width:], limits, strict=True))
    responses = [row[: next((i for i, token in enumerate(row) if token in ends), len(row)) + 1] for row in rows]
    if meter:
        is_measured = [draw.temperature == 1 for draw in draws]
        meter.finish_batch([len(row) * is_measured[i % len(draws)] for i, row in enumerate(responses)])
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
