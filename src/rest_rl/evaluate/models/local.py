"""A checkpoint that answers through transformers: greedy, in left-padded batches."""

from __future__ import annotations

from typing import Any

import torch

from rest_rl.data.layout import PromptLayout
from rest_rl.evaluate.conversation import Reply
from rest_rl.evaluate.generate import eos_token_ids, generate
from rest_rl.evaluate.models.token_prompts import TokenModel, TokenPrompt, check_positive
from rest_rl.regions import decode_ids
from rest_rl.train.policy import context_length

LENGTH_INDEPENDENT_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary positions whose angles do not depend on how long the longest row of a batch is."""


class LocalModel(TokenModel):
    """A transformers model with its tokenizer, asked greedily.

    A reply depends on its own prompt alone, up to the rounding of 16-bit arithmetic in batches of different shape.
    """

    def __init__(
        self, model: Any, layout: PromptLayout, *, batch_size: int, max_new_tokens: int, context: int | None = None
    ) -> None:
        """`context` is what the model holds, where its configuration does not say so (stretched positions)."""
        check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens, context=context)
        self.model, self.layout, self.batch_size, self.max_new_tokens = model, layout, batch_size, max_new_tokens
        self.context = context if context is not None else context_length(model.config, layout.tokenizer)
        self._can_exceed_context = can_exceed_context(model.config)

    def generate_replies(self, prompts: list[TokenPrompt]) -> list[Reply]:
        """The replies, together for those that may share a batch."""
        replies = [Reply()] * len(prompts)
        together: dict[int, list[int]] = {}
        for position, prompt in enumerate(prompts):
            together.setdefault(0 if self._can_exceed_context else prompt.limit, []).append(position)
        for positions in together.values():
            written = self._generate_or_halve([prompts[position] for position in positions])
            for position, reply in zip(positions, written, strict=True):
                replies[position] = reply
        return replies

    def _generate_or_halve(self, prompts: list[TokenPrompt]) -> list[Reply]:
        """Halves of a batch that the memory does not hold, by and by.

        A prompt too large by itself is an error, because another process may hold the memory for a while.
        """
        responses: list[list[int]] | None = None
        try:
            responses = generate(
                self.model,
                self.layout.tokenizer,
                [prompt.text for prompt in prompts],
                max_new_tokens=[prompt.limit for prompt in prompts],
                batch_size=min(self.batch_size, len(prompts)),
                greedy=True,
            )
        except RuntimeError as error:  # CUDA's own type, and plain RuntimeErrors of other devices
            if "out of memory" not in str(error).lower():
                raise
        if responses is not None:
            return [self._to_reply(prompt, ids) for prompt, ids in zip(prompts, responses, strict=True)]
        if torch.cuda.is_available():  # here, where the error no longer holds what it failed on
            torch.cuda.empty_cache()
        if len(prompts) == 1:
            tokens = len(prompts[0].ids)
            return [Reply(error=f"the device ran out of memory on a prompt of {tokens} tokens", prompt_tokens=tokens)]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        half = len(prompts) // 2
        replies = [Reply()] * len(prompts)
        for part in (by_length[:half], by_length[half:]):
            for position, reply in zip(part, self._generate_or_halve([prompts[i] for i in part]), strict=True):
                replies[position] = reply
        return replies

    def _to_reply(self, prompt: TokenPrompt, ids: list[int]) -> Reply:
        is_ended = bool(ids) and ids[-1] in eos_token_ids(self.model, self.layout.tokenizer)
        return Reply(
            decode_ids(ids, self.layout.tokenizer, self.layout.format.tags),
            prompt_tokens=len(prompt.ids),
            tokens=len(ids),
            is_truncated=len(ids) >= prompt.limit and not is_ended,
        )


def can_exceed_context(config: Any) -> bool:
    """Whether a finished row may stay in a batch beyond the context: where positions are angles, not rows of a table.

    Not with angles that change with the longest row (`dynamic`, `longrope`), which would change the others' texts.
    """
    settings = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [settings] if "rope_type" in settings else [*settings.values()]  # one for all layers, or one per type
    return bool(kinds) and all(
        isinstance(kind, dict) and kind.get("rope_type") in LENGTH_INDEPENDENT_ROPE for kind in kinds
    )
