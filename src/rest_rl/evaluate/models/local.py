"""Run a checkpoint with transformers: greedy decoding in left-padded batches."""

from __future__ import annotations

from typing import Any

import torch

from rest_rl.data.layout import PromptLayout
from rest_rl.data.samples import compute_digest
from rest_rl.errors import check_minimums
from rest_rl.evaluate.conversation import Reply
from rest_rl.evaluate.generate import eos_token_ids, generate
from rest_rl.evaluate.models.token_prompts import TokenModel, TokenPrompt
from rest_rl.regions import decode_ids
from rest_rl.train.policy import context_length

LENGTH_INDEPENDENT_ROPE = ("default", "linear", "llama3", "yarn")
"""RoPE types whose angles do not depend on the longest row of a batch."""


class LocalModel(TokenModel):
    """A transformers model with greedy decoding, or with sampling at a `temperature` above 0.

    A reply does not depend on the other prompts in its batch, except through rounding in 16-bit arithmetic.
    """

    def __init__(
        self,
        model: Any,
        layout: PromptLayout,
        *,
        batch_size: int,
        max_new_tokens: int,
        context: int | None = None,
        temperature: float = 0.0,
    ) -> None:
        # pass `context` if the model's config does not state the context length, as with stretched positions
        sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "context_length": context}
        check_minimums({name: (size, 1) for name, size in sizes.items()})
        self.model, self.layout, self.batch_size, self.max_new_tokens = model, layout, batch_size, max_new_tokens
        self.context = context if context is not None else context_length(model.config, layout.tokenizer)
        self.temperature = temperature
        self._can_exceed_context = can_exceed_context(model.config)

    # Token budget: each prompt has its own limit, because prompt plus response must fit into the context. Rows of one
    # batch run until the longest limit, so a row that already stopped keeps occupying positions. With computed (RoPE)
    # positions that is harmless. A position table ends at the context length: there, only equal limits share a batch.
    def generate_replies(self, prompts: list[TokenPrompt]) -> list[Reply]:
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
        # Out of memory: retry both halves, split by length, down to single prompts. One prompt that does not fit is an
        # error and not a wrong sample, because another process may be using the memory temporarily.
        responses: list[list[int]] | None = None
        try:
            responses = generate(
                self.model,
                self.layout.tokenizer,
                [prompt.text for prompt in prompts],
                max_new_tokens=[prompt.limit for prompt in prompts],
                batch_size=min(self.batch_size, len(prompts)),
                temperature=self.temperature,
                # The same batch has the same samples, so that a resumed evaluation equals an uninterrupted one.
                seed=compute_digest([(prompt.identity, prompt.text) for prompt in prompts]) % 2**32,
            )
        except RuntimeError as error:  # CUDA has a subclass, other devices raise a plain RuntimeError
            if "out of memory" not in str(error).lower():
                raise
        if responses is not None:
            return [self._to_reply(prompt, ids) for prompt, ids in zip(prompts, responses, strict=True)]
        if torch.cuda.is_available():  # outside of `except`: the traceback keeps the failed tensors alive
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
    """Return whether a finished row may stay in a batch that continues beyond the context length.

    True for computed positions (RoPE), false for a table of positions, which ends at the context length. Also false for
    RoPE types whose angles depend on the longest row (`dynamic`, `longrope`): other rows' texts would change.
    """
    settings = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [settings] if "rope_type" in settings else [*settings.values()]  # one for all layers, or one per type
    return bool(kinds) and all(
        isinstance(kind, dict) and kind.get("rope_type") in LENGTH_INDEPENDENT_ROPE for kind in kinds
    )
