"""How the prompts of a model are laid out: by its chat template, in the format that it writes calls in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from rest_rl.config import AUTO
from rest_rl.data.samples import ToolSample, get_calls
from rest_rl.errors import UserError
from rest_rl.formats import (
    FORMATS,
    OpenedThinkFormat,
    ToolFormat,
    demonstration_format,
    detect_template_format,
    get_format,
)
from rest_rl.formats.opened_think import OPENING_TAGS, THINK_SUFFIX

FALLBACK_FORMAT = "hermes"
"""The format described in a system message to a model whose template shows no known one."""
PROBE_MESSAGE = {"role": "user", "content": "probe of the user message"}
PROBE_SYSTEM_MESSAGE = {"role": "system", "content": "probe of the system message"}
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe", "description": "?", "parameters": {"type": "object", "properties": {}}},
}
DESCRIBED_IN_SYSTEM = "it is described in a system message, unless the prompts do so themselves"
RESULTS_NOTE = "\n\nThe results of calls follow in <tool_response> </tool_response>."
"""Added to a format's instructions unless the format writes results in its own way."""
TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError, AttributeError, ValueError)
"""What a chat template, a program of its own, may fail with."""
Messages = list[dict[str, Any]]


class PromptLayout:
    """How the prompts of one model are laid out: by its chat template, in one format.

    A template that writes calls in the chosen format is given messages and tools as they are. For every other one
    the tools and the format are described in a system message, and calls and results in the history become text.
    `variables` are the template's, such as enable_thinking; `context` is how many tokens the model holds, None where
    nobody knows.

    Raises:
        UserError: the tokenizer has no chat template, or one that leaves out the text of messages.
    """

    def __init__(
        self,
        tokenizer: Any,
        tool_format: str | ToolFormat = "toolrl",
        variables: Mapping[str, Any] | None = None,
        context: int | None = None,
    ) -> None:
        self.context = context
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "a tokenizer without a chat template",
                "one that lays out tools and messages",
                "use an instruct model, or set tokenizer.chat_template",
            )
        self.tokenizer, self.format, self.variables = tokenizer, get_format(tool_format), dict(variables or {})
        self._probe = self._render_or_empty([PROBE_MESSAGE])
        if self._probe and PROBE_MESSAGE["content"] not in self._probe:
            raise UserError(
                "a chat template that leaves the text of messages out (some of models for images do)",
                "one that writes it",
                "set tokenizer.chat_template to a template for text",
            )

    def render(self, sample: ToolSample) -> str:
        """The prompt text up to where the response begins; UserError when the template fails on the sample.

        A beginning-of-sequence token that the tokenizer adds by itself stands in it, also where the template has none.
        """
        messages = [  # what was thought before is not shown again
            {key: value for key, value in message.items() if key != "reasoning_content"} for message in sample.messages
        ]
        tools = [] if sample.tools_in_prompt else list(sample.tools)
        if not (sample.tools_in_prompt or self.is_native):
            messages, tools = messages_to_text(messages, tools, self.format), []
        if not self._supports_system:
            messages = _move_system_into_user(messages)
        try:
            text = self._apply_template(messages, tools)
        except TEMPLATE_ERRORS as error:
            try:  # a template may want calls to have ids of its own kind
                text = self._apply_template(assign_call_ids(messages), tools)
            except TEMPLATE_ERRORS:
                raise UserError(
                    f"sample {sample.id!r}, on which the chat template failed ({type(error).__name__}: {error})",
                    "messages and tools that it can lay out",
                    "complete the row (tools need name, description and parameters)",
                ) from error
        return self.bos_prefix + text.removeprefix(self.bos_prefix)

    def count_tokens(self, sample: ToolSample) -> int:
        """How many tokens the prompt has; 0 where the template fails, which is found again when it is laid out."""
        try:
            return len(self.tokenizer(self.render(sample), add_special_tokens=False)["input_ids"])
        except ValueError:
            return 0

    @cached_property
    def is_native(self) -> bool:
        """Whether the template itself describes tools and writes calls in this layout's format.

        A format of your own says so by an attribute `is_native`.
        """
        inner = self.format.inner if isinstance(self.format, OpenedThinkFormat) else self.format
        is_known = detect_tokenizer_format(self.tokenizer) == inner.name or getattr(inner, "is_native", False)
        return is_known and self._render_or_empty([PROBE_MESSAGE], [PROBE_TOOL]) not in ("", self._probe)

    @cached_property
    def opens_think(self) -> bool:
        """Whether a prompt ends in an open think block."""
        return self._probe.rstrip().endswith(OPENING_TAGS)

    @cached_property
    def closes_think(self) -> bool:
        """Whether a prompt ends in a think block that is closed already: the model is not to think."""
        return self._probe.rstrip().endswith(("</think>", "[/THINK]"))

    @cached_property
    def bos_prefix(self) -> str:
        """The beginning-of-sequence token where the tokenizer adds it by itself, else nothing."""
        bos = self.tokenizer.bos_token
        return bos if bos and self.tokenizer("x")["input_ids"][:1] == [self.tokenizer.bos_token_id] else ""

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The tokenizer's special tokens: as text of a message they act all the same."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return frozenset(filter(None, (*added, *self.tokenizer.all_special_tokens)))

    @cached_property
    def _supports_system(self) -> bool:
        """Whether the template lays out system messages; Gemma's refuses them, others leave them out."""
        return PROBE_SYSTEM_MESSAGE["content"] in self._render_or_empty([PROBE_SYSTEM_MESSAGE, PROBE_MESSAGE])

    def _render_or_empty(self, messages: Messages, tools: Sequence[Any] = ()) -> str:
        try:
            return self._apply_template(messages, tools)
        except TEMPLATE_ERRORS:
            return ""

    def _apply_template(self, messages: Messages, tools: Sequence[Any]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, add_generation_prompt=True, tokenize=False, **self.variables
        )


