"""A checkpoint that answers through transformers: greedy, in left-padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from rest_rl.data.prompt_layout import PromptLayout
from rest_rl.evaluate.conversation import Reply, Request
from rest_rl.evaluate.generate import end_ids, generate
from rest_rl.regions import decode_ids


class Prompt(NamedTuple):
    """What a model is to go on from: the text, its ids, and how many tokens there is room for."""

    text: str
    ids: list[int]
    limit: int


class LocalModel:
    """A transformers model with its tokenizer, asked greedily.

    A reply depends on its own prompt alone, up to the rounding of 16-bit arithmetic in batches of different shape.
    """

    concurrency = 1

    def __init__(
        self, model: Any, layout: PromptLayout, *, batch_size: int, max_new_tokens: int, context: int | None = None
    ) -> None:
        """`context` is what the model holds, where its configuration does not say so (stretched positions)."""
        check_sizes(batch_size=batch_size, max_new_tokens=max_new_tokens, context=1 if context is None else context)
        self.model, self.layout, self.batch_size, self.max_new_tokens = model, layout, batch_size, max_new_tokens
        self.context = context if context is not None else context_length(model.config, layout.tokenizer)

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in order; a prompt that does not fit is an overflow."""
        prompts = [prepare(request, self.layout, self.max_new_tokens, self.context) for request in requests]
        replies = [prompt if isinstance(prompt, Reply) else Reply() for prompt in prompts]
        by_limit: dict[int, list[int]] = {}  # nobody is given more tokens than a neighbour in the batch leaves room for
        for position, prompt in enumerate(prompts):
            if isinstance(prompt, Prompt):
                by_limit.setdefault(prompt.limit, []).append(position)
        for limit, positions in by_limit.items():
            chosen = [prompt for position in positions if isinstance(prompt := prompts[position], Prompt)]
            for position, reply in zip(positions, self._replies(chosen, limit), strict=True):
                replies[position] = reply
        return replies

    def room(self, request: Request) -> tuple[int, int] | None:
        """(tokens of the prompt and of the longest response, tokens the model holds); None for a model without end."""
        if self.context is None:
            return None
        return self.layout.count_tokens(request.sample) + self.max_new_tokens, self.context

    def _replies(self, prompts: list[Prompt], limit: int) -> list[Reply]:
        """Halves of a batch that the memory does not hold, by and by; a prompt too large by itself is an overflow."""
        responses: list[list[int]] | None = None
        size = min(self.batch_size, len(prompts))
        try:
            responses = generate(
                self.model,
                self.layout.tokenizer,
                [prompt.text for prompt in prompts],
                max_new_tokens=limit,
                batch_size=size,
                greedy=True,
            )
        except RuntimeError as error:  # CUDA's own type, and plain RuntimeErrors of other devices
            if "out of memory" not in str(error).lower():
                raise
        if responses is not None:
            return [self._reply(prompt, ids) for prompt, ids in zip(prompts, responses, strict=True)]
        if torch.cuda.is_available():  # here, where the error no longer holds what it failed on
            torch.cuda.empty_cache()
        if len(prompts) == 1:
            tokens = len(prompts[0].ids)
            return [
                Reply(overflow=f"got a prompt of {tokens} tokens, the device ran out of memory", prompt_tokens=tokens)
            ]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        half = len(prompts) // 2
        replies = [Reply()] * len(prompts)
        for part in (by_length[:half], by_length[half:]):
            for position, reply in zip(part, self._replies([prompts[i] for i in part], limit), strict=True):
                replies[position] = reply
        return replies

    def _reply(self, prompt: Prompt, ids: list[int]) -> Reply:
        is_ended = bool(ids) and ids[-1] in end_ids(self.model, self.layout.tokenizer)
        return Reply(
            decode_ids(ids, self.layout.tokenizer, self.layout.format.tags),
            prompt_tokens=len(prompt.ids),
            tokens=len(ids),
            is_truncated=len(ids) >= prompt.limit and not is_ended,
        )


def prepare(request: Request, layout: PromptLayout, max_new_tokens: int, context: int | None) -> Prompt | Reply:
    """The prompt of a request with its share of the context, or the overflow that says why there is none."""
    try:
        text = layout.render(request.sample)
    except ValueError as error:
        return Reply(overflow=str(error))
    ids = layout.tokenizer(text, add_special_tokens=False)["input_ids"]
    limit = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
    if limit < 1:
        return Reply(overflow=f"got a prompt of {len(ids)} tokens, the model holds {context}", prompt_tokens=len(ids))
    return Prompt(text, ids, limit)


def context_length(config: Any, tokenizer: Any) -> int | None:
    """How many tokens a model holds: its positions, or what its tokenizer says if that is less; None if unlimited."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    stated = getattr(tokenizer, "model_max_length", None)  # 10**30 where nobody said
    known = [number for number in (positions, stated) if isinstance(number, int) and 0 < number < 10**9]
    return min(known, default=None)


def check_sizes(**sizes: int) -> None:
    """ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"got {name} = {size}, expected at least 1; raise it")
