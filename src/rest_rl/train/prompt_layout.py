"""How the prompts of a model are laid out: by its chat template, in the format that it writes calls in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from rest_rl.config import AUTO
from rest_rl.data.samples import ToolSample
from rest_rl.formats import FORMATS, OpenedThinkFormat, ToolFormat, as_demonstrated, format_of_template, get_format
from rest_rl.response import ToolCall

THINK_SUFFIX = "+think"
"""Of a format's name: the prompt has opened the think block already."""
FALLBACK = "hermes"
"""The format described in a system message to a model whose template shows no known one."""
PROBE = {"role": "user", "content": "?"}
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe", "description": "?", "parameters": {"type": "object", "properties": {}}},
}
IN_WORDS = "it is described in a system message, unless the prompts do so themselves"
TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError, AttributeError, ValueError)
"""What a chat template, a program of its own, may fail with."""


class PromptLayout:
    """How the prompts of one model are laid out: by its chat template, in one format.

    A template that writes calls in the chosen format is given messages and tools as they are. For every other one
    the tools and the format are described in a system message, and calls and results in the history become text.
    """

    def __init__(
        self, tokenizer: Any, tool_format: str | ToolFormat = "toolrl", variables: Mapping[str, Any] | None = None
    ) -> None:
        """`variables` are the template's, such as enable_thinking. ValueError without a chat template."""
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "got a tokenizer without a chat template, expected one that lays out tools and messages; use an "
                "instruct model, or set tokenizer.chat_template"
            )
        self.tokenizer, self.format, self.variables = tokenizer, get_format(tool_format), dict(variables or {})

    def render(self, sample: ToolSample) -> str:
        """The prompt text up to where the response begins; ValueError when the template fails on the sample."""
        messages, tools = [dict(message) for message in sample.messages], list(sample.tools)
        if sample.tools_in_prompt:
            tools = []
        elif not self.is_native and (tools or any(message["role"] in CALLING for message in messages)):
            messages, tools = as_text(messages, tools, self.format), []
        try:
            return self._apply_either(messages, tools)
        except TEMPLATE_ERRORS as error:
            raise ValueError(
                f"sample {sample.id!r}: the model's chat template failed ({type(error).__name__}: {error}); expected "
                "messages and tools that it can lay out; complete the row (tools need name, description and "
                "parameters)"
            ) from error

    def training_text(self, sample: ToolSample) -> str:
        """As `render`, but without the beginning-of-sequence token that TRL's tokenising adds once more."""
        text = self.render(sample)
        return text.removeprefix(self.tokenizer.bos_token) if self.doubles_bos else text

    def count_tokens(self, sample: ToolSample) -> int:
        """How many tokens the prompt has; 0 where the template fails, which is found again when it is laid out."""
        try:
            return len(self.tokenizer(self.render(sample), add_special_tokens=False)["input_ids"])
        except ValueError:
            return 0

    @cached_property
    def is_native(self) -> bool:
        """Whether the template itself describes tools and writes calls in this layout's format."""
        base = self.format.name.removesuffix(THINK_SUFFIX)
        is_known = base not in FORMATS or template_format(self.tokenizer) == base
        return is_known and self._renders_tools

    @cached_property
    def opens_think(self) -> bool:
        """Whether a prompt ends in an open think block."""
        try:
            return self._apply([PROBE], []).rstrip().endswith(("<think>", "[THINK]"))
        except TEMPLATE_ERRORS:
            return False

    @cached_property
    def doubles_bos(self) -> bool:
        """Whether tokenising a prompt's text would add a second beginning-of-sequence token."""
        bos = self.tokenizer.bos_token
        try:
            begins = bool(bos) and self._apply([PROBE], []).startswith(bos)
        except TEMPLATE_ERRORS:
            return False
        return begins and self.tokenizer(bos + "x")["input_ids"][:2] == [self.tokenizer.bos_token_id] * 2

    @cached_property
    def _renders_tools(self) -> bool:
        try:
            return self._apply([PROBE], [PROBE_TOOL]) != self._apply([PROBE], [])
        except TEMPLATE_ERRORS:
            return False

    def _apply_either(self, messages: list[dict[str, Any]], tools: list[Any]) -> str:
        """By the calls' own ids, or where the template does not like them, by others."""
        try:
            return self._apply(messages, tools)
        except TEMPLATE_ERRORS:
            if (named := with_call_ids(messages)) == messages:
                raise
            return self._apply(named, tools)

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True, tokenize=False, **self.variables
        )