def messages_to_text(messages: Messages, tools: Sequence[Any], tool_format: ToolFormat) -> Messages:
    """Messages without tool roles: tools described in the system message, calls and results written out.

    Neighbours of one role become one message, since some templates insist on alternation.
    """
    needs_words = tools or not tool_format.parse("", spans=False).untagged_answer
    inner = tool_format.inner if isinstance(tool_format, OpenedThinkFormat) else tool_format
    observation = getattr(inner, "observation", None)
    texts: Messages = []
    if needs_words:
        explained = tool_format.instructions(tools) + ("" if observation else RESULTS_NOTE)
        texts.append({"role": "system", "content": explained})
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            content = _render_assistant(message, tool_format)
        elif role == "tool":
            role, content = "user", observation(content) if observation else wrap_tool_response(content)
        if texts and texts[-1]["role"] == role != "assistant":
            texts[-1]["content"] += f"\n\n{content}"
        else:
            texts.append({"role": role, "content": content})
    return texts


def wrap_tool_response(content: str) -> str:
    """A tool's result in words as Hermes and Qwen are served."""
    return f"<tool_response>\n{content}\n</tool_response>"


def _render_assistant(message: Mapping[str, Any], tool_format: ToolFormat) -> str:
    """An assistant message as the model would have written it, without reasoning; ValueError for unwritable calls."""
    calls, content = get_calls(message), message.get("content") or ""
    written = demonstration_format(tool_format.inner if isinstance(tool_format, OpenedThinkFormat) else tool_format)
    try:
        return written.render(None, calls, content or None)
    except ValueError:  # a text with tags in it: it is left as it is, or out where there are calls
        return written.render(None, calls, None) if calls else content


def _move_system_into_user(messages: Messages) -> Messages:
    """Messages without a system message: what it says opens the first user message, or is one."""
    said = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    if not said:
        return messages
    if others and others[0]["role"] == "user":
        said.append(others.pop(0)["content"])
    return [{"role": "user", "content": "\n\n".join(said)}, *others]


def assign_call_ids(messages: Messages) -> Messages:
    """Messages whose calls have ids of nine letters and digits, as Mistral's templates demand; results name them."""
    named: Messages = []
    waiting: list[tuple[str, str]] = []  # (id as given, new id) of the calls without a result yet
    made = 0
    for message in messages:
        changes: dict[str, Any] = {}
        if calls := message.get("tool_calls"):
            waiting = [(str(call.get("id")), f"call{made + i:05d}") for i, call in enumerate(calls)]
            made += len(calls)
            changes = {"tool_calls": [{**call, "id": new} for call, (_, new) in zip(calls, waiting, strict=True)]}
        elif message["role"] == "tool":
            given = str(message.get("tool_call_id"))
            answered = next((pair for pair in waiting if pair[0] == given), next(iter(waiting), ("", "call00000")))
            waiting = [pair for pair in waiting if pair is not answered]
            changes = {"tool_call_id": answered[1]}
        named.append({**message, **changes})
    return named


def detect_tokenizer_format(tokenizer: Any) -> str | None:
    """The name of the format in which a tokenizer's chat template writes calls; None for an unknown one."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # several by name, the one for tools among them
        template = template.get("tool_use") or template.get("default") or ""
    return detect_template_format(template or "")


def resolve_format(
    name: str, tokenizer: Any, variables: Mapping[str, Any] | None = None, *, keeps_prompts: bool = False
) -> tuple[str, str]:
    """(name of the format, why) for a `[rest] format`: `auto` becomes what the chat template shows.

    `+think` is added where the template opens the think block. ValueError for `+think` where it does not, and for
    `auto` with prompts that are kept as published, which ask for a format of their own.
    """
    if keeps_prompts and name == AUTO:
        raise UserError(
            "kept prompts without a format",
            "the one that they ask for",
            "pass --format (rest.format): toolrl for ToolRL and API-Bank, pythonic for ToolACE",
        )
    found = detect_tokenizer_format(tokenizer)
    base, asks_think = name.removesuffix(THINK_SUFFIX), name.endswith(THINK_SUFFIX)
    if base == AUTO:
        base = found or FALLBACK_FORMAT
        why = "from the chat template" if found else f"the chat template shows no known one, so {DESCRIBED_IN_SYSTEM}"
    elif base in FORMATS and found != base:
        shows = f"writes {found}" if found else "shows no known format"
        why = f"as set; the chat template {shows}, so {DESCRIBED_IN_SYSTEM}"
    else:
        why = "as set"
    opens = PromptLayout(tokenizer, base, variables).opens_think
    if asks_think and not opens:
        raise UserError(
            f"format {name!r}, but the model's chat template does not open a think block",
            f"{base!r}",
            "leave out +think, or set model.chat_template_kwargs so that it does",
        )
    return (base + THINK_SUFFIX, f"{why}; it opens the think block") if opens else (base, why)
