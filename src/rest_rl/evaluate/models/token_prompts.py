"""Prompts as token ids with their share of the context, and how a completions server is asked to go on from them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from rest_rl.data.layout import PromptLayout
from rest_rl.errors import UserError
from rest_rl.evaluate.conversation import Model, Reply, Request
from rest_rl.evaluate.models.chat_messages import (
    first_choice,
    parse_body,
    replace_surrogates,
    require_field,
    token_count,
)


class TokenPrompt(NamedTuple):
    """What a model is to go on from: the text, its ids, and how many tokens there is room for."""

    text: str
    ids: list[int]
    limit: int


def prepare_prompt(
    request: Request, layout: PromptLayout, max_new_tokens: int, context: int | None
) -> TokenPrompt | Reply:
    """The prompt of a request with its share of the context, or the reply that says why there is none."""
    try:
        text = layout.render(request.sample)
    except ValueError as error:
        return Reply(refusal=str(error))
    try:
        text.encode()
    except UnicodeError as error:  # half of a surrogate pair
        return Reply(error=f"got a prompt that is no Unicode text ({error})")
    ids = layout.tokenizer(text, add_special_tokens=False)["input_ids"]
    limit = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
    if limit < 1:
        return Reply(overflow=f"got a prompt of {len(ids)} tokens, the model holds {context}", prompt_tokens=len(ids))
    return TokenPrompt(text, ids, limit)


def compute_context_usage(
    request: Request, layout: PromptLayout, max_new_tokens: int, context: int | None
) -> tuple[int, int] | None:
    """(tokens of the prompt and of the longest response, tokens the model holds); None for a model without end.

    A prompt that cannot be made takes nothing: its reply says why there is none.
    """
    if context is None:
        return None
    prompt = prepare_prompt(request, layout, max_new_tokens, None)
    return (len(prompt.ids) + max_new_tokens if isinstance(prompt, TokenPrompt) else 0), context


class TokenModel(Model):
    """A model in this process that goes on from token ids; its prompts, limits and overflows."""

    layout: PromptLayout
    max_new_tokens: int
    context: int | None

    @abstractmethod
    def generate_replies(self, prompts: list[TokenPrompt]) -> list[Reply]:
        """The replies to prompts that fit."""

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in order; a prompt that does not fit is an overflow, one without a text a refusal."""
        prompts = [prepare_prompt(request, self.layout, self.max_new_tokens, self.context) for request in requests]
        fitting = [prompt for prompt in prompts if isinstance(prompt, TokenPrompt)]
        replies = iter(self.generate_replies(fitting) if fitting else [])
        return [prompt if isinstance(prompt, Reply) else next(replies) for prompt in prompts]

    def context_usage(self, request: Request) -> tuple[int, int] | None:
        return compute_context_usage(request, self.layout, self.max_new_tokens, self.context)


def check_positive(**sizes: int | None) -> None:
    """UserError for a size below 1; None is no size."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"{name} = {size}", "at least 1", "raise it")


def build_completion_body(prompt: TokenPrompt, layout: PromptLayout) -> dict[str, Any]:
    """The prompt as ids, because servers add a beginning-of-sequence token to a text, which has its own already.

    Tags that are special tokens are asked for, since servers leave special tokens out; the two fields are vLLM's and
    SGLang's, so no other format asks for them.
    """
    body: dict[str, Any] = {"prompt": prompt.ids, "max_tokens": prompt.limit}
    if not layout.special_tokens.isdisjoint(layout.format.tags):
        body["extra_body"] = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    return body


def parse_completion(data: bytes, prompt: TokenPrompt, layout: PromptLayout) -> Reply:
    """The reply in the body of a completion; GarbledError for one that is none."""
    body = parse_body(data)
    if isinstance(body, Reply):
        return body
    choice, usage = first_choice(body), body.get("usage")
    text, prompt_tokens = require_field(choice, "text", str), token_count(usage, "prompt_tokens")
    return Reply(
        strip_end_tokens(replace_surrogates(text), layout),
        prompt_tokens=len(prompt.ids) if prompt_tokens is None else prompt_tokens,
        tokens=token_count(usage, "completion_tokens"),
        is_truncated=choice.get("finish_reason") == "length",
    )


def strip_end_tokens(text: str, layout: PromptLayout) -> str:
    """A text without the special tokens at its end but for tags, as `regions.decode_ids` leaves them out of ids."""
    ends = tuple(sorted(layout.special_tokens.difference(layout.format.tags)))
    while end := max((end for end in ends if text.endswith(end)), key=len, default=""):
        text = text.removesuffix(end)
    return text