CALLING = ("assistant", "tool")
"""Roles whose messages may hold calls or their results."""


def as_text(messages: list[dict[str, Any]], tools: list[Any], tool_format: ToolFormat) -> list[dict[str, Any]]:
    """Messages without tool roles: tools described in the system message, calls and results written out.

    Neighbours of one role become one message, since some templates insist on alternation.
    """
    texts = [{"role": "system", "content": tool_format.instructions(tools)}] if tools else []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            content = call_text(message, tool_format)
        elif role == "tool":
            role, content = "user", f"<obs> {content} </obs>"
        if texts and texts[-1]["role"] == role != "assistant":
            texts[-1]["content"] += f"\n\n{content}"
        else:
            texts.append({"role": role, "content": content})
    return texts


def call_text(message: Mapping[str, Any], tool_format: ToolFormat) -> str:
    """An assistant message as the model would have written it, without reasoning."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls, content = [ToolCall(f["name"], f["arguments"]) for f in functions], message.get("content") or ""
    try:
        inner = tool_format.inner if isinstance(tool_format, OpenedThinkFormat) else tool_format
        return as_demonstrated(inner).render(None, calls, content or None)
    except ValueError:  # a text with tags in it: there is no better way to write it than as it is
        return content


def with_call_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls have ids of nine letters and digits, as Mistral's templates demand; results name them."""
    named: list[dict[str, Any]] = []
    waiting: list[str] = []
    made: dict[str, str] = {}
    for message in messages:
        changes: dict[str, Any] = {}
        if calls := message.get("tool_calls"):
            waiting = [f"call{len(made) + i:05d}" for i in range(len(calls))]
            made |= {str(call.get("id", new)): new for call, new in zip(calls, waiting, strict=True)}
            changes = {"tool_calls": [{**call, "id": new} for call, new in zip(calls, waiting, strict=True)]}
        elif message["role"] == "tool":
            known = made.get(str(message.get("tool_call_id")))
            new = known if known in waiting else next(iter(waiting), "call00000")
            waiting = [other for other in waiting if other != new]
            changes = {"tool_call_id": new}
        named.append({**message, **changes})
    return named


def template_format(tokenizer: Any) -> str | None:
    """The name of the format in which a tokenizer's chat template writes calls; None for an unknown one."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # several by name, the one for tools among them
        template = template.get("tool_use") or template.get("default") or ""
    return format_of_template(template or "")


def resolve_format(name: str, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """(name of the format, why) for a `[rest] format`: `auto` becomes what the chat template shows.

    `+think` is added where the template opens the think block. ValueError for `+think` where it does not.
    """
    found = template_format(tokenizer)
    base, asks_think = name.removesuffix(THINK_SUFFIX), name.endswith(THINK_SUFFIX)
    if base == AUTO:
        base = found or FALLBACK
        why = "from the chat template" if found else f"the chat template shows no known one, so {IN_WORDS}"
    elif base in FORMATS and found != base:
        shows = f"writes {found}" if found else "shows no known format"
        why = f"as asked; the chat template {shows}, so {IN_WORDS}"
    else:
        why = "as asked"
    opens = PromptLayout(tokenizer, base, variables).opens_think
    if asks_think and not opens:
        raise ValueError(
            f"got format {name!r}, but the model's chat template does not open a think block, expected {base!r}; "
            "leave out +think, or set model.chat_template_kwargs so that it does"
        )
    return (base + THINK_SUFFIX, f"{why}; it opens the think block") if opens else (base, why)
