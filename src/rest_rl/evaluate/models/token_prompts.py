"""Tokenize prompts and limit their responses to the context; build and parse requests to `/completions`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from rest_rl.data.layout import PromptLayout
from rest_rl.evaluate.conversation import Model, Reply, Request
from rest_rl.evaluate.models import chat_messages as chat


class TokenPrompt(NamedTuple):
    """A rendered prompt, its token ids, and the maximum number of tokens of the response."""

    text: str
    ids: list[int]
    limit: int
    identity: str = ""
    """The id of the sample; equal prompts of several samples are sampled differently."""


def prepare_prompt(
    request: Request, layout: PromptLayout, max_new_tokens: int, context: int | None
) -> TokenPrompt | Reply:
    """Render and tokenize a prompt, or return the reply that explains why that is impossible.

    The response limit is `max_new_tokens`, or less if the prompt leaves less room in the context. A prompt that leaves
    no room for a single token is reported as an overflow, which counts as wrong.
    """
    try:
        text = request.text or layout.render(request.sample)
    except ValueError as error:
        return Reply(refusal=str(error))
    try:
        text.encode()
    except UnicodeError as error:  # an unpaired surrogate
        return Reply(error=f"the prompt is not valid Unicode text ({error})")
    ids = layout.tokenizer(text, add_special_tokens=False)["input_ids"]
    limit = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
    if limit < 1:
        return Reply(overflow=f"the prompt has {len(ids)} tokens, the context {context}", prompt_tokens=len(ids))
    return TokenPrompt(text, ids, limit, request.sample.id)


def compute_context_usage(
    request: Request, layout: PromptLayout, max_new_tokens: int, context: int | None
) -> tuple[int, int] | None:
    """Return (tokens of the prompt plus a response of maximum length, context length); None if there is no limit.

    A prompt that cannot be rendered counts as 0 tokens; its reply explains the reason.
    """
    if context is None:
        return None
    prompt = prepare_prompt(request, layout, max_new_tokens, None)
    return (len(prompt.ids) + max_new_tokens if isinstance(prompt, TokenPrompt) else 0), context


class TokenModel(Model):
    """Base class of models that run in this process: renders and tokenizes prompts, limits responses to the context."""

    layout: PromptLayout
    max_new_tokens: int
    context: int | None

    @abstractmethod
    def generate_replies(self, prompts: list[TokenPrompt]) -> list[Reply]:
        """Return one reply per prompt, in order; all prompts fit into the context."""

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Return a reply per request, in order; the model never sees prompts that are too long or fail to render."""
        prompts = [prepare_prompt(request, self.layout, self.max_new_tokens, self.context) for request in requests]
        fitting = [prompt for prompt in prompts if isinstance(prompt, TokenPrompt)]
        replies = iter(self.generate_replies(fitting) if fitting else [])
        return [prompt if isinstance(prompt, Reply) else next(replies) for prompt in prompts]

    def context_usage(self, request: Request) -> tuple[int, int] | None:
        return compute_context_usage(request, self.layout, self.max_new_tokens, self.context)


def build_completion_body(prompt: TokenPrompt, layout: PromptLayout) -> dict[str, Any]:
    """Return the request body for `/completions`."""
    # Ids instead of text: the text already contains a beginning-of-sequence token, and servers would add another.
    # Servers strip special tokens. If the format's tags are special tokens, the two extra fields keep them; only vLLM
    # and SGLang know these fields, so requests for other formats do not contain them.
    body: dict[str, Any] = {"prompt": prompt.ids, "max_tokens": prompt.limit}
    if not layout.special_tokens.isdisjoint(layout.format.tags):
        body["extra_body"] = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    return body


def parse_completion(data: bytes, prompt: TokenPrompt, layout: PromptLayout) -> Reply:
    """Parse the body of a text completion. Raises MalformedResponseError if the body is something else."""
    body = chat.parse_body(data)
    if isinstance(body, Reply):
        return body
    choice, usage = chat.first_choice(body), body.get("usage")
    text, prompt_tokens = chat.require_field(choice, "text", str), chat.token_count(usage, "prompt_tokens")
    return Reply(
        strip_end_tokens(chat.replace_surrogates(text), layout),
        prompt_tokens=len(prompt.ids) if prompt_tokens is None else prompt_tokens,
        tokens=chat.token_count(usage, "completion_tokens"),
        is_truncated=choice.get("finish_reason") == "length",
    )


def strip_end_tokens(text: str, layout: PromptLayout) -> str:
    """Remove special tokens, except the format's tags, from the end of a text, as `regions.decode_ids` does for ids."""
    ends = tuple(sorted(layout.special_tokens.difference(layout.format.tags)))
    while end := max((end for end in ends if text.endswith(end)), key=len, default=""):
        text = text.removesuffix(end)
    return text
